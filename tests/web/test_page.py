"""The page in a real browser: what people see and do, with the mouse and without."""

# ruff: noqa: F811 (fixtures come from another file)
from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
from contextlib import contextmanager

import pytest
import warm
from browsing import chromium, tab, visit  # noqa: F401 (fixtures)
from conftest import ROOT
from PIL import Image
from weblab import Scripted, file_of, serving, spelt

from twigvlm.decoding import Step

pytestmark = pytest.mark.slow

FOUR = "#m=-unpruned&m=twig&m=fastv&m=-random&R=8&tokens=10"
SLOWLY = [Step([], 0, [token]) for token in spelt("one two three four five")]
ANSWER = "article[data-spec='{}'] .answer"


@pytest.fixture(scope="module")
def place():
    with serving() as address:
        yield address


@contextmanager
def scripted(steps, **more):
    engine = Scripted(steps, **more)
    with serving(engine) as address:
        yield address, engine


def done(page) -> None:
    page.wait_for_selector("#results[data-state=done]")


def texts(page, selector: str) -> list[str]:
    return page.locator(selector).all_text_contents()


def lines_of(page) -> list[list[dict]]:
    """What the server told in each run, from now on."""
    found: list[list[dict]] = []

    def note(answer) -> None:
        if answer.url.endswith("/api/run"):
            found.append(answer)

    page.on("response", note)
    return found


def said(answer) -> list[dict]:
    return [json.loads(line) for line in answer.body().decode().splitlines()]


def kept(page, spec: str) -> set[int]:
    """Cells of a canvas that are as bright as the picture, judged by its pixels."""
    canvas = page.locator(f"article[data-spec='{spec}'] canvas")
    data = canvas.evaluate("(c) => c.toDataURL()").split(",")[1]
    shown = Image.open(io.BytesIO(base64.b64decode(data))).convert("L")
    plain = page.locator("article[data-spec='unpruned'] canvas").evaluate("(c) => c.toDataURL()").split(",")[1]
    whole = Image.open(io.BytesIO(base64.b64decode(plain))).convert("L")
    side, cell = 4, shown.width // 4
    middle = [(i % side * cell + cell // 2, i // side * cell + cell // 2) for i in range(side**2)]
    return {i for i, at in enumerate(middle) if shown.getpixel(at) > 0.9 * whole.getpixel(at)}


# ---------------------------------------------------------------------- a run


def test_four_methods_side_by_side(place, visit):
    page = visit(place, FOUR + "&rejected=0")  # a flash would be among the words
    answers = lines_of(page)
    page.click("#run")
    done(page)
    assert len(answers) == 4
    for answer, article in zip(answers, page.locator("article").all(), strict=True):
        lines = said(answer)
        end = next(line for line in lines if line["event"] == "done")
        pieces = [p for line in lines if line["event"] == "step" for p in line["pieces"]] + end["rest"]
        assert article.locator(".answer").text_content().strip() == end["text"]
        coloured = article.locator(".word.drafted").all_text_contents()
        assert coloured == [p["text"] for p in pieces if p["drafted"]]
        if coloured:
            u = article.locator(".word.drafted u").first
            assert "underline" in u.evaluate("(e) => getComputedStyle(e).textDecorationLine")
        spec = article.get_attribute("data-spec")
        assert kept(page, spec) == set(range(16) if end["kept"] is None else end["kept"]), spec
        assert article.locator(".figures dd").count() == 5 and article.locator(".split-bar i").count() == 3
    assert texts(page, ".badge:visible") == ["✓ same text without drafts"] * 2
    assert re.match(r"\d+\.\d\d×", page.locator("article[data-spec='twig'] .times").text_content())


def test_columns_fit(place, visit):
    page = visit(place, FOUR)
    page.click("#run")
    done(page)
    boxes = [a.bounding_box() for a in page.locator("article").all()]
    assert len({box["y"] for box in boxes}) == 1 and boxes[-1]["x"] + boxes[-1]["width"] <= 1280
    assert page.evaluate("document.documentElement.scrollWidth") == 1280
    page.set_viewport_size({"width": 360, "height": 740})
    boxes = [a.bounding_box() for a in page.locator("article").all()]
    assert len({box["x"] for box in boxes}) == 1 and len({box["y"] for box in boxes}) == 4
    assert page.evaluate("document.documentElement.scrollWidth") == 360


def test_words_come_one_by_one_and_stop_ends_them(visit):
    with scripted(SLOWLY, pause=0.1) as (place, engine):
        page = visit(place, "#m=-unpruned")
        page.click("#run")
        page.wait_for_selector(ANSWER.format("unpruned") + " .word")
        assert "five" not in page.locator(ANSWER.format("unpruned")).text_content()
        page.click("#stop")
        page.wait_for_selector("#results[data-state=stopped]")
        ticket = engine.tickets[0]
        assert ticket.result(5).cancelled and ticket.told < len(SLOWLY)
        engine.pause = 0.01
        page.click("#run")
        done(page)
        assert page.locator(ANSWER.format("unpruned")).text_content() == "one two three four five"


def test_stop_while_it_is_checked_claims_nothing(visit):
    """The answer is whole; that it is the same without drafts was not found out."""
    with scripted(SLOWLY, pause=0.05) as (place, engine):
        page = visit(place, "#m=twig&R=8")
        page.click("#run")
        page.wait_for_selector(".badge:has-text('decoding again without drafts')")
        page.click("#stop")
        page.wait_for_selector("#results[data-state=stopped]")
        assert texts(page, ".badge:visible") == ["not checked without drafts"]
        assert page.locator("article").get_attribute("data-state") == "done"
        assert engine.tickets[1].result(5).cancelled


def test_a_reload_frees_the_worker(visit):
    with scripted(SLOWLY, pause=0.1) as (place, engine):
        page = visit(place, "#m=-unpruned")
        page.click("#run")
        page.wait_for_selector(".answer .word")
        page.reload()
        page.wait_for_selector("html[data-ready]")
        assert engine.tickets[0].result(2).cancelled and engine.tickets[0].told < len(SLOWLY)


def test_a_second_tab_is_told_its_place(visit):
    with scripted(SLOWLY, pause=0) as (place, engine):
        engine.held_at = 3
        first, second = visit(place, "#m=-unpruned"), visit(place, "#m=-unpruned", beside=True)
        first.click("#run")
        first.wait_for_selector(".answer .word")
        second.click("#run")
        second.wait_for_selector("text=waiting, 1 before this one")
        engine.go.set()
        for page in (first, second):
            done(page)
            assert page.locator(".answer").text_content() == "one two three four five"


def test_markup_in_an_answer_stays_text(visit):
    text = "<script>document.title='gone'</script> <img src=x onerror=alert(1)> 😀 漢字"
    with scripted([Step([], 0, [token]) for token in spelt(text)], pause=0) as (place, _):
        page = visit(place, "#m=-unpruned")
        page.click("#run")
        done(page)
        assert page.locator(".answer").text_content() == text and page.title() == "TwigVLM"
        assert page.locator(".answer script, .answer img").count() == 0


def test_rejected_drafts_flash_if_wanted(visit):
    red = spelt(" red")
    step = Step([*red, *spelt("x")], 4, [*red, *spelt("y")], [0.9] * 5, [-1, 0, 1, 2, 3], [0, 1, 2, 3])
    with scripted([step, *SLOWLY[:2]], pause=0.2) as (place, _):
        for wanted in (1, 0):
            page = visit(place, f"#m=twig&R=8&verify=0&rejected={wanted}")
            page.click("#run")
            page.wait_for_selector(".answer .word.drafted")
            assert texts(page, ".answer .rejected") == ["x"] * wanted
            done(page)
            page.wait_for_timeout(800)
            assert not texts(page, ".answer .rejected")
            page.locator(".answer .word", has_text="y").hover()
            assert "rejected “x”" in page.locator("article .detail").last.text_content()


def test_a_replay_keeps_the_recorded_times(visit):
    with scripted(SLOWLY[:10], pause=0.1) as (place, _):
        page = visit(place, "#m=-unpruned")
        page.click("#run")
        page.wait_for_selector("#results[data-state=replaying]")
        begin = page.evaluate("performance.now()")
        assert page.locator(".answer .word.later").count() > 3
        done(page)
        assert 600 < page.evaluate("performance.now()") - begin < 2500
        assert not page.locator(".answer .word.later").count()
        page.click("#replay")
        page.wait_for_selector("#results[data-state=replaying]")
        page.click("#replay")
        done(page)
        assert page.locator(".answer").text_content() == "one two th"


def test_less_motion(visit):
    with scripted(SLOWLY[:5], pause=0) as (place, _):
        page = visit(place, "#m=-unpruned", reduced_motion="reduce")
        page.click("#run")
        done(page)
        assert page.locator("#status").text_content().startswith("Done"), "no replay that nobody asked for"


# ---------------------------------------------------------------------- pictures


def stripes(**more) -> bytes:
    image = Image.new("RGB", (40, 80), "red")
    image.paste("blue", (0, 0, 40, 40))
    return file_of(image, **more)


def shown(page) -> str:
    page.wait_for_selector("#shown[src*='/api/pictures/']:not([src*='scene'])")
    page.wait_for_selector("#drop:not(.busy)")
    return page.locator("#shown").get_attribute("src")


HAND_OVER = """([bytes, kind]) => {
  const data = Uint8Array.from(atob(bytes), (c) => c.charCodeAt(0));
  const carried = new DataTransfer();
  carried.items.add(new File([data], "p.png", { type: "image/png" }));
  const event = kind === "drop"
    ? new DragEvent("drop", { dataTransfer: carried, bubbles: true, cancelable: true })
    : new ClipboardEvent("paste", { clipboardData: carried, bubbles: true, cancelable: true });
  document.getElementById(kind === "drop" ? "drop" : "question").dispatchEvent(event);
}"""


@pytest.mark.parametrize("way", ["picker", "drop", "paste"])
def test_a_picture_of_ones_own(place, visit, way):
    page = visit(place, "#m=-unpruned&tokens=3")
    data = stripes()
    if way == "picker":
        page.set_input_files("#file", {"name": "p.png", "mimeType": "image/png", "buffer": data})
    else:
        page.evaluate(HAND_OVER, [base64.b64encode(data).decode(), way])
    address = shown(page)
    seen = Image.open(io.BytesIO(page.request.get(f"http://{place}{address}").body()))
    assert seen.getpixel((40, 10)) == (0, 0, 255) and seen.getpixel((40, 70)) == (255, 0, 0)
    page.click("#run")
    done(page)


@pytest.mark.parametrize("kind", ["grey", "RGBA", "turned"])
def test_pictures_of_every_kind(place, visit, kind):
    """As a browser sends them: the page shows what the model sees, and runs."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    data = {
        "grey": file_of(Image.new("L", (80, 80), 77)),
        "RGBA": file_of(Image.new("RGBA", (80, 80), (77, 77, 77, 255))),
        "turned": file_of(Image.new("RGB", (80, 40), (77, 77, 77)), exif=exif.tobytes()),
    }[kind]
    page = visit(place, "#m=-unpruned&tokens=3")
    page.set_input_files("#file", {"name": "p.png", "mimeType": "image/png", "buffer": data})
    seen = Image.open(io.BytesIO(page.request.get(f"http://{place}{shown(page)}").body()))
    assert seen.mode == "RGB" and seen.size == (80, 80) and seen.getpixel((40, 5)) == (77, 77, 77)
    assert (seen.getpixel((2, 40)) == (77, 77, 77)) == (kind != "turned"), "padded at its sides once it is upright"
    page.click("#run")
    done(page)


def test_a_picture_too_huge_to_open_is_refused(place, visit):
    """Some hundred bytes that would take all memory as a square."""
    page = visit(place, quiet=False)
    before = page.locator("#shown").get_attribute("src")
    data = file_of(Image.new("1", (60000, 3)))
    page.set_input_files("#file", {"name": "p.png", "mimeType": "image/png", "buffer": data})
    page.wait_for_selector("#picture-fault:not([hidden])")
    assert "60000" in page.locator("#picture-fault").text_content()
    assert page.locator("#shown").get_attribute("src") == before


def test_a_wrong_picture_leaves_the_old_one(place, visit, tmp_path):
    page = visit(place, quiet=False)  # a browser notes the refusal in its console
    before = page.locator("#shown").get_attribute("src")
    page.set_input_files("#file", {"name": "p.png", "mimeType": "image/png", "buffer": b"no picture"})
    page.wait_for_selector("#picture-fault:not([hidden])")
    assert "not a picture" in page.locator("#picture-fault").text_content()
    large = tmp_path / "large.png"
    large.write_bytes(b"x" * (20 * 2**20 + 1))
    page.set_input_files("#file", large)
    page.wait_for_selector("text=at most 20 MB are taken")
    assert page.locator("#shown").get_attribute("src") == before


def test_a_link_to_a_picture_that_is_gone(place, visit):
    page = visit(place, "#picture=abcdef", quiet=False)
    page.wait_for_selector("#picture-fault:not([hidden])")
    assert "not here any more" in page.locator("#picture-fault").text_content()


# ---------------------------------------------------------------------- settings


def test_the_budget_changes_schedules_and_cells(place, visit):
    page = visit(place, "#m=-unpruned&m=-twig&R=10&tokens=3")
    layers = page.locator(".schedule[data-spec='twig']")
    page.wait_for_selector(".schedule[data-layers]")
    before = layers.get_attribute("data-layers")
    page.click("#run")
    done(page)
    many = kept(page, "twig")
    page.fill("#budget-number", "6")
    page.wait_for_selector(f".schedule[data-layers]:not([data-layers='{before}'])")
    page.click("#run")
    done(page)
    assert 0 < len(kept(page, "twig")) < len(many)
    page.fill("#budget-number", "1")
    page.wait_for_selector(".schedule .fault")
    assert "legal is" in page.locator(".schedule .fault").text_content()


def test_the_slider_snaps_for_a_pointer_and_not_for_a_key(place, visit):
    page = visit(place)
    slider = page.locator("#budget")
    slider.focus()
    slider.evaluate("(s) => { s.max = 576; s.value = 190; }")
    page.keyboard.press("ArrowRight")
    assert page.locator("#budget-number").input_value() == "191"


def test_a_link_holds_all_settings(place, visit):
    link = "#picture=scene-3&q=What+is+%C3%A9%3F&m=fastv&m=-sparsevlm%3Aversion%3D1.0&R=9&drafts=tree%3A2%2C2%2C3%2C6&tokens=7&seed=11&verify=0&heat=1&rejected=0"
    page = visit(place, link)
    assert texts(page, ".chip-name") == ["fastv", "sparsevlm:version=1.0"]
    page.check("#verify")
    page.uncheck("#verify")  # the page writes its link anew
    assert page.evaluate("location.hash") == link
    again = visit(place, page.evaluate("location.hash"))
    assert again.locator("#question").input_value() == "What is é?"
    assert again.locator("#draft-size").input_value() == "2,2,3,6" and again.locator("#longest").input_value() == "7"
    assert again.locator("#seed").input_value() == "11"
    assert again.locator("#heat").is_checked() and not again.locator("#rejected").is_checked()


def test_a_link_that_says_nonsense_is_the_usual_page(place, visit):
    nines = "9" * 400
    page = visit(place, f"#m=-{'a' * 90}&m=-{'b' * 3000}&R=0&drafts={nines}&tokens={nines}&seed=-1", quiet=False)
    assert texts(page, ".chip-name") == ["a" * 90]
    assert page.locator("#draft-size").input_value() == "5" and page.locator("#seed").input_value() == "0"
    assert page.locator("#longest").input_value() == "128" and page.locator("#budget-number").input_value() == "2"
    page.wait_for_selector(".schedule .fault")
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") == 360


def test_methods_are_added_and_refused(place, visit):
    page = visit(place, "#m=-unpruned", quiet=False)
    page.fill("#add", "nonsense")
    page.click("#add-button")
    page.wait_for_selector("text=known methods")
    for spec in ("fastv", "sparsevlm:version=1.0", "random"):
        page.fill("#add", spec)
        page.keyboard.press("Enter")
        page.wait_for_selector(f".chip-name:text-is('{spec}')")
    assert page.locator("#add").is_disabled() and page.locator("article").count() == 4
    page.click("[aria-label='Remove fastv']")
    assert page.locator("article").count() == 3 and page.locator("#add").is_enabled()


def test_a_run_as_json(place, visit, tmp_path):
    page = visit(place, "#m=twig&R=8&tokens=6&rejected=0")
    page.click("#run")
    done(page)
    with page.expect_download() as waiting:
        page.click("#download")
    waiting.value.save_as(tmp_path / "run.json")
    facts = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert facts["settings"]["R"] == 8 and facts["columns"][0]["checked"]["same"]
    assert facts["columns"][0]["text"] == page.locator(".answer").text_content().strip()


def test_colours_follow_the_system_and_the_button(place, visit):
    page = visit(place, color_scheme="dark")

    def dark() -> bool:
        channels = re.findall(r"\d+", page.locator("body").evaluate("(b) => getComputedStyle(b).backgroundColor"))
        return sum(map(int, channels[:3])) < 200

    assert dark()
    page.click("#theme")
    assert not dark()
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert not dark(), "what was chosen is remembered"
    page.click("#theme")
    assert dark()


def test_by_keyboard_alone(place, visit):
    page = visit(place, "#m=-unpruned&m=twig&R=8&tokens=6")
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        name, ring = page.evaluate(
            "() => [document.activeElement.id || document.activeElement.className, getComputedStyle(document.activeElement).outlineStyle]"
        )
        if name in reached and name == "skip":
            break
        reached.add(name)
        assert ring != "none" or name == "file" or name == "", name
    assert {
        "file",
        "question",
        "add",
        "budget",
        "budget-number",
        "draft-kind",
        "run",
        "heat",
        "patches",
        "answer",
    } <= reached
    page.focus("#question")
    page.keyboard.press("Control+Enter")
    done(page)
    page.focus("article[data-spec='twig'] canvas")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    told = page.locator("article[data-spec='twig'] .detail").first.text_content()
    assert told.startswith("row 2, column 2") and re.search(r"rank \d+ of 16, score 0\.\d+", told)
    page.focus("article[data-spec='twig'] .answer")
    page.keyboard.press("End")
    told = page.locator("article[data-spec='twig'] .detail").last.text_content()
    assert re.search(r"(drafted, \d[\d.]* % sure · the base|the base's own,) \d[\d.]* %.* · step \d", told)


def test_the_heat_map(place, visit):
    page = visit(place, "#m=twig&R=8&tokens=3")
    page.click("#run")
    done(page)
    look = "(c) => c.toDataURL()"
    plain = page.locator("canvas").evaluate(look)
    page.check("#heat")
    hot = page.locator("canvas").evaluate(look)
    page.uncheck("#heat")
    assert page.locator("canvas").evaluate(look) == plain != hot


# ---------------------------------------------------------------------- the program itself


@contextmanager
def program(*words: str):
    """The page's program with the embedded model, and its address."""
    server = warm.Program(["-m", "twigvlm.web", "--port", "0", "--device", "cpu", *words], ROOT)
    try:
        yield server, re.match(r"http://(\S+)/", server.line())[1]
    finally:
        server.kill()
        server.wait()


def test_embedded_model_and_a_server_that_dies(visit):
    with program() as (server, place):
        page = visit(place, "#q=How+many+objects+are+there%3F&m=-unpruned&m=twig&m=twig-discount&R=64", quiet=False)
        page.click("#run")
        page.wait_for_selector("#results[data-state=done]", timeout=120_000)
        assert page.locator(ANSWER.format("unpruned")).text_content() == "5"
        assert len(page.locator("article[data-spec='twig'] canvas").get_attribute("data-kept").split()) == 41
        page.fill("#question", "Describe the image in detail.")
        page.click("#run")
        page.wait_for_selector(".answer .word")
        server.kill()
        page.wait_for_selector("#results[data-state=failed]")
        assert "went away" in page.locator("article .fault:visible").first.text_content()
        assert "Start it again" in page.locator("#status").text_content()


def test_a_server_that_ends_by_ctrl_c():
    with program() as (server, _):
        os.kill(server.pid, signal.SIGINT)
        assert server.wait(20) == 0, server.communicate()
