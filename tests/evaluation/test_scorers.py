"""The scorers against the official ones' golden output, each of their quirks, and what is counted or refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import ROOT
from twigvlm.errors import InputError
from twigvlm.evaluation import score as command
from twigvlm.evaluation.tasks import TASKS, find
from twigvlm.evaluation.tasks.base import PER_QUESTION, Source
from twigvlm.evaluation.tasks.llava import distinct
from twigvlm.evaluation.tasks.mme import RELEASE, label
from twigvlm.evaluation.tasks.pope import yes_or_no
from twigvlm.evaluation.tasks.reading import read_records
from twigvlm.evaluation.tasks.sqa import FAILED, letter
from twigvlm.evaluation.tasks.textvqa import question_of
from twigvlm.evaluation.tasks.vqa_text import CONTRACTIONS, evalai, flat, soft_score, vqa

SHORT = "\nAnswer the question using a single word or phrase."
# task, questions, annotations, answers below scorers/; where the expected numbers stand; the table's number
CASES = {
    "gqa": ("gqa", "gqa/questions.jsonl", "gqa/annotations.json", "gqa/predictions.jsonl"),
    "mme": ("mme", "mme/questions.jsonl", "mme/annotations", "mme/predictions.jsonl"),
    "pope": ("pope", "pope/questions.jsonl", "pope/annotations", "pope/predictions.jsonl"),
    "pope missing": ("pope", "pope/questions.jsonl", "pope/annotations", "pope/predictions_missing.jsonl"),
    "sqa": ("scienceqa", "scienceqa/questions.json", "scienceqa/annotations", "scienceqa/predictions.jsonl"),
    "textvqa": ("textvqa", "textvqa/questions.jsonl", "textvqa/annotations.json", "textvqa/predictions.jsonl"),
    "vqav2": ("vqav2", "vqav2/questions.json", "vqav2/annotations.json", "vqav2/predictions.json"),
    "vqav2 llava": ("vqav2", "vqav2/llava_questions.jsonl", "vqav2/annotations.json", "vqav2/llava_answers.jsonl"),
}
TABLE = {
    "gqa": lambda e: e["accuracy"],
    "mme": lambda e: e["total"],
    "pope": lambda e: 100 * e["average_f1"],
    "sqa": lambda e: e["img_accuracy"],
    "textvqa": lambda e: 100.0 * e["accuracy"],
    "vqav2": lambda e: e["raw_predictions"]["overall"],
    "vqav2 llava": lambda e: e["converted_submission_with_missing"]["overall"],
}
GROUP = {
    "pope": "complete",
    "pope missing": "with_missing_predictions",
    "vqav2": "raw_predictions",
    "vqav2 llava": "converted_submission_with_missing",
}
ABOUT = {"official", "note"}  # of the golden file itself


@pytest.fixture
def scorers(golden) -> Path:
    return golden / "scorers"


def arguments(scorers: Path, case: str, *more: str) -> list[str]:
    task, questions, annotations, answers = CASES[case]
    paths = {"--questions": questions, "--annotations": annotations, "--answers": answers}
    return ["--task", task, *(word for flag, path in paths.items() for word in (flag, str(scorers / path))), *more]


def expected(scorers: Path, case: str) -> dict:
    return json.loads((scorers / CASES[case][1].split("/")[0] / "expected.json").read_text())


def run(*words: str, env: dict | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "twigvlm.evaluation.score", *words],
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=120,
    )


def lines_of(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def table_of(path: Path, value) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


# ---------------------------------------------------------------------- golden data


@pytest.mark.parametrize("case", CASES)
def test_every_golden_number(scorers, capsys, case, tmp_path):
    assert command.main(arguments(scorers, case, "--json", "--per-question", str(tmp_path / "each.json"))) == 0
    got = json.loads(capsys.readouterr().out.splitlines()[-1])
    each = json.loads((tmp_path / "each.json").read_text())
    assert not set(PER_QUESTION) & set(got), "what lists single questions stands in its own file"
    truth = expected(scorers, case)
    sums = {name: value for name, value in got.items() if isinstance(value, dict)}
    got |= each
    if case in GROUP:
        for name, value in truth[GROUP[case]].items():
            assert got[name] == value, name
        assert sums[GROUP[case]] == {k: v for k, v in truth[GROUP[case]].items() if k not in PER_QUESTION}
    if case == "pope":
        assert (got["parsed"], got["average_f1"]) == (truth["parsed"], truth["average_f1"])
    if case not in GROUP:
        for name in set(truth) - ABOUT:
            assert got[name] == truth[name], name
    if case in TABLE:
        assert got["score"] == TABLE[case](truth)


def test_golden_conversions(scorers, tmp_path, capsys):
    for case in ("gqa", "vqav2 llava", "mme"):
        assert command.main(arguments(scorers, case, "--export", str(tmp_path / case))) == 0
    capsys.readouterr()
    converted = (scorers / "gqa" / "expected_converted_predictions.json").read_bytes()
    assert (tmp_path / "gqa").read_bytes() == converted
    submission = json.loads((scorers / "vqav2" / "expected_submission.json").read_text())
    assert json.loads((tmp_path / "vqav2 llava").read_text()) == submission
    files = {file.name: file.read_bytes() for file in (scorers / "mme" / "expected_converted").iterdir()}
    assert {file.name: file.read_bytes() for file in (tmp_path / "mme").iterdir()} == files
    # files converted already are scored as they are
    task, questions, annotations = find("gqa"), scorers / "gqa/questions.jsonl", scorers / "gqa/annotations.json"
    first = task.score(questions, annotations, scorers / "gqa/predictions.jsonl")
    assert task.score(questions, annotations, tmp_path / "gqa").parts == first.parts


def test_golden_doubts_are_counted_and_strict_refuses_them(scorers, capsys):
    doubts = {
        "pope missing": {"missing": 3, "shifted_labels": 40},
        "sqa": {"missing": 3, "foreign": 4},
        "vqav2 llava": {"missing": 2},
    }
    for case in CASES:
        assert command.main(arguments(scorers, case, "--json")) == 0
        assert json.loads(capsys.readouterr().out)["doubts"] == doubts.get(case, {})
        code = command.main(arguments(scorers, case, "--json", "--strict"))
        message = capsys.readouterr().err
        assert code == (2 if case in doubts else 0), case
        assert all(f"{count} {name}" in message for name, count in doubts.get(case, {}).items())


# ---------------------------------------------------------------------- the command


def test_scores_without_torch(scorers, tmp_path):
    for name in ("torch", "transformers", "numpy", "PIL"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not installed')\n")
    done = run(*arguments(scorers, "gqa", "--json"), env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["score"] == 73.08


def test_table_for_people(scorers):
    done = run(*arguments(scorers, "pope missing"))
    assert done.returncode == 0
    assert done.stdout.startswith("POPE: 50.26 (mean F1")
    assert "doubt: 3 missing" in done.stdout and "doubt: 40 shifted_labels" in done.stdout
    assert done.stdout.count("adversarial / f1: 0.63") == 1  # not again under the name of the case


def test_command_refuses(scorers, capsys, tmp_path):
    words = arguments(scorers, "gqa", "--json")
    for change, said in (
        ({"--task": "gpa"}, "no benchmark 'gpa'; there are gqa, mme"),
        ({"--questions": str(tmp_path / "none")}, "no such file"),
        ({"--annotations": str(tmp_path / "none")}, "no such file"),
        ({"--annotations": str(tmp_path)}, "holds none of"),
        ({"--answers": str(tmp_path)}, "no such file"),
        ({"--split": "train"}, "testdev_balanced"),
    ):
        flags = {**dict(zip(words[:-1:2], words[1:-1:2], strict=True)), **change}
        assert command.main([word for pair in flags.items() for word in pair]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and said in err
    without = [word for word in words if word != "--annotations" and not word.endswith("annotations.json")]
    assert command.main(without) == 2
    assert "--annotations" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        command.main([*words, "--unknown"])
    assert stop.value.code == 2


BROKEN = {
    "cut off": (b'{"question_id": "a", "text": "yes"}\n{"question_id": "b", "te', ":2: not a line of JSON"),
    "no object": (b'{"question_id": "a", "text": "yes"}\n7\n', ":2: holds a JSON number"),
    "no text": (b'\n{"question_id": "a"}\n', ":2: the field 'text' is missing"),
    "null text": (b'{"question_id": "a", "text": null}\n', ":1: the field 'text' is a JSON null"),
    "not UTF-8": (b'{"question_id": "a", "text": "yes"}\n\n\xff\n', ":3: not UTF-8"),
    "broken list": (b'[{"question_id": "a", "text": "yes"},\n{]', ":2: not JSON"),
    "item of a list": (b'[{"question_id": "a", "text": "yes"}, []]', ": item 2: holds a JSON list"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_damaged_answers_are_an_error_of_one_line(scorers, tmp_path, capsys, fault):
    content, said = BROKEN[fault]
    answers = tmp_path / "answers.jsonl"
    answers.write_bytes(content)
    for case in ("gqa", "pope", "sqa", "textvqa", "vqav2 llava", "mme"):
        words = [*arguments(scorers, case)[:-1], str(answers)]
        assert command.main(words) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: {answers}:") and err.count("\n") == 1
        if case in ("gqa", "pope"):
            assert f"{answers}{said}" in err


@pytest.mark.parametrize("case", CASES)
def test_no_answers_never_become_a_number(scorers, tmp_path, capsys, case):
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    code = command.main([*arguments(scorers, case)[:-1], str(empty), "--json"])
    out = capsys.readouterr().out
    if case == "sqa":  # every question is wrong, none is known to have a picture
        assert code == 0 and json.loads(out)["score"] is None and json.loads(out)["doubts"] == {"missing": 44}
    elif case.startswith("vqav2"):  # the converter fills in "", which is right where an answer normalises to nothing
        assert code == 0 and json.loads(out)["doubts"] == {"missing": 46}
    else:
        assert code == 2 and out == ""


def test_export_writes_where_it_can(scorers, tmp_path, capsys):
    assert command.main(arguments(scorers, "textvqa", "--export", str(tmp_path / "x"))) == 2
    assert "nothing is uploaded" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert command.main(arguments(scorers, "gqa", "--export", str(tmp_path / "file" / "x.json"))) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert command.main(arguments(scorers, "sqa", "--export", str(tmp_path / "sqa.json"))) == 0
    result = json.loads((tmp_path / "sqa.json").read_text())
    truth = expected(scorers, "sqa")
    assert (result["acc"], result["correct"], result["count"]) == (50.0, 22, 44)
    assert result["results"] == truth["pred_idx"] and result["outputs"]["1021"] == FAILED


# ---------------------------------------------------------------------- quirks, one by one


@pytest.mark.parametrize(
    ("text", "word"),
    [
        *((text, "no") for text in ("no", "No", "not", "n,o", "no, yes", "Yes not. x", "yes no", "no ", " no", "No.1")),
        *((text, "yes") for text in ("no,no", "NO", "Not", "no\n", "no\t", "no\u00a0", "none", "cannot", "", ".No")),
        *((text, "yes") for text in ("1.5 no", "nope", "no!", "\u2028no", "Yes", "...")),
    ],
)
def test_pope_words(text, word):
    assert yes_or_no(text) == word


@pytest.mark.parametrize(
    ("text", "word"),
    [
        *((text, "yes") for text in ("Yes", "YES", "eyes", "  yes"[1:], "yesno", "ayes", "no, yes"[4:])),
        *((text, "no") for text in ("No", "snow", "know", "Not at all", "no yes", "None", "\u0130no")),
        *((text, "other") for text in ("   no", "  yes", "", "y", "n", "The answer is yes", "\u0130\u0130no")),
    ],
)
def test_mme_labels(text, word):
    assert label(text) == word


@pytest.mark.parametrize(
    ("text", "option"),
    [
        ("A", "A"),
        ("E", "E"),
        ("F", FAILED),
        ("a", FAILED),
        (" A", FAILED),
        ("A\n", FAILED),
        ("A.", FAILED),
        ("A. ", "A"),
        ("A. or B.", "A"),
        ("F. x", FAILED),
        ("The answer is A", FAILED),
        ("The answer is A\n", FAILED),
        ("The answer is A\u2028", "A"),
        ("The answer is Eel.", "E"),
        ("The answer is Z!", "Z"),
        ("the answer is A.", FAILED),
        ("The answer is AThe answer is B.", "A"),
        ("The answer is The answer is B.", "T"),
        ("The answer is A. The answer is B.", FAILED),
        ("B. The answer is A.", "B"),
        ("x\nThe answer is D.", "D"),
        ("", FAILED),
    ],
)
def test_sqa_letters(text, option):
    assert letter(text) == option


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        (f"What Time?{SHORT}", "what time?"),
        (f" What\u00a0? {SHORT}", " what\u00a0? "),
        (f"Q\nReference OCR token: a{SHORT}", "q"),
        (f"Reference OCR token: a\nQ{SHORT}", "q"),
        (f"Reference OCR token:\nReference OCR token: Q{SHORT}", "reference ocr token: q"),
        ("OCR tokens: a\nb Question: Q\nR? Short answer: Short answer:", "q\nr?"),
        ("OCR tokens: Question: Q", None),
        ("Q", None),
        (f"Q\nR{SHORT}", None),
    ],
)
def test_textvqa_questions(prompt, question):
    assert question_of(prompt) == question


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The Boy's", "boy 's"),
        ("boy\u2019s", "boy\u2019s"),
        ("1,000", "1000"),
        ("red,white", "redwhite"),
        ("a\tb\nc", "b c"),
        (" \t Two\u2003dogs \n", "2 dogs"),
        ("none zero ten eleven", "0 0 10 eleven"),
        ("t-shirt", "t shirt"),
        ("t-shirt -", "tshirt"),  # beside a space anywhere: every copy goes without one
        ("a-b c- d/e", "ab c d e"),
        ("x;-y-z", "x y z"),  # the space that ";" leaves does not count
        ("-x", "x"),
        ("3.14", "3.14"),
        ("v.\u0663", "v.\u0663"),  # an Arabic digit is a digit
        ("3. 14.", "3 14"),
        ("a.b", "ab"),
        ("." * 32 + "x", "x"),
        ("." * 34 + "x", "..x"),
        ("dont cant oclock", "don't can't o'clock"),
        ("Im ive", "im ive"),  # the table knows these with a capital only
        ("it's he's", "it 's he 's"),
        ("somebody'd ow's'at", "somebodyd ow 's'at"),
        ("couldntve couldnt've couldn'tve", "couldntve couldn't've couldn't've"),
        ("yall'd've", "y'all'd've"),
        ("\u00e9cole E\u0301cole", "\u00e9cole e\u0301cole"),
        ("what? why ?", "what why"),
        ("a an the", ""),
        ("a:b|c%", "a:b|c%"),
    ],
)
def test_evalai_text(text, plain):
    assert evalai(text) == plain


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The Boy's", "boy's"),
        ("1,000", "1000"),
        ("1,000-x/y", "1000xy"),  # one thousands comma: every mark goes without a space
        ("red,white", "red white"),
        ("red, white", "red white"),
        ("a,b, c", "ab c"),
        ("what?ever", "what ever"),
        ("\u0661,\u0662", "\u0661\u0662"),
        ("." * 33 + "x", ".x"),
        ("Let's dont", "let's don't"),
        ("ow's'at", "'ow's'at"),
    ],
)
def test_vqa_text(text, plain):
    assert vqa(text) == plain


def test_contractions():
    assert len(CONTRACTIONS) == 114
    assert all(key.replace("'", "") == word.replace("'", "") and key != word for key, word in CONTRACTIONS.items())
    assert all(key == key.lower() for key in CONTRACTIONS)


@given(st.text(max_size=40))
def test_text_is_left_plain(text):
    for normal in (evalai, vqa):
        once = normal(flat(text))
        assert once == " ".join(once.split())
        assert not set(once.split()) & {"a", "an", "the", "none", "one", "ten"}


@given(st.lists(st.sampled_from(["x", "y", "z", ""]), min_size=1, max_size=10), st.sampled_from(["x", "", "other"]))
def test_soft_score_is_the_mean_over_people(answers, answer):
    score = soft_score(answer, list(enumerate(answers)))
    agree = answers.count(answer)
    shares = [min(1, (agree - (given == answer)) / 3) for given in answers]
    assert score == pytest.approx(sum(shares) / len(shares))
    if len(answers) == 10 and agree <= 4:
        assert score == pytest.approx((0, 0.3, 0.6, 0.9, 1.0)[agree])


# ---------------------------------------------------------------------- small worlds


def gqa_question(number: int, answer: str, **more) -> dict:
    return {
        "isBalanced": True,
        "answer": answer,
        "question": f"What is {number}?",
        "types": {"structural": "query", "semantic": "obj"},
        "groups": {"global": None},
        "semantic": [],
        **more,
    }


def gqa(folder: Path, truth: dict, said: list[tuple[str, str]], asked=None, strict=False):
    questions = lines_of(folder / "q.jsonl", [{"question_id": name} for name in (truth if asked is None else asked)])
    answers = lines_of(folder / "p.jsonl", [{"question_id": name, "text": text} for name, text in said])
    return find("gqa").score(questions, table_of(folder / "a.json", truth), answers, strict)


def test_gqa_quirks(tmp_path):
    def steps(*texts):
        return [dict(zip(("operation", "argument"), text.split(": "), strict=True)) for text in texts]

    texts = ("select: sign", "existing: sign", "x: coexist", "query: name tag", "query: color", "choose name: a|b")
    truth = {
        "1": gqa_question(1, "red", semantic=steps(*texts), question="What\u00a0is\u2028that?"),
        "2": gqa_question(2, "Red", types={"structural": "verify", "semantic": "obj"}),
        "3": gqa_question(3, "blue", isBalanced=False),
        "4": gqa_question(4, "left", groups={"global": "place"}),
    }
    said = [("1", "Red..."), ("2", "Red"), ("4", "right"), ("4", "left. "), ("9", "?")]
    score = gqa(tmp_path, truth, said)
    parts = score.parts
    assert parts["exact"] == {"correct": 1, "count": 3, "accuracy": 100 / 3}  # "left. " keeps its space and period
    assert (parts["open"], parts["binary"], score.score) == (50.0, 0.0, 33.33)
    assert parts["Accuracy / steps number"] == {"0": [0.0, 2], "2": [100.0, 1]}
    assert parts["Accuracy / words number"]["3"] == [33.33, 3]
    assert parts["distribution"] == 0.01  # (0 - 1)^2 / 1, / 100
    assert score.doubts == {"duplicate": 1, "foreign": 1}
    assert gqa(tmp_path, truth, [*said, ("2", ".red"), ("1", ".red.")]).score == 0.0  # only final periods go
    with pytest.raises(InputError, match=r"1 duplicate \(4\); 1 foreign \(9\)"):
        gqa(tmp_path, truth, said, strict=True)
    with pytest.raises(InputError, match="1 balanced questions have no answer: 2"):
        gqa(tmp_path, truth, [("1", "x"), ("3", "x"), ("4", "x")])
    part = gqa(tmp_path, truth, [("1", "red")], asked=["1"], strict=True)
    assert part.score == 100.0 and "1 of 3 questions" in part.note
    with pytest.raises(InputError, match="belong together"):
        gqa(tmp_path, truth, [], asked=["77"])


@settings(max_examples=25)
@given(st.permutations(range(6)), st.lists(st.sampled_from(["yes", "No.", "left", ""]), min_size=6, max_size=6))
def test_order_does_not_matter_where_ids_pair(tmp_path_factory, order, texts):
    folder = tmp_path_factory.mktemp("order")
    truth = {str(n): gqa_question(n, ("yes", "no")[n % 2], groups={"global": "g"}) for n in range(6)}
    said = [(str(n), texts[n]) for n in range(6)]
    assert gqa(folder, truth, [said[n] for n in order], strict=True) == gqa(folder, truth, said)
    problems = {str(n): {"choices": ["x", "y"], "answer": n % 2} for n in range(6)}
    said = [(str(n), "AB"[len(texts[n]) % 2]) for n in range(6)]
    assert sqa(folder, problems, [said[n] for n in order], strict=True) == sqa(folder, problems, said)
    people = {n: (["yes"] * 5 + ["left"] * 5) for n in range(6)}
    rows = [(n, texts[n]) for n in range(6)]
    assert vqav2(folder, people, [rows[n] for n in order], strict=True) == vqav2(folder, people, rows)


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["yes", "no"])), max_size=20))
def test_a_later_answer_counts(tmp_path_factory, more):
    folder = tmp_path_factory.mktemp("later")
    truth = {str(n): gqa_question(n, "yes") for n in range(6)}
    every = [(str(n), "no") for n in range(6)] + [(str(n), text) for n, text in more]
    last = dict(every)
    doubled = gqa(folder, truth, every)
    assert doubled.parts == gqa(folder, truth, list(last.items())).parts
    assert sum(doubled.doubts.values()) == len(more)


def sqa(folder: Path, problems: dict, said: list[tuple[str, str]], strict=False, asked=None, prompt="<image>\nQ"):
    table_of(folder / "truth" / "problems.json", problems)
    table_of(folder / "truth" / "pid_splits.json", {"test": list(problems), "val": []})
    rows = [{"id": name, "conversations": []} for name in (problems if asked is None else asked)]
    questions = table_of(folder / "q.json", rows)
    answers = [{"question_id": name, "text": text, "prompt": prompt} for name, text in said]
    return find("sqa").score(questions, folder / "truth", lines_of(folder / "p.jsonl", answers), strict)


def test_sqa_quirks(tmp_path):
    problems = {str(n): {"choices": ["x", "y"], "answer": 0} for n in range(4)}
    score = sqa(tmp_path, problems, [("0", "B"), ("0", "A"), ("1", "E"), ("2", "A."), ("x", "A")])
    assert score.parts["pred_idx"] == {"0": 0, "1": -1, "2": -1, "3": -1}
    assert score.parts["parsed"] == {"0": "A", "1": "E", "2": FAILED, "3": FAILED}
    assert (score.parts["accuracy"], score.score) == (25.0, 1 / 3 * 100)  # the missing one is wrong, and no picture's
    assert score.doubts == {"duplicate": 1, "missing": 1, "foreign": 1}
    assert sqa(tmp_path, problems, [("0", "A")], asked=["0"], strict=True).score == 100.0
    blind = sqa(tmp_path, problems, [(name, "A") for name in problems], prompt="Q")
    assert blind.score is None and blind.parts["accuracy"] == 100.0 and "no answered question" in blind.note
    (tmp_path / "truth" / "pid_splits.json").write_text('{"test": ["nobody"]}')
    with pytest.raises(InputError, match="nobody"):
        find("sqa").score(tmp_path / "q.json", tmp_path / "truth" / "problems.json", tmp_path / "p.jsonl")


def vqav2(folder: Path, people: dict[int, list[str]], rows: list[tuple[int, str]], strict=False, llava=False):
    questions = {"questions": [{"question_id": n, "image_id": n, "question": "Q"} for n in people]}
    truth = [
        {
            "question_id": n,
            "question_type": f"kind {n % 2}",
            "answer_type": "other",
            "answers": [{"answer": text, "answer_id": k, "answer_confidence": "yes"} for k, text in enumerate(texts)],
        }
        for n, texts in people.items()
    ]
    table_of(folder / "q.json", questions)
    table_of(folder / "a.json", {"annotations": truth})
    said = [{"question_id": n, "text" if llava else "answer": text} for n, text in rows]
    answers = lines_of(folder / "p.jsonl", said) if llava else table_of(folder / "p.json", said)
    return find("vqav2").score(folder / "q.json", folder / "a.json", answers, strict)


def test_vqav2_normalises_only_where_people_disagree(tmp_path):
    people = {1: ["Stop!"] * 10, 2: ["Stop!"] * 9 + ["go"], 3: ["\tRed\n"] * 9 + ["Red"]}
    rows = [(1, "stop"), (2, "stop"), (3, " Red")]
    assert vqav2(tmp_path, people, rows).parts["evalQA"] == {"1": 0.0, "2": 100.0, "3": 100.0}
    assert vqav2(tmp_path, people, [(1, "\nStop!\t"), *rows[1:]]).parts["evalQA"]["1"] == 100.0


def test_vqav2_people_who_are_the_same_count_once(tmp_path):
    vqav2(tmp_path, {1: ["x"] * 2 + ["y"] * 8}, [(1, "x")])
    truth = json.loads((tmp_path / "a.json").read_text())
    for one in truth["annotations"][0]["answers"]:
        one["answer_id"] = 1
    table_of(tmp_path / "a.json", truth)
    score = find("vqav2").score(tmp_path / "q.json", tmp_path / "a.json", tmp_path / "p.json")
    assert score.score == round(100 * (2 * 0 + 8 * 2 / 3) / 10, 2)


def test_vqav2_answers_must_be_those_of_the_questions(tmp_path):
    people = {n: ["yes"] * 9 + ["no"] for n in range(4)}
    complete = [(n, "yes") for n in range(4)]
    with pytest.raises(InputError, match=r"1 missing \(3\)"):
        vqav2(tmp_path, people, complete[:3])
    with pytest.raises(InputError, match=r"1 foreign \(9\)"):
        vqav2(tmp_path, people, [*complete, (9, "yes")])
    score = vqav2(tmp_path, people, [*complete[:3], (9, "yes"), (0, "maybe")], llava=True)
    assert score.doubts == {"duplicate": 1, "missing": 1, "foreign": 1} and score.score == 50.0
    with pytest.raises(InputError, match=r"1 duplicate \(0\)"):
        vqav2(tmp_path, people, [*complete, (0, "no")], strict=True)


def test_vqav2_test_dev_is_not_scored_here(tmp_path, capsys):
    asked = [{"question_id": n, "image": "x.jpg", "text": f"Q{SHORT}"} for n in range(3)]
    home = tmp_path / "vqav2"
    home.mkdir()
    questions = lines_of(home / "llava_vqav2_mscoco_test-dev2015.jsonl", asked[:2])
    lines_of(home / "llava_vqav2_mscoco_test2015.jsonl", asked)
    answers = lines_of(tmp_path / "p.jsonl", [{"question_id": 1, "text": "The Dog."}, {"question_id": 0, "text": "2"}])
    words = ["--task", "vqav2", "--questions", str(questions), "--answers", str(answers), "--strict", "--json"]
    out = tmp_path / "upload" / "x.json"
    assert command.main([*words, "--split", "test-dev", "--export", str(out)]) == 0
    got = json.loads(capsys.readouterr().out)
    assert got["score"] is None and got["note"].startswith("not scored here")
    rows = [{"question_id": n, "answer": text} for n, text in enumerate(("2", "dog", ""))]
    assert json.loads(out.read_text()) == rows  # a row for every test question, numbers stay numbers


def textvqa(folder: Path, rows: list[dict], said: list[tuple[str, str, str]], strict=False, asked=None):
    data = [{"image_id": "i", "answers": ["yes"] * 9 + ["no"], **row} for row in rows]
    table_of(folder / "a.json", {"data": data})
    texts = [row["question"] for row in rows] if asked is None else asked
    questions = lines_of(folder / "q.jsonl", [{"question_id": "i", "text": text + SHORT} for text in texts])
    answers = [{"question_id": name, "prompt": question + SHORT, "text": text} for name, question, text in said]
    return find("textvqa").score(questions, folder / "a.json", lines_of(folder / "p.jsonl", answers), strict)


def test_textvqa_quirks(tmp_path):
    rows = [{"question": "Is it A?"}, {"question": "Is it B?", "answers": ["the"] * 10}, {"question": "is it a?"}]
    score = textvqa(tmp_path, rows, [("i", "IS IT A?", "Yes."), ("i", "Is it B?", ""), ("i", "is it a?", "no")])
    assert [item["score"] for item in score.parts["items"]] == [1.0, 1.0, 0.3] and not score.doubts
    gone = textvqa(tmp_path, rows, [("i", "Is it B?", "a"), ("i", "Is it B?", "x")])
    assert gone.score == 50.0 and gone.parts["samples"] == 2  # missing ones leave the mean, repeated ones enter it
    assert gone.doubts == {"missing": 2, "duplicate": 1}
    with pytest.raises(InputError, match="2 missing"):
        textvqa(tmp_path, rows, [("i", "Is it B?", "a"), ("i", "Is it B?", "x")], strict=True)
    with pytest.raises(InputError, match="1 answers whose question"):
        textvqa(tmp_path, rows, [("i", "Is it C?", "yes")])
    with pytest.raises(InputError, match="needs 10 answers"):
        textvqa(tmp_path, [{"question": "Q", "answers": ["yes"] * 9}], [("i", "Q", "yes")])


def pope(folder: Path, labels: dict[str, str], said: list[tuple[int, str]], strict=False, order=None):
    """`labels`: setting → "yn…"; questions are numbered through the settings, three letters apart."""
    asked = []
    for setting, truth in labels.items():
        marks = [
            {"label": {"y": "yes", "n": "no"}[mark], "image": f"{n}.jpg", "text": "Q?"} for n, mark in enumerate(truth)
        ]
        lines_of(folder / f"coco_pope_{setting}.json", marks)
        asked += [{"image": f"{n}.jpg", "text": f"Q?{SHORT}", "category": setting} for n in range(len(truth))]
    asked = [asked[n] for n in (order or range(len(asked)))]
    questions = lines_of(folder / "q.jsonl", [{"question_id": n, **line} for n, line in enumerate(asked)])
    answers = lines_of(folder / "p.jsonl", [{"question_id": n, "text": text} for n, text in said])
    return find("pope").score(questions, folder, answers, strict)


def test_pope_pairs_by_position(tmp_path):
    labels = {"random": "yny", "popular": "ny"}
    right = ["yes", "no", "yes", "no", "yes"]
    clean = pope(tmp_path, labels, list(enumerate(right)), strict=True)
    assert clean.score == 100.0 and not clean.doubts
    mixed = pope(tmp_path, labels, [(n, right[k]) for n, k in enumerate((0, 3, 1, 4, 2))], True, (0, 3, 1, 4, 2))
    assert mixed.score == 100.0  # settings may be interleaved
    gone = pope(tmp_path, labels, [(n, text) for n, text in enumerate(right) if n != 0])
    assert gone.doubts == {"missing": 1, "shifted_labels": 2}
    cells = gone.parts["random"]
    assert [cells[name] for name in ("samples", "TP", "FP", "TN", "FN")] == [2, 0, 1, 0, 1]
    twice = pope(tmp_path, labels, [(0, "yes"), *enumerate(right)])
    assert twice.doubts == {"duplicate": 1, "unlabelled": 1, "shifted_labels": 2}
    assert twice.parts["random"]["samples"] == 4 and twice.parts["random"]["yes_ratio"] == 0.75
    with pytest.raises(InputError, match="shifted_labels"):
        pope(tmp_path, labels, [(1, "no"), (0, "yes"), *list(enumerate(right))[2:]], strict=True)
    with pytest.raises(InputError, match="not asked: 9"):
        pope(tmp_path, labels, [*enumerate(right), (9, "yes")])
    with pytest.raises(InputError, match="0 answers, 2 labels"):
        pope(tmp_path, labels, list(enumerate(right[:3])))


@pytest.mark.parametrize("case", ["gqa", "mme", "pope", "sqa", "textvqa", "vqav2"])
def test_a_run_on_the_first_questions_is_scored_on_these(scorers, tmp_path, case):
    name, questions, annotations, answers = (CASES[case][0], *(scorers / path for path in CASES[case][1:]))
    task = find(name)
    few = task.read_questions(questions).first(4)
    asked = {str(line.get("question_id", line.get("id"))) for line in few.rows}
    said = task.read_answers(answers)
    rows = [row for row in said.rows if str(row["question_id"]) in asked]
    score = task.score_records(few, task.read_truth(annotations, questions), Source(answers, rows), strict=True)
    assert len(rows) == 4 and score.score is not None and not score.doubts


def test_pope_without_a_right_yes(tmp_path):
    score = pope(tmp_path, {"random": "yn"}, [(0, "no"), (1, "no")], strict=True)
    assert score.score == 0.0 and score.parts["random"]["accuracy"] == 0.5
    assert "no right yes in random" in score.note


def test_pope_labels_of_other_questions_are_noticed(tmp_path):
    pope(tmp_path, {"random": "yny"}, [(n, "yes") for n in range(3)])
    rows = read_records(tmp_path / "coco_pope_random.json")
    lines_of(tmp_path / "coco_pope_random.json", [{**row, "image": "other.jpg"} for row in rows])
    score = find("pope").score(tmp_path / "q.jsonl", tmp_path / "coco_pope_random.json", tmp_path / "p.jsonl")
    assert score.doubts == {"shifted_labels": 3}


def mme_world(folder: Path, subtasks=("existence", "OCR"), ending="\n") -> list[dict]:
    """Two pictures a subtask; the answers are all right."""
    rows = []
    for subtask in subtasks:
        home = folder / RELEASE / subtask
        home = home / "questions_answers_YN" if subtask == "OCR" else home
        home.mkdir(parents=True, exist_ok=True)
        for n in range(2):
            space = " " * (1 + n)
            truth = {f"Is {subtask} {n} {word}?": word for word in ("Yes", "No")}
            lines = [f"{question}{space}Please answer yes or no.\t{word} " for question, word in truth.items()]
            (home / f"{n}.txt").write_text("\n".join(lines) + ending)
            rows += [
                {"question_id": f"{subtask}/images/{n}.v1.jpg", "prompt": question + SHORT, "text": word}
                for question, word in truth.items()
            ]
    return rows


def mme(folder: Path, said: list[dict], strict=False, asked=None):
    rows = [{"question_id": row["question_id"], "text": row["prompt"]} for row in (asked or said)]
    questions = lines_of(folder / "q.jsonl", rows)
    return find("mme").score(questions, folder, lines_of(folder / "p.jsonl", said), strict)


@pytest.mark.parametrize("ending", ["\n", "", "\r\n"])
def test_mme_reads_annotations_as_they_are(tmp_path, ending):
    assert mme(tmp_path, mme_world(tmp_path, ending=ending), strict=True).score == 400.0


def test_mme_pairs_by_order(tmp_path):
    rows = mme_world(tmp_path)
    swapped = [rows[0], rows[2], rows[1], rows[3], *rows[4:]]
    score = mme(tmp_path, swapped, asked=rows)
    assert score.score == 400.0 and score.doubts == {"pairs_across_images": 2}
    rows[1] = {**rows[1], "text": "yes"}
    assert mme(tmp_path, rows, strict=True).parts["Perception"]["tasks"]["existence"] == 75.0 + 50.0
    gone = mme(tmp_path, rows[2:], asked=rows)  # a whole picture: its answers leave the denominators
    assert gone.parts["Perception"]["tasks"]["existence"] == 200.0 and gone.doubts == {"missing": 2}
    with pytest.raises(InputError, match="2 missing"):
        mme(tmp_path, rows[2:], strict=True, asked=rows)
    twice = mme(tmp_path, [*rows, rows[-1], rows[-1]], asked=rows)
    assert twice.doubts == {"duplicate": 2}


def test_mme_refuses_what_breaks_the_official_scorer(tmp_path):
    rows = mme_world(tmp_path)
    for text, said in (("Yes\tno", "a tab"), ("Yes\n", "a line break"), ("\rYes", "carriage"), ("a\r\r", "carriage")):
        with pytest.raises(InputError, match=said):
            mme(tmp_path, [{**rows[0], "text": text}, *rows[1:]])
    fine = [{**rows[0], "text": "Yes\r"}, *rows[1:]]
    assert mme(tmp_path, fine).score == 400.0
    with pytest.raises(InputError, match=r"odd number of answers in existence \(3\)"):
        mme(tmp_path, rows[1:])
    with pytest.raises(InputError, match=r"without annotation: existence/images/7\.jpg"):
        mme(tmp_path, [*rows, {**rows[0], "question_id": "existence/images/7.jpg"}])
    with pytest.raises(InputError, match="no answer in OCR"):
        mme(tmp_path, rows[:4], asked=rows)
    (tmp_path / RELEASE / "existence" / "0.txt").write_text("no tab here\n")
    with pytest.raises(InputError, match=r"0\.txt:1: not a question"):
        mme(tmp_path, rows)
    assert find("mme").clean(" Yes,\n it\tis \n") == "Yes,  it is"


def test_line_separators_inside_text_do_not_end_a_line(tmp_path):
    rows = [{"question_id": n, "text": f"a{sign}b"} for n, sign in enumerate("\u2028\u2029\u0085\x0b\x0c\x1c\r\n")]
    assert read_records(lines_of(tmp_path / "x.jsonl", rows)) == rows
    (tmp_path / "bom.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}')
    assert read_records(tmp_path / "bom.jsonl", a=int) == [{"a": 1}, {"a": 2}]


# ---------------------------------------------------------------------- questions


def test_every_benchmark_of_the_paper_is_there():
    names = {"gqa", "mme", "mmbench", "mmbench_cn", "sqa", "textvqa", "vqav2", "pope", "mmvet", "mmmu", "seed"}
    assert set(TASKS) >= names
    assert find("scienceqa") is TASKS["sqa"]
    for name in names:
        task = TASKS[name]
        assert task.name == name and task.title and task.metric and task.splits and task.source
        assert set(task.published) == {"llava-1.5-7b", "llava-1.5-13b"}
        for split in task.splits:
            assert "questions" in task.files(Path("data"), split)


LINES = [
    {"question_id": "i", "image": "a/i.jpg", "text": f"One?{SHORT}", "category": "x"},
    {"question_id": "i", "image": "a/i.jpg", "text": f"Two?{SHORT}", "category": "x"},
    {"question_id": 7, "image": "j.jpg", "text": f"Three?{SHORT}", "category": "x"},
]


@pytest.mark.parametrize("name", ["gqa", "pope", "mme", "textvqa", "vqav2"])
def test_questions_of_llavas_files(tmp_path, name):
    task = find(name)
    files = task.files(tmp_path, task.splits[0])
    files["questions"].parent.mkdir(parents=True)
    lines_of(files["questions"], LINES)
    one, two, three = task.questions(tmp_path, task.splits[0])
    second = "i#2" if task.shared_ids else "i"  # which no run takes twice
    assert (one.id, two.id, three.id) == ("i", second, "7")
    assert two.prompt == f"Two?{task.suffix}" and three.images == (files["images"] / "j.jpg",)
    assert [question.line["question_id"] for question in (one, two, three)] == ["i", "i", 7]
    with pytest.raises(InputError, match="has no split 'x'"):
        task.questions(tmp_path, "x")
    files["questions"].write_text('{"question_id": 1}')
    with pytest.raises(InputError, match=":1: the field"):
        task.questions(tmp_path, task.splits[0])


def test_distinct_names():
    assert distinct(["a", "b", "a", "a"]) == ["a", "b", "a#2", "a#3"]


def test_questions_of_vqav2_val(tmp_path):
    row = {"question_id": 42001, "image_id": 42, "question": "Why?"}
    table_of(tmp_path / "vqav2" / "v2_OpenEnded_mscoco_val2014_questions.json", {"questions": [row]})
    (question,) = find("vqav2").questions(tmp_path, "val")
    assert (question.id, question.prompt) == ("42001", f"Why?{SHORT}")
    assert question.images == (tmp_path / "vqav2" / "val2014" / "COCO_val2014_000000000042.jpg",)


def test_questions_of_sqa(tmp_path):
    talk = [{"from": "human", "value": "Context: N/A\nQuestion: Q?\nOptions: (A) x\n\n<image>"}]
    rows = [{"id": "1", "conversations": talk, "image": "1/image.png"}, {"id": "2", "conversations": talk}]
    table_of(tmp_path / "scienceqa" / "llava_test_CQM-A.json", rows)
    seen, blind = find("sqa").questions(tmp_path, "test")
    prompt = "Context: N/A\nQuestion: Q?\nOptions: (A) x" + find("sqa").suffix
    assert seen.prompt == blind.prompt == prompt
    assert seen.images == (tmp_path / "scienceqa/images/test/1/image.png",) and blind.images == ()
    assert seen.line == {"question_id": "1", "prompt": f"<image>\n{prompt}"} and "prompt" not in blind.line
