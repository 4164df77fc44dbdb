"""The page's server: what it answers, whom it refuses, and that a reader who leaves frees the worker."""

from __future__ import annotations

import http.client
import io
import json
import re
import socket
import time

import pytest
from conftest import ROOT
from PIL import Image
from weblab import Scripted, ask, file_of, model, run, serving, spelt, wish

from twigvlm.decoding import Step
from twigvlm.prompt.template import decode
from twigvlm.web import __main__ as program
from twigvlm.web.guard import LARGEST, POLICY
from twigvlm.web.pictures import Pictures
from twigvlm.web.settings import PageSettings

STATIC = ROOT / "twigvlm" / "web" / "static"


@pytest.fixture(scope="module")
def place():
    with serving() as address:
        yield address


def told(body: bytes) -> str:
    """The one line of an error."""
    facts = json.loads(body)
    assert set(facts) == {"error"} and "\n" not in facts["error"] and "Traceback" not in facts["error"]
    return facts["error"]


# ---------------------------------------------------------------------- the page


def test_page_and_its_files(place):
    status, heads, body = ask(place, "/")
    assert status == 200 and heads["content-type"].startswith("text/html") and b"<title>TwigVLM" in body
    for file in STATIC.rglob("*.*"):
        status, heads, found = ask(place, f"/static/{file.relative_to(STATIC).as_posix()}")
        assert status == 200 and found == file.read_bytes(), file
        assert heads["content-security-policy"] == POLICY and heads["x-content-type-options"] == "nosniff"


def test_page_needs_nothing_from_elsewhere():
    page = (STATIC / "index.html").read_text(encoding="utf-8")
    assert "style=" not in page and "<style" not in page and " onclick" not in page
    assert page.count("<script") == page.count("<script src=") + page.count('<script type="module" src=')
    for file in [*STATIC.glob("*.html"), *STATIC.rglob("*.js"), *STATIC.rglob("*.css")]:
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text and "https:" not in text and "//cdn" not in text, file
        assert "innerHTML" not in text and "eval(" not in text, file


def test_what_the_page_names_is_there():
    page = (STATIC / "index.html").read_text("utf-8")
    named = re.findall(r'(?:src|href)="/?(static/[^"]+)"', page)
    assert named and all((STATIC.parent / name).is_file() for name in named)


def test_about(place):
    facts = json.loads(ask(place, "/api/about")[2])
    assert (facts["V"], facts["L"], facts["K"], facts["T"]) == (16, 6, 2, 2) and facts["twig"]
    assert len(facts["samples"]) == 6 and {"twig", "fastv", "sparsevlm"} <= {m["name"] for m in facts["methods"]}
    schema = json.loads(ask(place, "/openapi.json")[2])
    assert {"/api/run", "/api/pictures", "/api/plan", "/api/about"} <= schema["paths"].keys()
    assert ask(place, "/docs")[0] == 404, "its files would come from elsewhere"


def test_plan(place):
    def plan(method, R):
        status, _, body = ask(place, f"/api/plan?method={method}&R={R}")
        return status, json.loads(body)

    status, found = plan("twig", 6)
    assert status == 200 and len(found["layers"]) == 6 and found["layers"][0] == 16 and found["reason"] is None
    assert sum(found["layers"]) / 6 == pytest.approx(found["R"])
    status, found = plan("twig", 1)
    assert status == 200 and found["layers"] is None and "legal is" in found["reason"]
    status, found = plan("nonsense", 6)
    assert status == 400 and "known methods" in found["error"]
    status, found = plan("fastv", "many")
    assert status == 422 and "R is 'many'" in found["error"]


# ---------------------------------------------------------------------- pictures


def show(place, data: bytes) -> tuple[dict, Image.Image]:
    status, _, body = ask(place, "/api/pictures", data)
    assert status == 201, body
    facts = json.loads(body)
    return facts, Image.open(io.BytesIO(ask(place, f"/api/pictures/{facts['id']}")[2]))


def test_pictures_are_shown_upright_as_the_model_sees_them(place):
    tall = Image.new("RGB", (40, 80), "red")
    tall.paste("blue", (0, 0, 40, 20))  # above
    turned = tall.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    facts, seen = show(place, file_of(turned, exif=exif.tobytes()))
    assert (facts["width"], facts["height"]) == (40, 80) and seen.size == (80, 80)
    mean = tuple(int(255 * m) for m in model().processor.image_processor.image_mean)
    assert seen.getpixel((40, 5)) == (0, 0, 255) and seen.getpixel((40, 60)) == (255, 0, 0)
    assert seen.getpixel((2, 40)) == mean == seen.getpixel((77, 40)), "padded with the mean colour"
    _, grey = show(place, file_of(Image.new("L", (30, 30), 77)))
    assert grey.mode == "RGB" and grey.getpixel((3, 3)) == (77, 77, 77)
    _, clear = show(place, file_of(Image.new("RGBA", (30, 30), (0, 0, 0, 0))))
    assert clear.getpixel((3, 3)) == (255, 255, 255)


def test_a_model_that_cuts_shows_the_middle():
    pictures = Pictures(False, (0, 0, 0))
    wide = Image.new("RGB", (90, 30), "red")
    wide.paste("blue", (30, 0, 60, 30))
    seen = Image.open(io.BytesIO(pictures.seen(pictures.add(file_of(wide)))))
    assert seen.size == (30, 30) and set(seen.getdata()) == {(0, 0, 255)}


@pytest.mark.parametrize(
    ("data", "status", "words"),
    [
        (b"", 400, "0 bytes"),
        (b"no picture", 400, "PNG, JPEG"),
        (file_of(Image.effect_noise((64, 64), 90))[:900], 400, "damaged"),
        (file_of(Image.new("1", (20_000, 10))), 400, "smaller"),
    ],
)
def test_what_is_no_picture(place, data, status, words):
    found, _, body = ask(place, "/api/pictures", data, method="POST")
    assert found == status and words in told(body)


def test_old_pictures_go(monkeypatch):
    monkeypatch.setattr("twigvlm.web.pictures.ROOM", 3 * 100 * 100 * 2)
    pictures = Pictures(True, (0, 0, 0))
    first, second, third = (pictures.add(file_of(Image.new("RGB", (100, 100), c))) for c in ("red", "green", "blue"))
    assert pictures.find(first.name) is None and pictures.find(second.name) and pictures.find(third.name)


# ---------------------------------------------------------------------- who may ask


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "[::2]", "10.0.0.1"])
def test_foreign_names_are_refused(place, host):
    status, _, body = ask(place, "/api/about", Host=host)
    assert status == 421 and "--allow-host" in told(body)


def test_known_names_are_let_in(place):
    port = place.split(":")[1]
    for host in (f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}", f"LOCALHOST:{port}"):
        assert ask(place, "/api/about", Host=host)[0] == 200, host
    assert PageSettings(host="0.0.0.0").welcomes("192.168.1.7") and not PageSettings(host="0.0.0.0").welcomes("a.b")
    assert PageSettings(allow_host=["box.lan"]).welcomes("Box.lan") and not PageSettings().welcomes("box.lan")
    assert PageSettings(host="mine").welcomes("mine")


@pytest.mark.parametrize(
    "heads",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Origin": "http://127.0.0.1:1"},
    ],
)
def test_other_sites_may_not_post(place, heads):
    for path in ("/api/run", "/api/pictures"):
        status, _, body = ask(place, path, wish(), **heads)
        assert status == 403 and "site" in told(body)


def test_its_own_page_may_post(place):
    body = file_of(Image.new("RGB", (9, 9)))
    assert ask(place, "/api/pictures", body, Origin=f"http://{place}", Sec_Fetch_Site="same-origin")[0] == 201


def test_large_bodies_are_refused(place):
    link = http.client.HTTPConnection(place, timeout=20)
    link.putrequest("POST", "/api/pictures")
    link.putheader("Content-Length", str(LARGEST + 1))
    link.endheaders()
    answer = link.getresponse()
    assert answer.status == 413 and "20 MB" in told(answer.read())
    link.close()
    block = b"x" * 2**20

    def unmeasured():
        yield from [block] * (LARGEST // 2**20 + 2)

    link = http.client.HTTPConnection(place, timeout=20)
    link.request("POST", "/api/run", unmeasured(), {"Content-Type": "application/json"}, encode_chunked=True)
    answer = link.getresponse()
    assert answer.status == 413 and "20 MB" in told(answer.read())
    link.close()


# ---------------------------------------------------------------------- runs


@pytest.mark.parametrize(
    ("more", "status", "words"),
    [
        ({"question": "  "}, 400, "question is empty"),
        ({"question": "a" * 5000}, 422, "question is"),
        ({"question": "a b " * 900}, 400, "context"),
        ({"method": "nonsense", "R": 6}, 400, "known methods"),
        ({"method": "twig"}, 400, "R is missing"),
        ({"method": "twig", "R": 1}, 400, "legal is"),
        ({"method": "twig", "R": -3.5}, 400, "legal is"),
        ({"method": "sparsevlm:version=9", "R": 6}, 400, "version"),
        ({"method": "cdpruner:text_tower=/etc/passwd", "R": 6}, 400, "may not ask"),
        ({"method": "visionzip*:projector=/root/secret", "R": 6}, 400, "may not ask"),
        ({"method": "x" * 3000, "R": 6}, 400, "letters"),
        ({"draft_length": -1}, 422, "draft_length is -1; 0 (no drafts) to 256"),
        ({"draft_length": 10**9}, 422, "draft_length is 1000000000; 0"),
        ({"draft_length": "9" * 5000}, 422, "draft_length is 999"),
        ({"tree": "9" * 5000 + ",1,1,1"}, 400, "four whole numbers"),
        ({"max_new_tokens": 10**400}, 422, "max_new_tokens is 1000"),
        ({"draft_length": "many"}, 422, "draft_length is many; 0 (no drafts) to 256, or auto"),
        ({"tree": "1,2"}, 400, "tree"),
        ({"max_new_tokens": 0}, 422, "max_new_tokens is 0"),
        ({"seed": -1}, 422, "seed is -1; 0 to"),
        ({"max_new_tokens": 10**9}, 422, "max_new_tokens"),
        ({"picture": "gone"}, 404, "not here"),
        ({"picture": "../../../etc/passwd"}, 404, "not here"),
        ({"surprise": 1}, 422, "surprise"),
        ({"R": "NaN", "method": "twig"}, 400, "R is nan"),
    ],
)  # fmt: skip
def test_runs_that_cannot_be(place, more, status, words):
    found, _, body = ask(place, "/api/run", wish(**more))
    error = told(body)
    assert found == status and words.lower() in error.lower(), error
    assert str(ROOT) not in error and "/root" not in error and len(error) < 600


@pytest.mark.parametrize(
    ("path", "method", "body", "status"),
    [("/api/run", "POST", b"{", 422), ("/api/run", "POST", b"[]", 422), ("/api/run", "GET", None, 405),
     ("/nowhere", "GET", None, 404), ("/static/../app.py", "GET", None, 404), ("/api/pictures/none", "GET", None, 404)],
)  # fmt: skip
def test_other_nonsense(place, path, method, body, status):
    found, _, said = ask(place, path, body, method=method, Content_Type="application/json")
    assert found == status and told(said)


@pytest.mark.parametrize(
    ("method", "manner"),
    [("twig", {"draft_length": 4}), ("twig", {"tree": "2,2,3,6"}), ("unpruned", {"draft_length": 0}),
     ("fastv", {"draft_length": 0}), ("visionzip", {"draft_length": 4}), ("random", {"draft_length": 4})],
)  # fmt: skip
def test_a_run_is_what_generate_gives(place, method, manner):
    vlm = model()
    manner = manner | {"seed": 5}
    lines = run(place, method=method, R=8, check=True, **manner)
    kinds = [line["event"] for line in lines]
    drafts = manner.get("draft_length") != 0
    assert kinds[:2] == ["queued", "started"] and kinds[-1] == ("checked" if drafts else "done")
    options = {"retained_tokens": 8.0, "pruning": method} if method != "unpruned" else {}
    inputs = vlm.prepare(Pictures(True, (0, 0, 0)).find("scene-1").image, "what?")
    out = vlm.generate(**inputs, **options, max_new_tokens=8, traced=True, **manner)
    steps = [line for line in lines if line["event"] == "step"]
    done = next(line for line in lines if line["event"] == "done")
    assert done["text"] == decode(vlm.tokenizer, out.tokens[0]).strip()
    assert done["kept"] == (None if out.kept is None else out.kept[0].tolist())
    accepted = sum(step["accepted"] for step in steps)
    assert accepted == out.stats.accepted == done["figures"]["accepted"]
    if out.scores is not None:
        assert done["scores"] == pytest.approx(out.scores[0].tolist(), rel=1e-4)
    pieces = [piece for step in steps for piece in step["pieces"]] + done["rest"]
    assert "".join(piece["text"] for piece in pieces).strip() == done["text"]
    assert all(piece["probability"] is None for piece in pieces if not piece["drafted"])
    assert all(0 < piece["probability"] <= 1 for piece in pieces if piece["drafted"])
    assert all(0 < piece["believed"] <= 1 for step in steps for piece in step["pieces"])
    split, figures = done["figures"]["split"], done["figures"]
    assert sum(split.values()) == pytest.approx(figures["seconds"], rel=1e-6) and all(v >= 0 for v in split.values())
    assert (split["draft"] > 0) == bool(sum(step["drafted"] for step in steps))
    assert [s["at"] for s in steps] == sorted(s["at"] for s in steps) and figures["first"] == steps[0]["at"]
    if drafts:
        assert lines[-1]["same"] is True


def test_without_a_twig():
    with serving(vlm=model(twig=False)) as place:
        facts = json.loads(ask(place, "/api/about")[2])
        assert not facts["twig"] and not next(m for m in facts["methods"] if m["name"] == "twig")["possible"]
        assert run(place, method="fastv", R=8)[-1]["event"] == "done"
        status, _, body = ask(place, "/api/run", wish(method="twig", R=8))
        assert status == 400 and "needs a twig" in told(body)
        assert "needs a twig" in json.loads(ask(place, "/api/plan?method=twig&R=8")[2])["reason"]


def test_a_difference_is_told(place, monkeypatch):
    """The badge is no ornament: where plain decoding writes something else, it says so."""
    steps = [Step([], 0, [token]) for token in spelt("abc")]
    engine = Scripted(steps, pause=0)
    with serving(engine) as address:
        original = engine.submit

        def submit(ask, listener):
            if ask.options["draft_length"] == 0:
                engine.steps = steps[:2]
            return original(ask, listener)

        monkeypatch.setattr(engine, "submit", submit)
        last = run(address, check=True)[-1]
    assert last == {"event": "checked", "same": False, "differs_at": 2, "tokens": 2}


def test_letters_are_whole():
    text = "😀 漢字 <script>alert(1)</script> é"
    with serving(Scripted([Step([], 0, [t]) for t in spelt(text)], pause=0)) as place:
        lines = run(place, draft_length=0)
    pieces = [piece["text"] for line in lines if line["event"] == "step" for piece in line["pieces"]]
    assert "".join(pieces) == text == lines[-1]["text"] and "😀" in pieces and "漢" in pieces


def test_a_letter_that_was_never_finished_is_told_at_the_end():
    with serving(Scripted([Step([], 0, [t]) for t in spelt("a😀")[:-1]], pause=0)) as place:
        done = run(place, draft_length=0)[-1]
    assert [piece["text"] for piece in done["rest"]] == ["\ufffd"] and done["text"] == "a\ufffd"


def open_run(place: str, **more) -> socket.socket:
    """A reader that can be cut off."""
    host, port = place.split(":")
    body = json.dumps(wish(**more)).encode()
    link = socket.create_connection((host, int(port)))
    head = f"POST /api/run HTTP/1.1\r\nHost: {place}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    link.sendall(head.encode() + body)
    return link


def heard(link: socket.socket, what: bytes, before: bytes = b"") -> bytes:
    """All that comes until `what` is among it."""
    link.settimeout(10)
    while what not in before:
        before += link.recv(4096)
    return before


def until(true, seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "in vain"
        time.sleep(0.01)


LONG = [Step([], 0, [token]) for token in spelt("word " * 8)]


def test_who_leaves_frees_the_worker_within_a_step():
    engine = Scripted(LONG, pause=0.05)
    with serving(engine) as place:
        link = open_run(place, draft_length=0)
        until(lambda: engine.tickets and engine.tickets[0].told >= 2)
        link.close()
        until(lambda: engine.tickets[0].cancelled, 1.0)
        before = engine.tickets[0].told
        assert engine.tickets[0].result(5).cancelled and engine.tickets[0].told <= before + 1
        engine.pause = 0
        assert run(place, draft_length=0, check=True)[-1]["event"] == "done", "and the next one is answered"


def test_who_waits_is_told_the_place_and_may_leave():
    engine = Scripted(LONG, pause=0)
    engine.held_at = 3
    with serving(engine) as place:
        first = open_run(place, draft_length=0)
        until(lambda: engine.tickets and engine.tickets[0].told)
        second, third = open_run(place, draft_length=0), None
        until(lambda: len(engine.queue) == 1)
        third = open_run(place, draft_length=0)
        until(lambda: len(engine.queue) == 2)
        heard(second, b'"before": 1')
        second.close()
        until(lambda: len(engine.queue) == 1)
        told = heard(third, b'"before": 1')
        assert b'"before": 2' in told and b"started" not in told
        engine.go.set()
        heard(third, b"started", told)
        first.close()
        third.close()


def test_a_full_queue_says_so():
    engine = Scripted(LONG, pause=0.05, room=1)
    with serving(engine) as place:
        links = [open_run(place, draft_length=0)]
        until(lambda: engine.tickets and engine.tickets[0].told)
        links.append(open_run(place, draft_length=0))
        until(lambda: engine.queue)
        status, heads, body = ask(place, "/api/run", wish())
        assert status == 503 and int(heads["retry-after"]) > 0 and "later" in told(body)
        for link in links:
            link.close()


def test_what_nobody_foresaw_is_one_line(monkeypatch, caplog):
    class Broken(Scripted):
        def submit(self, ask, listener):
            raise ZeroDivisionError(f"in {ROOT}/secret.py")

    with serving(Broken([])) as place:
        status, _, body = ask(place, "/api/run", wish())
    assert status == 500 and "ZeroDivisionError" in told(body) and "secret" not in told(body)


# ---------------------------------------------------------------------- the program


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--port", "70000"], 2, "--port is 70000"),
        (["--host", "no.such.host.invalid"], 2, "no such host"),
        (["--host", "192.0.2.1", "--port", "0"], 2, "no address of this machine"),
        (["--base-model", "nowhere/nothing-at-all"], None, "nowhere/nothing-at-all"),
    ],
)
def test_program_refuses(words, code, said, capsys):
    found = program.main([*words, "--device", "cpu"])
    error = capsys.readouterr().err
    assert (found == code if code else found in (1, 2)) and said in error and error.count("\n") == 1


def test_a_port_that_is_taken(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert program.main(["--port", str(port), "--device", "cpu"]) == 1
    error = capsys.readouterr().err
    assert f"--port {port}: taken" in error and "choose another" in error and error.count("\n") == 1


def test_program_explains_itself(capsys):
    with pytest.raises(SystemExit, match="0"):
        program.main(["--help"])
    text = capsys.readouterr().out
    assert all(flag in text for flag in ("--base-model", "--twig-block", "--host", "--port", "--allow-host", "--open"))
