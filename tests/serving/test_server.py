"""The server as a program: real sockets, OpenAI's own client, many at once, who hangs up, how it ends."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import warm
from conftest import ROOT

import twigvlm
from serving.conftest import CHAT, desk_of, shown
from serving.test_chat import fault
from twigvlm.prompt.images import open_image
from twigvlm.serving import __main__ as serving
from twigvlm.serving import benchmark, listen
from twigvlm.serving.settings import ServerSettings

PICTURE = ROOT / "assets" / "image.png"
QUESTION = "Describe the image in detail."
DATA = f"data:image/png;base64,{base64.b64encode(PICTURE.read_bytes()).decode()}"
SAID = [
    {"role": "user", "content": [{"type": "text", "text": QUESTION}, {"type": "image_url", "image_url": {"url": DATA}}]}
]


@contextmanager
def program(*flags: str) -> Iterator[tuple[warm.Program, str]]:
    """The program and its address."""
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    process = warm.Program(["-m", "twigvlm.serving", "--port", "0", *flags], ROOT, env)
    try:
        line = process.line()
        assert " at http://" in line, process.communicate()
        yield process, line.split(" at ")[1].split("/v1")[0]
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A Python started anew, as people start it."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "twigvlm.serving", "--port", "0"]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            assert " at http://" in line, process.stderr.read()
            yield line.split(" at ")[1].split("/v1")[0]
        finally:
            process.kill()


@pytest.fixture(scope="module")
def sprout():
    return twigvlm.load(device="cpu")


def openai_at(address: str):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=300)


# ---------------------------------------------------------------------- OpenAI's client


@pytest.mark.slow
def test_openais_client_is_told_what_the_model_says(server, sprout):
    client = openai_at(server)
    assert [model.id for model in client.models.list()] == ["sprout"]
    alone = sprout.answer(open_image(PICTURE), QUESTION, retained_tokens=64)
    told = client.chat.completions.create(model="sprout", messages=SAID)
    assert told.choices[0].message.content == alone and told.choices[0].finish_reason == "stop"
    assert told.usage.prompt_tokens + told.usage.completion_tokens == told.usage.total_tokens
    assert told.twig["visual_kept"] == len(told.twig["kept"]) and told.twig["accepted"] <= told.twig["drafted"]
    stream = client.chat.completions.create(
        model="sprout", messages=SAID, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == alone
    assert chunks[-1].usage == told.usage
    other = client.chat.completions.create(
        model="sprout", messages=SAID, extra_body={"twig": {"tokens": 192, "method": "fastv", "draft": 0}}
    )
    assert other.choices[0].message.content == sprout.answer(
        open_image(PICTURE), QUESTION, retained_tokens=192, pruning="fastv"
    )
    assert other.twig["drafted"] == 0


@pytest.mark.slow
def test_openais_client_understands_what_is_wrong(server):
    openai, client = pytest.importorskip("openai"), openai_at(server)
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4o", messages=SAID)
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="sprout", messages=SAID, n=2)
    assert caught.value.param == "n"


@pytest.mark.slow
def test_two_hundred_at_once(server):
    """Nothing is lost, nothing is mixed up: each asks for another number of tokens of the same answer."""
    import httpx

    kinds = []  # with a picture and without
    for said in (SAID, [{"role": "user", "content": "Is there a star?"}]):
        told = openai_at(server).chat.completions.create(model="sprout", messages=said, max_tokens=20)
        kinds.append((said, told.choices[0].message.content))
    limits = httpx.Limits(max_connections=200)
    start = threading.Barrier(200)

    def one(number: int) -> tuple[int, int, str, str]:
        start.wait(60)
        said, _ = kinds[number % 5 > 0]
        body = {"model": "sprout", "messages": said, "max_tokens": 1 + number % 8, "stream": number % 2 == 1}
        found = client.post(f"{server}{CHAT}", json=body)
        assert found.status_code == 200, found.text
        if not body["stream"]:
            choice = found.json()["choices"][0]
            return number, body["max_tokens"], choice["message"]["content"], choice["finish_reason"]
        chunks = [json.loads(line[6:]) for line in found.text.splitlines() if line.startswith("data: {")]
        text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)
        return number, body["max_tokens"], text, chunks[-1]["choices"][0]["finish_reason"]

    with httpx.Client(limits=limits, timeout=300) as client, ThreadPoolExecutor(200) as pool:
        found = list(pool.map(one, range(200)))
        figures = client.get(f"{server}/metrics").text
    texts: dict[tuple, set[tuple]] = {}
    for number, tokens, text, reason in found:
        kind = number % 5 > 0
        texts.setdefault((kind, tokens), set()).add((text, reason))
        assert kinds[kind][1].startswith(text)
    assert len(found) == 200 and all(len(same) == 1 for same in texts.values()) and len(texts) == 16
    assert {reason for tokens in range(1, 9) for _, reason in texts[False, tokens]} == {"length"}
    told = dict(line.rsplit(" ", 1) for line in figures.splitlines() if not line.startswith("#"))
    assert float(told["twigvlm_batch_size_sum"]) / float(told["twigvlm_batch_size_count"]) > 2, "not answered together"


@pytest.mark.slow
def test_schemathesis_finds_nothing(server):
    """Requests that the interface's own description makes up, good ones and bad ones."""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis.errors import Unsatisfiable
    from schemathesis.checks import CHECKS

    # The description cannot say that user and assistant take turns.
    every = [check for check in CHECKS.get_all() if check.__name__ != "positive_data_acceptance"]
    schema = schemathesis.openapi.from_url(f"{server}/openapi.json")
    seen: list[int] = []
    for found in schema.get_all_operations():
        operation = found.ok()
        for mode in schemathesis.GenerationMode:

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(
                max_examples=40, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck),
                phases=(Phase.generate,),
            )  # fmt: skip
            def try_out(case):
                answer = case.call_and_validate(checks=every)
                seen.append(answer.status_code)

            with contextlib.suppress(Unsatisfiable):  # what takes nothing cannot be asked wrongly
                try_out()
    assert seen and max(seen) < 500 and {200, 400} <= set(seen), sorted(set(seen))


# ---------------------------------------------------------------------- sockets of its own, a tiny model


@contextmanager
def running(vlm, **settings) -> Iterator[tuple]:
    """A desk, and the address of a server in a thread."""
    with desk_of(vlm, port=0, **settings) as desk, listen.bind(desk.settings) as sock:
        server = listen.make_server(desk)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        address = listen.address(sock)
        try:
            yield desk, address
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()


def until(true, seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not true():
        time.sleep(0.01)
    return true()


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_hanging_up_frees_the_worker(vlm, stream):
    """Within a step, be it at work or waiting."""
    with running(vlm, max_batch=1) as (desk, address):
        host, port = address.removeprefix("http://").split(":")
        said = [{"role": "user", "content": [*shown(), {"type": "text", "text": "What?"}]}]
        body = {"model": "tiny", "messages": said, "max_tokens": 900, "stream": stream, "twig": {"draft": 0}}
        raw = json.dumps(body).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
        sockets = [socket.create_connection((host, int(port))) for _ in range(3)]
        for place, one in enumerate(sockets):  # each is read by a thread of its own: who is first is seen to be first
            one.sendall(head.encode() + raw)
            assert until(lambda place=place: (desk.engine.running, desk.engine.waiting) == (1, place))
        sockets[2].close()
        assert until(lambda: desk.engine.waiting == 1)
        if stream:
            assert sockets[0].recv(20).startswith(b"HTTP/1.1 200")
        batches = sum(desk.engine.batches.values())
        sockets[0].close()
        assert until(lambda: sum(desk.engine.batches.values()) == batches + 1), "the next one begins"
        sockets[1].close()
        assert until(lambda: not (desk.engine.running or desk.engine.waiting or desk.jobs or desk.open))
        figures = desk.metrics.text()[0].decode()
        assert f'status="{200 if stream else 499}"' in figures


@pytest.mark.slow
def test_a_slow_sender_does_not_wait_for_ever(vlm):
    with running(vlm, timeout=0.5) as (desk, address):
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as one:
            one.sendall(
                f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{{".encode()
            )
            one.settimeout(20)
            assert one.recv(100).startswith(b"HTTP/1.1 408")
        assert until(lambda: not desk.open)


@pytest.mark.slow
def test_half_a_stream_that_takes_too_long_says_so(vlm):
    import httpx

    with running(vlm, timeout=2) as (_, address):
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": "a"}],
            "max_tokens": 1000,
            "stream": True,
            "twig": {"draft": 0},
        }
        text = httpx.post(f"{address}{CHAT}", json=body, timeout=60).text
        events = [json.loads(line[6:]) for line in text.splitlines() if line]
        assert events[-1]["error"]["code"] == "timeout" and events[0]["choices"]


@pytest.mark.slow
def test_pictures_from_addresses_are_fetched_from_the_public_only(vlm):
    import httpx

    with running(vlm, allow_remote_images=True) as (_, address):
        part = {"type": "image_url", "image_url": {"url": f"{address}/health"}}
        body = {"model": "tiny", "messages": [{"role": "user", "content": [part, {"type": "text", "text": "a"}]}]}
        error = fault(httpx.post(f"{address}{CHAT}", json=body, timeout=60), 400)
        assert "not on the public internet" in error["message"] and error["code"] == "invalid_image"


# ---------------------------------------------------------------------- beginning and end


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.nightly)])
def test_who_is_being_answered_is_answered_before_the_end(number):
    import httpx

    with program() as (process, address):
        with httpx.stream(
            "POST", f"{address}{CHAT}", json={"model": "sprout", "messages": SAID, "stream": True}, timeout=60
        ) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            os.kill(process.pid, number)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert process.wait(60) == 0
        assert "Traceback" not in process.communicate()[1]


@pytest.mark.slow
def test_who_takes_too_long_is_told_that_it_ends(vlm):
    import httpx

    with running(vlm, grace=0.5) as (desk, address):
        body = {
            "model": "tiny",
            "messages": [{"role": "user", "content": "a"}],
            "max_tokens": 1000,
            "twig": {"draft": 0},
        }
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(httpx.post, f"{address}{CHAT}", json=body, timeout=60)
            assert until(lambda: desk.engine.running == 1)
            for job in list(desk.jobs):
                assert job.left() > 100
            threading.Timer(0.2, desk.end).start()
            assert fault(asked.result(60), 503)["code"] == "shutting_down"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_server_listens_to_any_ends_it(number):
    """Whoever has read the address may send one at once; nothing is raised where it happens to come."""
    import uvicorn

    async def app(scope, receive, send):
        raise AssertionError("nobody asks")

    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="warning"))
    late = threading.Timer(10, setattr, (server, "should_exit", True))  # else one that heard nothing would run on
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with socket.create_server(("127.0.0.1", 0)) as sock, listen.ending(server):
        late.start()
        os.kill(os.getpid(), number)
        server.run(sockets=[sock])
        assert late.is_alive()
    late.cancel()
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_port_that_is_taken_is_one_line(capsys):
    from twigvlm.serving.__main__ import main

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["--port", port, "--device", "cpu"]) == 1
    said = capsys.readouterr()
    assert said.out == "" and "Traceback" not in said.err
    assert (
        said.err.splitlines()[-1]
        == f"error: 127.0.0.1:{port} is taken by another program; choose another --port (0 takes a free one)"
    )


def test_flags_that_cannot_be(capsys):
    from twigvlm.serving.__main__ import main

    for flags, part in ((["--max-batch", "0"], "--max-batch is 0; 1 or more"), (["-R", "9999"], "legal is 36 to 432")):
        assert main(["--port", "0", "--device", "cpu", *flags]) == 2
        assert part in capsys.readouterr().err


SETTINGS = [
    ({"port": 70000}, "--port is 70000; 0 to 65535"),
    ({"max_queue": 0}, "--max-queue is 0; 1 or more"),
    ({"max_wait_ms": -1.0}, "--max-wait-ms is -1.0"),
    ({"timeout": 0.0}, "--timeout is 0.0"),
    ({"timeout": float("nan")}, "--timeout is nan"),
    ({"max_body": 0.0}, "--max-body is 0.0"),
    ({"grace": -1.0}, "--grace is -1.0"),
    ({"api_key": ""}, "--api-key is empty"),
    ({"api_key": "schlüssel"}, "printable ASCII"),
    ({"model_name": " "}, "--model-name is ' '"),
]


@pytest.mark.parametrize(("given", "part"), SETTINGS)
def test_settings_that_cannot_be(given, part):
    with pytest.raises(twigvlm.InputError, match=part):
        ServerSettings(**given)


def test_the_key_may_stand_in_the_environment(monkeypatch):
    monkeypatch.setenv("TWIGVLM_API_KEY", "secret")
    assert ServerSettings().key == b"secret" and ServerSettings(api_key="other").key == b"other"
    monkeypatch.setenv("TWIGVLM_API_KEY", "")
    assert ServerSettings().key is None


@pytest.mark.parametrize(("host", "local"), [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False), ("10.1.2.3", False), ("example.com", False)])  # fmt: skip
def test_who_can_reach_it(host, local):
    assert ServerSettings(host=host).local == local


def test_ports():
    with listen.bind(ServerSettings(port=0)) as sock:
        port = sock.getsockname()[1]
        assert listen.address(sock) == f"http://127.0.0.1:{port}"
        with pytest.raises(
            twigvlm.RunError, match=f"127.0.0.1:{port} is taken by another program; choose another --port"
        ):
            listen.bind(ServerSettings(port=port))
    for host in ("no.such.host.invalid", "203.0.113.7", "a b"):
        with pytest.raises(twigvlm.InputError, match="no address of this machine"):
            listen.bind(ServerSettings(host=host, port=0))


@pytest.mark.slow
def test_the_page_does_what_it_says(server, capsys, monkeypatch):
    """docs/serving.md: the server as it starts there, curl and OpenAI's client as they ask there."""
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    start, ask = re.findall(r"```bash\n(.*?)```", page, flags=re.S)
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.S)
    command = next(line for line in start.splitlines() if line.startswith("python")).partition("#")[0].split()
    assert command == ["python", "-m", "twigvlm.serving"]
    here = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 300}
    out = subprocess.run(["bash", "-c", ask.replace("http://127.0.0.1:8000", server)], **here)
    assert out.returncode == 0 and out.stdout.rstrip().endswith("data: [DONE]"), out.stdout + out.stderr
    monkeypatch.chdir(ROOT)
    exec(compile(code.replace("http://127.0.0.1:8000", server), "the page", "exec"), {})
    assert "objects" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        serving.parse(["--help"])
    flags = set(re.findall(r"`(--[\w-]+)`? ?", page))
    assert {"--max-queue", "--timeout", "--max-body", "--grace"} <= flags


@pytest.mark.slow
def test_the_benchmark_measures(tmp_path, capsys):
    file = tmp_path / "serving.json"
    flags = [
        "--random",
        "64x8",
        "-R",
        "144",
        "--clients",
        "1",
        "4",
        "--requests",
        "8",
        "--tokens",
        "4",
        "--device",
        "cpu",
        "--max-wait-ms",
        "50",
    ]
    assert benchmark.main([*flags, "--out", str(file), "--json"]) == 0
    facts = json.loads(file.read_text())
    assert [(row["clients"], row["answered"]) for row in facts["rows"]] == [
        (1, "one by one"),
        (4, "one by one"),
        (4, "together"),
    ]
    assert all(row["tokens/s"] > 0 and row["first token s median"] <= row["answer s median"] for row in facts["rows"])
    assert facts["rows"][1]["rows a batch"] == 1 < facts["rows"][2]["rows a batch"] <= 4
    assert facts["rows"][0]["x one by one"] == 1 and "commit" in facts
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == facts


@pytest.mark.parametrize(("flags", "part"), [(["--requests", "0"], "--requests is 0"), (["--clients", "0"], "--clients are 0"), (["--random", "7"], "random shape")])  # fmt: skip
def test_benchmark_flags_that_cannot_be(flags, part, capsys):
    assert benchmark.main(flags) == 2
    assert part in capsys.readouterr().err
