"""Chat completions as OpenAI has them: the model's own answers, whole or as a stream, and what is refused, by its name."""

from __future__ import annotations

import json
import re
import threading

import pytest

from serving.conftest import CHAT, Client, data_url, desk_of, picture, shown
from twigvlm.config import GenerationSettings
from twigvlm.prompt.template import converse
from twigvlm.serving.chat.reply import event
from twigvlm.serving.engine import Ask, Written
from twigvlm.serving.settings import ServerSettings

TEXT = {"type": "text", "text": "What is red?"}


def user(*parts) -> dict:
    return {"role": "user", "content": list(parts)}


def fault(found, status: int) -> dict:
    """The error of an answer, in OpenAI's shape."""
    assert found.status_code == status, found.text
    assert found.headers["content-type"] == "application/json"
    assert found.json().keys() == {"error"}
    error = found.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert "\n" not in error["message"] and "Traceback" not in error["message"]
    return error


# ---------------------------------------------------------------------- answers


def test_an_answer_is_the_models(client, vlm):
    told = client.chat([user(TEXT, *shown(picture()))], twig={"tokens": 2}).json()
    alone = vlm.answer(picture(), TEXT["text"], retained_tokens=2.0, max_new_tokens=12)
    inputs = vlm.prepare(picture(), TEXT["text"])
    out = vlm.generate(**inputs, retained_tokens=2.0, max_new_tokens=12)
    (choice,) = told["choices"]
    assert choice["message"] == {"role": "assistant", "content": alone, "refusal": None} and choice["index"] == 0
    assert told["object"] == "chat.completion" and told["model"] == "tiny" and told["id"].startswith("chatcmpl-")
    prompt, written = inputs["input_ids"].shape[1], len(out.tokens[0])
    assert told["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
    }
    assert choice["finish_reason"] == ("length" if written == 12 else "stop")
    twig = told["twig"]
    assert twig["kept"] == out.kept[0].tolist() and twig["visual_kept"] == len(twig["kept"])
    assert twig["visual_tokens"] == vlm.config.V
    assert (twig["drafted"], twig["accepted"]) == (out.stats.drafted, out.stats.accepted)
    assert twig["time_to_first_token"] > 0 and twig["tokens_per_second"] > 0


@pytest.mark.parametrize("counted", [False, True])
def test_a_stream_is_the_same_answer(client, counted):
    said = [user(*shown(picture()), TEXT)]
    whole = client.chat(said).json()
    more = {"stream_options": {"include_usage": True}} if counted else {}
    chunks = client.stream(said, **more)
    if counted:
        *chunks, last = chunks
        assert last["choices"] == [] and last["usage"] == whole["usage"]
        assert all(chunk["usage"] is None for chunk in chunks)
    else:
        assert all("usage" not in chunk for chunk in chunks)
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert text == whole["choices"][0]["message"]["content"] and len(chunks) > 3
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + [whole["choices"][0]["finish_reason"]]
    assert chunks[-1]["twig"]["kept"] == whole["twig"]["kept"] and chunks[-1]["choices"][0]["delta"] == {}
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"} and len({c["id"] for c in chunks}) == 1


def asked(desk, messages) -> list[int]:
    """The prompt that these messages become."""
    from twigvlm.serving.chat import messages as reader

    return desk.vlm.prompts.ids(reader.read(messages).talk)


def test_pictures_stand_where_the_model_learnt_them(desk, vlm):
    """In front of the question, wherever clients put them; where the text speaks of each in turn, where it does."""
    one, two = shown(picture()), shown(picture(), picture(1))
    first = vlm.prompts.ids(converse([], "What is red?", 1))
    assert asked(desk, [user(TEXT, *one)]) == asked(desk, [user(*one, TEXT)]) == first
    assert (
        asked(desk, [user(*two, TEXT)]) == asked(desk, [user(TEXT, *two)]) == asked(desk, [user(two[0], TEXT, two[1])])
    )
    assert asked(desk, [user(*two, TEXT)]) == vlm.prompts.ids(converse([], "What is red?", 2))
    parts = [{"type": "text", "text": "in"}, {"type": "image"}, {"type": "text", "text": "or"}, {"type": "image"}]
    here = [{"type": "text", "text": "in"}, two[0], {"type": "text", "text": "or"}, two[1]]
    assert asked(desk, [user(*here)]) == vlm.prompts.ids(converse([], parts, 2))


def test_turns_and_a_system_message(desk, client, vlm):
    history = [("What is red?", "the sun"), ("and a?", "er")]
    said = [user(*shown(picture()), TEXT), {"role": "assistant", "content": "the sun"}]
    said += [{"role": "user", "content": "and a?"}, {"role": "assistant", "content": [{"type": "text", "text": "er"}]}]
    said += [{"role": "user", "content": "the end?"}]
    assert asked(desk, said) == vlm.prompts.ids(converse(history, "the end?", 1))
    assert client.text(said) == vlm.answer(picture(), "the end?", history, retained_tokens=2.0, max_new_tokens=12)
    for role in ("system", "developer"):
        system = {"role": role, "content": "red"}
        ids = vlm.prompts.ids(converse([{"role": "system", "content": "red"}], "What?", 0))
        assert asked(desk, [system, {"role": "user", "content": "What?"}]) == ids
    both = [{"role": "system", "content": "a"}, {"role": "developer", "content": "b"}, user(TEXT)]
    assert asked(desk, both) == asked(desk, [{"role": "system", "content": "a\nb"}, user(TEXT)])


def test_a_mark_in_a_text_is_a_word(desk, client):
    """`<image>` without a picture is what somebody wrote."""
    ids = asked(desk, [{"role": "user", "content": "What is <image>?"}])
    assert desk.vlm.image_token_id not in ids
    assert client.chat("What is <image>?").status_code == 200


def test_an_answer_comes_back_as_it_was_sent(client):
    """Clients append the message that they got, with all its empty keys."""
    message = client.chat("What?").json()["choices"][0]["message"]
    message = {**message, "content": message["content"] or "a"}
    more = {"annotations": [], "audio": None, "function_call": None, "tool_calls": None}
    said = [{"role": "user", "content": "What?"}, message | more, {"role": "user", "content": "and?"}]
    assert client.chat(said).status_code == 200


@pytest.mark.parametrize("form", ["object", "text", "detail", "jpeg", "spaces", "no-kind", "percent"])
def test_ways_to_send_a_picture(client, vlm, form):
    url = data_url(picture(), "jpeg" if form == "jpeg" else "png")
    if form == "spaces":
        head, _, content = url.partition(",")
        url = head + "," + "\n".join(re.findall(".{1,40}", content)).rstrip("=")
    if form == "no-kind":
        url = url.replace("image/png", "").upper().replace(url.partition(",")[2].upper(), url.partition(",")[2])
    if form == "percent":
        url = url.replace("+", "%2B").replace("/", "%2F").replace("image%2Fpng", "image/png")
    part = {"type": "image_url", "image_url": url if form == "text" else {"url": url}}
    if form == "detail":
        part["image_url"]["detail"] = "low"
    found = client.text([user(part, TEXT)])
    if form != "jpeg":
        assert found == vlm.answer(picture(), TEXT["text"], retained_tokens=2.0, max_new_tokens=12)


def test_the_request_has_the_last_word(client, vlm):
    said = [user(*shown(picture()), TEXT)]

    def same(body: dict, **options) -> None:
        alone = vlm.answer(picture(), TEXT["text"], **{"retained_tokens": 2.0, "max_new_tokens": 12} | options)
        assert client.text(said, **body) == alone

    same({"max_tokens": 3}, max_new_tokens=3)
    same({"max_completion_tokens": 3, "max_tokens": 3}, max_new_tokens=3)
    same({"twig": {"tokens": None}}, retained_tokens=None)
    same({"twig": {"tokens": 3, "method": "fastv", "draft": 0}}, retained_tokens=3.0, pruning="fastv", draft_length=0)
    same({"twig": {"tree": [2, 2, 2, 4], "query": "text"}}, tree="2,2,2,4", query="text")
    same({"twig": {"tree": "2,2,2,4"}}, tree="2,2,2,4")
    hot = {"do_sample": True, "temperature": 0.9, "top_p": 0.8, "seed": 7}
    same({"temperature": 0.9, "top_p": 0.8, "seed": 7}, **hot)
    same({"temperature": 0.9, "seed": 7, "twig": {"top_k": 3}}, do_sample=True, temperature=0.9, top_k=3, seed=7)
    same({"temperature": 0, "top_p": 0.5, "seed": -1})
    same({"temperature": 1, "top_p": 0})
    neutral = {"n": 1, "logprobs": False, "tools": None, "logit_bias": {}, "presence_penalty": 0.0, "user": "me"}
    same({**neutral, "response_format": {"type": "text"}, "stream_options": None, "stop": None, "twig": None})


def test_an_answer_ends_with_the_context(vlm):
    from twigvlm.serving.chat import completion, request

    body = {"model": "tiny", "messages": [{"role": "user", "content": "What?"}], "max_tokens": 10**6}
    wanted = request.read(body, "tiny", {**GenerationSettings().__dict__})
    wish = completion.ask(vlm, wanted, completion.prompt(vlm, wanted), [])
    assert len(wish.ids) + wish.options["max_new_tokens"] == vlm.trunk.context


def test_what_the_server_says_goes_behind_what_the_client_says(vlm):
    from twigvlm.serving.chat import options
    from twigvlm.serving.desk import Desk
    from twigvlm.serving.settings import ServerSettings

    desk = Desk(vlm, {"tree": "2,2,2,4", "do_sample": True, "temperature": 0.5, "top_p": 0.5}, ServerSettings())
    desk.close()
    assert options.read({}, desk.defaults)["tree"] == "2,2,2,4"
    found = options.read({"twig": {"draft": 3}, "temperature": 0}, desk.defaults)
    assert (found["tree"], found["draft_length"], found["do_sample"], found["top_p"]) == (None, 3, False, None)


def test_stop_strings(client):
    said = "the red sun?"
    whole = client.text(said, max_tokens=24)
    assert len(whole) > 12
    for start in range(1, len(whole) - 4, 5):
        stop = whole[start : start + 3]
        expected = whole[: whole.index(stop)]
        found = client.chat(said, max_tokens=24, stop=["nowhere", stop]).json()
        assert found["choices"][0]["message"]["content"] == expected
        assert found["choices"][0]["finish_reason"] == "stop"
        chunks = client.stream(said, max_tokens=24, stop=stop, stream_options={"include_usage": True})
        assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1]) == expected
        assert chunks[-1]["usage"] == found["usage"]


# ---------------------------------------------------------------------- what is refused

PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
REFUSED = [
    ({"model": None}, 400, "model", "model is missing"),
    ({"model": 3}, 400, "model", "model is a number; a text"),
    ({"model": "gpt-4o"}, 404, "model", "this server has 'tiny'"),
    ({"messages": None}, 400, "messages", "messages is missing"),
    ({"messages": []}, 400, "messages", "has 0 entries"),
    ({"messages": "hi"}, 400, "messages", "messages is a text"),
    ({"messages": ["hi"]}, 400, "messages[0]", "is a text; an object"),
    ({"messages": [{"role": "user"}]}, 400, "messages[0].content", "is null"),
    ({"messages": [{"role": "user", "content": " "}]}, 400, "messages[0].content", "the question is empty"),
    ({"messages": [{"role": "user", "content": []}]}, 400, "messages[0].content", "an empty array"),
    ({"messages": [{"role": "tool", "content": "a"}]}, 400, "messages[0].role", '"tool"; one of system'),
    ({"messages": [{"content": "a"}]}, 400, "messages[0].role", "null; one of system"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, 400, "messages[0].role", "'user' is needed"),
    ({"messages": [{"role": "system", "content": "a"}]}, 400, "messages", "no user's message"),
    (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        400,
        "messages",
        "the last message is the assistant's",
    ),
    ({"messages": [{"role": "user", "content": "a"}] * 2}, 400, "messages[1].role", "'assistant' is needed"),
    (
        {"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]},
        400,
        "messages[1].role",
        "system messages begin",
    ),
    ({"messages": [{"role": "user", "content": "a", "x": 1}]}, 400, "messages[0].x", 'unknown key "x"'),
    ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, 400, "messages[0].name", "not supported"),
    ({"messages": [{"role": "system", "content": [PICTURE]}]}, 400, "messages[0].content[0].image_url.url", "users show"),
    ({"messages": [user({"type": "input_audio"})]}, 400, "messages[0].content[0].type", "input_audio"),
    ({"messages": [user({"type": "text"})]}, 400, "messages[0].content[0].text", "is null"),
    ({"messages": [user({"type": "image_url"})]}, 400, "messages[0].content[0].image_url", "is null"),
    (
        {"messages": [user({"type": "image_url", "image_url": {"url": "a", "detail": "ultra"}})]},
        400,
        "messages[0].content[0].image_url.detail",
        '"ultra"; auto or low or high',
    ),
    ({"stream": "yes"}, 400, "stream", "true or false"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options", "without a stream"),
    ({"stream": True, "stream_options": {"x": 1}}, 400, "stream_options.x", "known: include_usage"),
    ({"max_tokens": 0}, 400, "max_tokens", "from 1 to"),
    ({"max_tokens": 2.5}, 400, "max_tokens", "is 2.5; a whole number"),
    ({"max_tokens": True}, 400, "max_tokens", "is true; a whole number"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, 400, "max_tokens", "one limit under two names"),
    ({"temperature": 2.1}, 400, "temperature", "is 2.1; a number from 0 to 2"),
    *[({name: 10**400}, 400, name, f"{name} is 1000") for name in ("temperature", "top_p", "max_tokens", "seed")],
    *[({"twig": {name: -(10**400)}}, 400, f"twig.{name}", "is -1000") for name in ("tokens", "confidence", "draft")],
    ({"twig": {"tree": "9" * 5000 + ",1,1,1"}}, 400, "twig", "four whole numbers"),
    ({"temperature": "hot"}, 400, "temperature", '"hot"'),
    ({"top_p": -0.1}, 400, "top_p", "from 0 to 1"),
    ({"seed": 2**63}, 400, "seed", "a whole number from"),
    ({"seed": "a"}, 400, "seed", "a whole number from"),
    ({"stop": 3}, 400, "stop", "is 3; a text or up to 16"),
    ({"stop": [""]}, 400, "stop", "of 1 to 1000 letters"),
    ({"stop": ["a"] * 17}, 400, "stop", "up to 16"),
    ({"frobnicate": 1}, 400, "frobnicate", 'unknown parameter "frobnicate"; known: model, messages'),
    ({"twig": 3}, 400, "twig", "an object is needed"),
    ({"twig": {"R": 64}}, 400, "twig.R", "known: tokens, method, query, draft, tree, confidence"),
    ({"twig": {"tokens": 400}}, 400, "twig", "R is 400; legal is"),
    ({"twig": {"tokens": "64"}}, 400, "twig.tokens", "a number"),
    ({"twig": {"method": "magic"}}, 400, "twig.method", "known methods: twig, fastv"),
    ({"twig": {"method": "fastv:colour=red"}}, 400, "twig.method", "no setting 'colour'"),
    ({"twig": {"method": "visionzip*:projector=/etc"}}, 400, "twig.method", "names files"),
    ({"twig": {"method": "cdpruner:text_tower=a/b"}}, 400, "twig.method", "names files"),
    ({"twig": {"query": "all"}}, 400, "twig.query", "last or text"),
    ({"twig": {"draft": -1}}, 400, "twig.draft", "from 0 to 256"),
    ({"twig": {"tree": "3,2"}}, 400, "twig", "four whole numbers E,W,D,N"),
    ({"twig": {"tree": [1, "a"]}}, 400, "twig.tree", "a whole number"),
    ({"twig": {"tree": "2,2,2,4", "draft": 3}}, 400, "twig", "draft is 3; leave one of them away"),
    ({"twig": {"confidence": 1.5}}, 400, "twig.confidence", "from 0 to 1"),
    *[
        ({name: value}, 400, name, f"{name} is")
        for name, value in {
            "n": 2, "logprobs": True, "top_logprobs": 3, "tools": [], "tool_choice": "auto", "functions": [{}],
            "response_format": {"type": "json_object"}, "audio": {"voice": "a"}, "modalities": ["audio"],
            "logit_bias": {"1": 2}, "presence_penalty": 0.5, "frequency_penalty": 1, "store": True, "metadata": {"a": "b"},
        }.items()
    ],
]  # fmt: skip


@pytest.mark.parametrize(("change", "status", "param", "part"), REFUSED)
def test_refused(client, change, status, param, part):
    body = {"model": "tiny", "messages": [{"role": "user", "content": "What?"}], **change}
    error = fault(client("POST", CHAT, json={k: v for k, v in body.items() if v is not None}), status)
    assert error["param"] == param and part in error["message"], error
    assert error["type"] == "invalid_request_error"


BODIES = {
    b"": "the body is empty",
    b"{": "the body is not JSON",
    b"[]": "the body is an array; an object",
    b"3": "the body is a number",
    b'{"seed": NaN}': "NaN is no JSON number",
    b'{"a": "\xff"}': "the body is not UTF-8",
    b'{"a": ' + b"[" * 100_000: "nested too deeply",
    b'{"max_tokens": '
    + b"9" * 5000
    + b"}": "the body is not JSON (a number has 5000 digits, and at most 1000 are read)",
}


@pytest.mark.parametrize("body", BODIES)
def test_bodies_that_are_no_request(client, body):
    found = client("POST", CHAT, content=body, headers={"content-type": "application/json"})
    assert BODIES[body] in fault(found, 400)["message"]


def test_the_coldest_temperatures_are_greedy(client):
    """Numbers that a logit divided by them does not survive."""
    greedy = client.text(temperature=0)
    for heat in (1e-7, 1e-38, 1e-46, 5e-324):
        assert client.text(temperature=heat, seed=1) == greedy


def test_no_folder_of_this_machine_is_told(vlm):
    """Whatever the server's own flags name, and wherever that lies."""
    with desk_of(vlm) as desk:
        for spec in ("cdpruner:text_tower=/mnt/data/clip", "visionzip*:projector=/srv/some/where/proj"):
            desk.defaults["pruning"] = spec
            error = fault(Client(desk).chat([user(*shown(picture()), TEXT)]), 400)
            said = error["message"]
            assert "/mnt" not in said and "/srv" not in said and ("clip" in said or "proj" in said), said


@pytest.mark.slow
def test_slow_addresses_keep_nobody_else(vlm, monkeypatch):
    """However many are waited for, a question without a picture is answered; those end with their own time."""
    import concurrent.futures
    import time

    from twigvlm.serving.chat import pictures

    monkeypatch.setattr(pictures, "download", lambda *_, **__: time.sleep(9) or b"")
    slow = [
        user(TEXT, *[{"type": "image_url", "image_url": {"url": f"http://slow.example/{i}.png"}} for i in range(2)])
    ]
    with desk_of(vlm, allow_remote_images=True, timeout=6) as desk, concurrent.futures.ThreadPoolExecutor(6) as pool:
        client = Client(desk)
        pool.submit(client.text).result()  # in threads throughout: the main one may have an event loop of a browser's
        asked = [pool.submit(client.chat, slow) for _ in range(4)]
        time.sleep(0.2)
        start = time.monotonic()
        assert pool.submit(client.text).result()
        assert time.monotonic() - start < 5
        assert {found.result().status_code for found in asked} == {504}


def test_an_event_is_one_line_for_every_reader():
    said = event({"content": "a\u2028b\u2029c\x85d\n"})
    assert len(said.decode().splitlines()) == 2 and json.loads(said[6:])["content"] == "a\u2028b\u2029c\x85d\n"


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "10.0.0.1", ""])
def test_foreign_names_are_no_way_in(vlm, host):
    """Nor by a key, where one is needed: a browser does not know it."""
    with desk_of(vlm) as desk:
        error = fault(Client(desk)("GET", "/v1/models", headers={"host": host}), 421)
        assert "--api-key" in error["message"]
        for good in ("localhost:8000", "127.0.0.1", "[::1]:8000", "127.0.0.9:1"):
            assert Client(desk)("GET", "/v1/models", headers={"host": good}).status_code == 200
    for more in ({"host": "0.0.0.0"}, {"api_key": "abc"}):
        assert ServerSettings(**more).welcomes(host)


def test_half_characters(client):
    """JSON can write what no encoding can: in a question it is replaced, in an error it does no harm."""
    head = {"content-type": "application/json"}
    asked = b'{"model": "tiny", "messages": [{"role": "user", "content": "What is \\ud83d?"}]}'
    assert client("POST", CHAT, content=asked, headers=head).status_code == 200
    found = client("POST", CHAT, content=b'{"model": "\\ud83d", "messages": []}', headers=head)
    assert fault(found, 404)["param"] == "model"
    assert "unknown parameter" in fault(client("POST", CHAT, content=b'{"\\udc00": 1}', headers=head), 400)["message"]


PICTURES = {
    "": "is empty; a data URL is needed",
    "/etc/passwd": "is passwd; a data URL is needed",
    "file:///etc/passwd": "a data URL is needed",
    "data:image/png;base64": "its head ends with a comma",
    "data:image/png;base64,????": "is no base64",
    "data:image/png;base64,AAAA": "a picture of 3 bytes: not a picture",
    "data:image/png;base64,": "a picture of 0 bytes: not a picture",
    "data:text/plain;base64,AAAA": "is of type text/plain; an image is needed",
    data_url(picture())[:-400]: "damaged picture",
    "http://example.com/a.png": "this server fetches no pictures (it would with --allow-remote-images)",
}


@pytest.mark.parametrize("url", PICTURES)
def test_pictures_that_are_none(client, url):
    error = fault(client.chat([user({"type": "image_url", "image_url": {"url": url}}, TEXT)]), 400)
    assert error["param"] == "messages[0].content[0].image_url.url" and PICTURES[url] in error["message"], error
    assert len(error["message"]) < 400


def test_a_prompt_that_is_too_long(client, vlm, monkeypatch):
    """Known before a picture is opened."""
    monkeypatch.setattr("twigvlm.serving.chat.pictures.open_image", lambda _: pytest.fail("opened"))
    many = shown(*[picture()] * 300)
    error = fault(client.chat([user(*many, TEXT)]), 400)
    assert error["code"] == "context_length_exceeded" and "300 pictures of 4" in error["message"]
    assert fault(client.chat("the " * 2000), 400)["code"] == "context_length_exceeded"


# ---------------------------------------------------------------------- ways, keys, sizes


def test_other_ways(client):
    assert client("GET", "/v1/models").json()["data"][0]["id"] == "tiny"
    assert client("GET", "/v1/models/tiny").json()["object"] == "model"
    assert fault(client("GET", "/v1/models/gpt-4o"), 404)["code"] == "model_not_found"
    assert client("GET", "/health").json() == {"status": "ok", "model": "tiny", "waiting": 0, "running": 0}
    for method, path, status in (
        ("GET", CHAT, 405), ("DELETE", "/v1/models", 405), ("POST", "/health", 405), ("GET", "/", 404), ("GET", "/docs", 404),
        ("POST", "/v1/completions", 404), ("GET", "/v1/models/", 404), ("GET", "/v1/chat/completions/", 404),
    ):  # fmt: skip
        fault(client(method, path), status)
    assert client("GET", CHAT).headers["allow"] == "POST"
    page = client("GET", "/openapi.json").json()
    assert page["openapi"].startswith("3.") and CHAT in page["paths"]


def test_the_figures(client):
    client.chat([user(*shown(picture()), TEXT)])
    client.chat("What?", n=3)
    found = client("GET", "/metrics")
    assert found.headers["content-type"].startswith("text/plain")
    told = dict(line.rsplit(" ", 1) for line in found.text.splitlines() if not line.startswith("#"))
    assert told[f'twigvlm_requests_total{{path="{CHAT}",status="200"}}'] == "1.0"
    assert told[f'twigvlm_requests_total{{path="{CHAT}",status="400"}}'] == "1.0"
    assert float(told["twigvlm_completion_tokens_total"]) > 0 and float(told["twigvlm_drafted_tokens_total"]) > 0
    assert told["twigvlm_batch_size_count"] == "1.0" and told["twigvlm_queue_waiting"] == "0.0"
    for name in ("request", "first_token", "queue"):
        assert told[f"twigvlm_{name}_seconds_count"] == "1.0"


def test_a_key(vlm):
    with desk_of(vlm, api_key="secret") as desk:
        client = Client(desk)
        for head in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}, {"Authorization": "Basic secret"},
                     {"Authorization": "Bearer sécret".encode()}):  # fmt: skip
            for path in ("/v1/models", "/nowhere", CHAT):
                error = fault(client("GET", path, headers=head), 401)
                assert error["code"] == "invalid_api_key" and "secret" not in error["message"]
        assert client("GET", "/v1/models", headers={"Authorization": "Bearer secret"}).status_code == 200
        assert client("GET", "/health").status_code == client("GET", "/metrics").status_code == 200


def test_a_body_that_is_too_long(vlm):
    with desk_of(vlm, max_body=0.001) as desk:
        client = Client(desk)
        assert "longer than 1048 bytes" in fault(client.chat("a" * 2000), 413)["message"]

        async def pieces():  # without a length
            for _ in range(10**9):
                yield b" " * 100

        found = client("POST", CHAT, content=pieces(), headers={"content-type": "application/json"})
        assert fault(found, 413)["code"] == "body_too_large"
        assert client.chat("a").status_code == 200


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_json_says_that_it_is(client, kind):
    found = client("POST", CHAT, content=b"{}", headers={"content-type": kind} if kind else {})
    assert "send application/json" in fault(found, 415)["message"]


# ---------------------------------------------------------------------- the queue


class Held:
    """The worker, busy until it is let go."""

    def __init__(self, desk):
        self.reached, self.open = threading.Event(), threading.Event()
        ids = desk.vlm.prepare(None, "What?")["input_ids"][0].tolist()
        desk.engine.submit(Ask(ids, None, {"max_new_tokens": 2}), self._hold)

    def _hold(self, event) -> None:
        if isinstance(event, Written):
            self.reached.set()
            self.open.wait(20)

    def __enter__(self):
        assert self.reached.wait(20)

    def __exit__(self, *_fault):
        self.open.set()


def test_a_full_queue(vlm):
    with desk_of(vlm, max_queue=1) as desk, Held(desk):
        ids = desk.vlm.prepare(None, "What?")["input_ids"][0].tolist()
        desk.engine.submit(Ask(ids))
        for stream in (False, True):
            found = Client(desk).chat("What?", stream=stream)
            assert fault(found, 429)["code"] == "queue_full" and found.headers["retry-after"] == "1"


def test_as_many_as_may_come_in(vlm):
    with desk_of(vlm, max_queue=1, max_batch=1) as desk:
        with desk.admitted(), desk.admitted():
            assert "2 requests are being served" in fault(Client(desk).chat("What?"), 429)["message"]
        assert Client(desk).chat("What?").status_code == 200 and desk.open == 0


@pytest.mark.parametrize("stream", [False, True])
def test_too_late(vlm, stream):
    with desk_of(vlm, timeout=0.3) as desk, Held(desk):
        assert fault(Client(desk).chat("What?", stream=stream), 504)["code"] == "timeout"
        assert desk.engine.waiting == 0 and not desk.jobs


def test_after_the_end(vlm):
    with desk_of(vlm) as desk:
        desk.close()
        found = Client(desk).chat("What?")
        assert fault(found, 503)["code"] == "shutting_down" and found.headers["retry-after"]
        assert Client(desk)("GET", "/health").status_code == 503


def test_what_is_wrong_with_the_server_is_its_own_business(client, vlm, monkeypatch, capsys):
    monkeypatch.setattr(vlm, "generate", lambda *a, **k: 1 / 0, raising=False)
    error = fault(client.chat("What?"), 500)
    assert error["type"] == "server_error" and "zero" not in error["message"]
    assert "ZeroDivisionError" in capsys.readouterr().err
    monkeypatch.setattr(vlm, "pixels", lambda *a, **k: 1 / 0, raising=False)
    fault(client.chat([user(*shown(picture()), TEXT)]), 500)


def test_no_folder_of_this_machine_in_an_answer(vlm):
    with desk_of(vlm, model_name=None) as desk:
        client = Client(desk)
        assert "/" not in desk.model and str(vlm.base_name).endswith(desk.model)
        texts = [
            client.chat("What?", twig={"method": method}).text for method in ("mustdrop", "visionzip*", "cdpruner")
        ]
        assert all('"error"' in text and str(vlm.base_name) not in text for text in texts), texts
