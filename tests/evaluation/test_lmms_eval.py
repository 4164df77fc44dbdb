"""The lmms-eval plug-in: what it does with requests, and lmms-eval's own evaluator over a local task.

The first part needs no lmms-eval. The second is skipped where it is not installed (docs/lmms-eval.md);
.ci/run installs it and runs this file there.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import ROOT, speaking, write_base
from PIL import Image

import twigvlm
from twigvlm.errors import InputError, RunError
from twigvlm.evaluation.lmms import CLASS_PATH
from twigvlm.evaluation.lmms import plugin as lmms
from twigvlm.evaluation.lmms.options import NAMES, Manner
from twigvlm.evaluation.lmms.plugin import Adapter, StopStrings
from twigvlm.evaluation.lmms.task import main as write_task
from twigvlm.model.twig import save_twig
from twigvlm.prompt.template import VICUNA_V1, encode
from twigvlm.vlm import TwigVLM
from twigvlm.world.drawn import ensure

R = 2  # of the tiny model, whose pictures have four tokens
INSTALLED = importlib.util.find_spec("lmms_eval") is not None
needs_lmms_eval = pytest.mark.skipif(
    not INSTALLED, reason="lmms-eval is not installed; docs/lmms-eval.md says how to, .ci/run does it"
)

# ---------------------------------------------------------------------- requests without lmms-eval


class Request(NamedTuple):
    args: tuple[Any, ...]


COLOURS = ("red", "green", "blue", "white", "black")
DOCS = [
    {"question": "what is the colour?", "images": [Image.new("RGB", (40, 30), COLOURS[0])]},
    {"question": "are there two images in here?", "images": [Image.new("RGB", (30, 30), c) for c in COLOURS[1:3]]},
    {"question": "is this a question without an image?", "images": []},
    {"question": "<image> and <image>: the same?", "images": [Image.new("RGB", (20, 30), c) for c in COLOURS[3:]]},
    {"question": "what is it?", "images": [Image.new("RGB", (28, 28), COLOURS[4])]},
]


def asked(doc: int, **generation: Any) -> Request:
    generation = {"max_new_tokens": 9, "until": ["\n\n"], **generation}
    return Request((DOCS[doc]["question"], generation, lambda d: d["images"], doc, "colours", "test"))


def weighed(doc: int, continuation: Any) -> Request:
    return Request((DOCS[doc]["question"], continuation, lambda d: d["images"], doc, "colours", "test"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """A tiny base and its twig on the disk."""
    vlm, folder = speaking(), tmp_path_factory.mktemp("model")
    write_base(folder / "base", vlm.model)
    save_twig(vlm.twig, vlm.trunk, folder / "twig", "tiny")
    return {"pretrained": str(folder / "base"), "twig": str(folder / "twig")}


@pytest.fixture(scope="module")
def adapted(folders):
    """Adapters by their model_args, with documents to ask about; a model is loaded once."""
    loaded = cache(lmms.load)

    def make(**model_args: Any) -> Adapter:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lmms, "load", loaded)
            adapter = Adapter(**{**folders, **model_args})
        adapter.task_dict = {"colours": {"test": DOCS}}
        return adapter

    return make


@pytest.fixture
def outputs(monkeypatch):
    """What `generate` gives back from now on, as it comes."""
    seen, generate = [], TwigVLM.generate
    monkeypatch.setattr(TwigVLM, "generate", lambda *a, **k: seen.append(generate(*a, **k)) or seen[-1])
    return seen


def told(adapter: Adapter, doc: int, **settings: Any) -> str:
    """What the model itself says, one question at a time."""
    settings = {"max_new_tokens": 9, **settings}
    return adapter.vlm.answer(DOCS[doc]["images"], DOCS[doc]["question"], **settings)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("retained", [None, R])
def test_answers_are_the_models_own_in_the_order_of_the_requests(adapted, batch_size, retained):
    adapter = adapted(R=retained, batch_size=batch_size)
    lengths = [9, 4, 9, 9, 4, 9]  # two manners of writing, mixed
    order = [3, 0, 2, 4, 1, 0]
    answers = adapter.generate_until([asked(d, max_new_tokens=n) for d, n in zip(order, lengths, strict=True)])
    expected = [
        told(adapter, d, max_new_tokens=n, retained_tokens=retained) for d, n in zip(order, lengths, strict=True)
    ]
    assert answers == expected
    assert len(set(answers)) > 3, "the questions must matter"


def test_speculation_off_changes_the_steps_and_not_the_answers(adapted, outputs):
    requests, said, drafted = [asked(d, max_new_tokens=12) for d in (0, 1, 2)], [], []
    for model_args in ({"speculation": False}, {}, {"draft_length": 2}):
        adapter = adapted(R=R, **model_args)
        outputs.clear()
        said.append(adapter.generate_until(requests))
        drafted.append(max(len(step.drafted) for out in outputs for row in out.steps for step in row))
    assert said[0] == said[1] == said[2]
    assert drafted[0] == 0 and drafted[1] > drafted[2] > 0


def test_nothing_asked_nothing_answered(adapted):
    adapter = adapted()
    assert adapter.generate_until([]) == [] and adapter.loglikelihood([]) == []


def test_requests_stay_as_they_are(adapted):
    request = asked(0, until=["x", ""], temperature=0, num_beams=1)
    before = dict(request.args[1])
    adapted().generate_until([request])
    assert request.args[1] == before, "the evaluator logs them afterwards"


@pytest.mark.parametrize("batch_size", [1, 3])
def test_until_ends_the_answer_and_the_writing(adapted, batch_size, outputs):
    adapter = adapted(R=R, batch_size=batch_size)
    whole = [told(adapter, d, max_new_tokens=40, retained_tokens=R) for d in (0, 1, 4)]
    word = whole[0][8:10]
    outputs.clear()
    answers = adapter.generate_until([asked(d, until=[word, "never"], max_new_tokens=40) for d in (0, 1, 4)])
    assert answers == [text.split(word)[0].strip() for text in whole]
    assert word not in answers[0] and len(answers[0]) < len(whole[0])
    assert len(outputs[0].tokens[0]) < 40, "it stops there instead of cutting afterwards only"


def test_until_in_the_question_is_not_the_answers(adapted):
    adapter = adapted()
    assert adapter.generate_until([asked(0, until="ASSISTANT:")]) == [told(adapter, 0)]
    assert adapter.generate_until([asked(0, until=["colour", "<image>"])]) == [told(adapter, 0)]


def test_a_row_is_told_from_another_that_begins_like_it():
    class Letters:
        def decode(self, ids, skip_special_tokens):
            return "".join(map(chr, ids))

    short, long = [ord(c) for c in "ab"], [ord(c) for c in "abc?"]
    stop = StopStrings(Letters(), ["c"], [short, long])
    assert stop(torch.tensor([[*short, ord("c")]]), None, 0)
    assert not stop(torch.tensor([[*long, ord("d")]]), None, 1), "the c is in its prompt"


def test_blank_line_of_lmms_eval_can_be_passed_over(adapted, monkeypatch):
    seen = []
    monkeypatch.setattr(lmms, "StopStrings", lambda tokenizer, words, rows: seen.append(words))
    for stops in (True, False):
        adapted(blank_line_stops=stops).generate_until([asked(0, until=["\n\n", "Q:"])])
    assert seen == [("\n\n", "Q:"), ("Q:",)]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, Manner(1024)),
        ({"temperature": 0, "top_p": 1.0, "num_beams": 1, "do_sample": False, "max_new_tokens": 16}, Manner(16)),
        ({"temperature": 0.7}, Manner(1024, True, 0.7, None, 1.0)),
        ({"temperature": 0.7, "do_sample": False}, Manner(1024)),
        ({"do_sample": True}, Manner(1024, True, 1.0, None, 1.0)),
        ({"do_sample": True, "temperature": 0}, Manner(1024)),
        ({"do_sample": True, "temperature": 0.5, "top_p": 0}, Manner(1024)),
        ({"do_sample": True, "top_p": 0.9, "top_k": 5, "seed": 3}, Manner(1024, True, 1.0, 5, 0.9, 3)),
        ({"do_sample": True, "top_k": -1}, Manner(1024, True, 1.0, None, 1.0)),
        ({"until": "stop", "max_gen_toks": 7}, Manner(7, until=("stop",))),
        ({"until": None, "image_aspect_ratio": "original"}, Manner(1024)),
        ({"until": ["", "a"], "strange": 1}, Manner(1024, until=("a",), unknown=("strange",))),
    ],
)
def test_generation_kwargs(given, expected):
    assert Manner.read(given) == expected


@pytest.mark.parametrize(
    "given", [{"num_beams": 3}, {"until": 3}, {"max_new_tokens": "many"}, {"temperature": "hot"}, {"n": 2}]
)
def test_impossible_generation_kwargs(given):
    with pytest.raises(InputError, match=next(iter(given))):
        Manner.read(given)


def test_unknown_generation_kwargs_are_named_once(adapted):
    adapter = adapted()
    with pytest.warns(UserWarning, match="wind is not known") as caught:
        adapter.generate_until([asked(0, wind="north"), asked(1, wind="south")])
    assert len(caught) == 1


def test_samples_differ_and_repeat_whatever_the_batch(adapted):
    """The evaluator asks the same request several times for several samples."""
    manner = {"do_sample": True, "temperature": 2.0, "max_new_tokens": 5}
    requests = [asked(0, **manner)] * 3 + [asked(2, **manner)] * 2
    answers = [adapted(batch_size=n, seed=5).generate_until(requests) for n in (1, 2, 5)]
    assert answers[0] == answers[1] == answers[2]
    assert len(set(answers[0][:3])) > 1
    assert adapted(seed=6).generate_until(requests) != answers[0]
    torch.manual_seed(1234)  # as lmms-eval's --seed does
    first = adapted().generate_until(requests)
    torch.manual_seed(1234)
    assert adapted().generate_until(requests) == first


def test_marks_that_do_not_fit_the_images(adapted):
    adapter = adapted()
    request = Request(("<image> or <image>?", {"max_new_tokens": 5}, lambda d: d["images"], 0, "colours", "test"))
    with pytest.warns(UserWarning, match="2 <image> marks for 1 images"):
        answer = adapter.generate_until([request])
    assert answer == [adapter.vlm.answer(DOCS[0]["images"], " or ?", max_new_tokens=5)]


@pytest.mark.parametrize("nothing", [None, [], [None]])
def test_documents_without_pictures(adapted, nothing):
    adapter = adapted(R=R)
    request = Request(("is it?", {"max_new_tokens": 5}, lambda d: nothing, 0, "colours", "test"))
    assert adapter.generate_until([request]) == [adapter.vlm.answer(None, "is it?", max_new_tokens=5)]


@pytest.mark.parametrize(
    ("visual", "words"),
    [
        ([{"array": [1]}], "a dict to look at"),
        (["/nowhere/film.mp4"], "film.mp4: no such file"),
    ],
)
def test_what_cannot_be_seen_is_said_with_its_document(adapted, visual, words):
    request = Request(("what?", {}, lambda d: visual, 3, "colours", "test"))
    with pytest.raises(InputError, match=words) as caught:
        adapted().generate_until([request])
    assert "document 3 of task colours" in str(caught.value)


@pytest.mark.parametrize("seed", [None, 7])
def test_random_pruning_draws_by_document(adapted, seed):
    """Neither the batch, nor the order, nor what was asked before changes what is kept of a document."""
    order, more = [0, 1, 2, 3, 4], {} if seed is None else {"seed": seed}
    drawn = {}
    for batch_size, turn in ((1, order), (5, order[::-1]), (2, [3, 1, 4, 0, 2])):
        adapter = adapted(R=R, pruning="random", batch_size=batch_size, speculation=False, **more)
        answers = adapter.generate_until([asked(d) for d in turn])
        losses = adapter.loglikelihood([weighed(d, " red") for d in turn])
        found = dict(zip(turn, zip(answers, [round(loss, 4) for loss, _ in losses], strict=True), strict=True))
        assert drawn.setdefault("first", found) == found
    other = adapted(R=R, pruning="random", seed=8, speculation=False).loglikelihood([weighed(d, " red") for d in order])
    assert [round(loss, 4) for loss, _ in other] != [drawn["first"][d][1] for d in order]


def test_half_a_character_in_a_context(adapted):
    adapter = adapted()
    contexts = ["is \ud83d it?", "is \ufffd it?"]
    request = asked(0, max_new_tokens=4).args
    answers = adapter.generate_until([Request((context, *request[1:])) for context in contexts])
    assert answers[0] == answers[1]
    loss = weighed(0, "\udc80").args
    assert adapter.loglikelihood([Request((contexts[0], *loss[1:]))])[0][0] > 0


def test_weights_that_are_no_numbers(adapted):
    adapter = adapted()
    weight = adapter.vlm.trunk.layers[3].mlp.down_proj.weight
    before = weight[0, 0].item()
    try:
        weight[0, 0] = float("nan")
        for call in (adapter.generate_until, adapter.loglikelihood):
            request = asked(0, max_new_tokens=4) if call == adapter.generate_until else weighed(0, "red")
            with pytest.raises(RunError, match="layer 3 of the base"):
                call([request])
    finally:
        weight[0, 0] = before


def test_an_overlong_prompt_is_said_with_its_document(adapted):
    request = Request(("a " * 2000, {}, None, 4, "colours", "test"))
    with pytest.raises(InputError, match="document 4 of task colours: prompt of"):
        adapted().generate_until([request])


def test_many_rounds_are_refused(adapted):
    with pytest.raises(NotImplementedError, match="generate_until"):
        adapted().generate_until_multi_round([asked(0)])


def test_clean_gives_the_memory_back_and_loads_again(folders):
    adapter = Adapter(**folders)
    adapter.task_dict = {"colours": {"test": DOCS}}
    before = adapter.generate_until([asked(0)])
    adapter.clean()
    assert "vlm" not in vars(adapter) and adapter.device.type == "cpu"
    assert adapter.generate_until([asked(0)]) == before


# ---------------------------------------------------------------------- likelihoods


def stock_loss(adapter: Adapter, doc: int, continuation: str) -> tuple[float, bool]:
    """What lmms-eval's own adapters return: the loss of the unmodified model on the continuation."""
    vlm, images, question = adapter.vlm, DOCS[doc]["images"], DOCS[doc]["question"]
    inputs = vlm.prepare(images, question)
    if "<image>" not in question:
        question = "<image>\n" * len(images) + question
    text = VICUNA_V1.render([(question, continuation)]).removesuffix(VICUNA_V1.end)
    ids = torch.tensor([encode(vlm.tokenizer, text, vlm.image_token_id, vlm.config.V)])
    start = inputs["input_ids"].shape[1]
    assert ids[:, :start].tolist() == inputs["input_ids"].tolist()
    labels = ids.clone()
    labels[:, :start] = -100
    with torch.no_grad():
        out = vlm.model(input_ids=ids, pixel_values=inputs.get("pixel_values"), labels=labels)
    return float(out.loss), bool((out.logits[0, start - 1 : -1].argmax(-1) == ids[0, start:]).all())


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("twig", [True, False])
def test_losses_are_the_stock_models(adapted, folders, batch_size, twig):
    adapter = adapted(batch_size=batch_size, twig=folders["twig"] if twig else None)
    pairs = [(0, "red"), (0, "the same"), (1, "a"), (2, "there, there."), (3, "red"), (4, "what</s>is it")]
    found = adapter.loglikelihood([weighed(d, f" {text}") for d, text in pairs])
    expected = [stock_loss(adapter, d, text) for d, text in pairs]
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_pruning_matters_to_a_likelihood(adapted):
    requests = [weighed(d, "red") for d in (0, 1, 4)]
    pruned, whole = (dict(adapted(R=r).loglikelihood(requests)) for r in (R, None))
    assert list(pruned) != pytest.approx(list(whole), abs=1e-2)


def test_losses_of_a_target_from_the_document_of_nothing_and_without_context(adapted):
    adapter = adapted()
    named, empty = weighed(0, lambda doc: doc["question"][:4]), weighed(0, "")
    assert adapter.loglikelihood([named]) == adapter.loglikelihood([weighed(0, "what")])
    assert adapter.loglikelihood([empty, named])[0] == (0.0, True)
    (loss, _), = adapter.loglikelihood([Request(("", "red"))])  # fmt: skip
    assert loss > 0


def test_likelihood_beyond_the_context(adapted):
    with pytest.raises(InputError, match="document 0 of task colours: the continuation has"):
        adapted().loglikelihood([weighed(0, "a " * 1000)])


# ---------------------------------------------------------------------- model_args


@pytest.mark.parametrize(
    ("model_args", "words"),
    [
        ({"retain": 64}, "unknown option 'retain'"),
        ({"r": 2}, "did you mean R"),
        ({"Pretrained": "x"}, "did you mean pretrained"),
        ({"R": "abc"}, "R is 'abc'; a number"),
        ({"R": True}, "R is True; a number"),
        ({"R": 99}, "retained tokens R is 99; legal is"),
        ({"R": 2, "retained_tokens": 2}, "R and retained_tokens are one option"),
        ({"pretrained": "a", "base": "b"}, "pretrained and base are one option"),
        ({"pruning": "magic"}, "pruning is 'magic'; known methods"),
        ({"pruning": "none", "R": 2}, "contradict"),
        ({"speculation": "perhaps"}, "speculation is 'perhaps'; true or false"),
        ({"speculation": False, "draft_length": 3}, "contradict"),
        ({"speculation": True, "twig": None}, "needs a twig"),
        ({"R": 2, "twig": None}, "needs a twig"),
        ({"batch_size": "auto"}, "batch_size is 'auto'; a number"),
        ({"batch_size": 0}, "batch_size is 0; 1 or more"),
        ({"batch_size": 1.5}, "batch_size is 1.5; a whole number"),
        ({"draft_length": -1.0}, "draft_length is -1"),
        ({"draft_confidence": 2}, "draft_confidence is 2"),
        ({"query": "first"}, "query is 'first'"),
        ({"K": 3}, "K = 3 was asked for, but the twig"),
        ({"dtype": "float8"}, "dtype is 'float8'"),
        ({"device": "abacus"}, "device is 'abacus'"),
        ({"attn_implementation": "magic"}, "magic"),
        ({"twig": "/nowhere"}, "twig /nowhere: no such folder"),
        ({"pretrained": "/nowhere", "twig": None}, "base model /nowhere: no such folder"),
    ],
)
def test_wrong_options_are_refused_before_any_task_is_read(adapted, model_args, words):
    with pytest.raises(InputError, match=words):
        adapted(**model_args)


def test_options_arrive(folders):
    adapter = Adapter(**folders, R=2.0, K=2, T=2, wipe_layer=5, batch_size="3", max_batch_size=64, pruning="random")
    assert adapter.vlm.config.F == 5 and adapter.batch_size == 3
    assert adapter.options.writing == {"retained_tokens": 2.0, "pruning": "random"}
    assert Adapter(**folders, R="none", pruning="none").options.writing == {}


def test_the_base_alone_is_the_baseline(adapted, folders):
    baseline = adapted(twig="none")
    assert baseline.vlm.twig is None
    assert baseline.generate_until([asked(0)]) == adapted().generate_until([asked(0)])


def test_ranks_come_from_the_launcher(adapted, monkeypatch):
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    adapter = adapted()
    assert (adapter._rank, adapter._world_size, adapter.device.type) == (3, 4, "cpu")


@needs_lmms_eval
@pytest.mark.slow
def test_nothing_of_lmms_eval_is_imported_before_it_is_wanted():
    code = (
        "import sys; import twigvlm.evaluation.lmms.plugin as m, twigvlm.evaluation.lmms.task\n"
        "assert not {'lmms_eval', 'datasets', 'torchvision'} & set(sys.modules)\n"
        "sys.modules['lmms_eval'] = None\n"
        "try: m.LmmsTwigVLM\n"
        "except ImportError: print('fine')\n"
        "assert not hasattr(m, 'SomethingElse')"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert out.stdout.strip() == "fine", out.stderr


@pytest.mark.skipif(INSTALLED, reason="lmms-eval is installed")
def test_the_task_writer_says_what_is_missing(tmp_path, capsys):
    assert write_task([str(tmp_path)]) == 2
    assert "docs/lmms-eval.md" in capsys.readouterr().err


# ---------------------------------------------------------------------- lmms-eval's own evaluator


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


MULTIPLE_CHOICE = """\
task: sprout_choice
dataset_path: {data}
dataset_kwargs: {{load_from_disk: true}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["Yes", "No"]
doc_to_target: "{{{{['yes', 'no'].index(answer)}}}}"
doc_to_visual: !function looking.picture
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    """A folder with the embedded world's POPE as a local task, and its questions once more as choices."""
    folder = tmp_path_factory.mktemp("task")
    world = ensure(tmp_path_factory.mktemp("world"), "pope")
    assert write_task([str(folder), "--pope", str(world / "pope")]) == 0
    (folder / "looking.py").write_text("def picture(doc):\n    return [doc['image']]\n")
    (folder / "choice.yaml").write_text(MULTIPLE_CHOICE.format(data=folder / "data"))
    return folder


@cache
def manager(folder: Path):
    """Of this folder's tasks alone: reading all that lmms-eval ships takes half a minute on a busy machine."""
    from lmms_eval.tasks import TaskManager

    return TaskManager("WARNING", include_path=str(folder), include_defaults=False, model_name="twigvlm")


def evaluated(folder: Path, name: str, model_args: str, **settings: Any) -> dict:
    from lmms_eval import evaluator

    settings = {"bootstrap_iters": 0, "process_docs_parallel": 1, "task_manager": manager(folder), **settings}
    return evaluator.simple_evaluate("twigvlm", model_args, tasks=[name], **settings)


@needs_lmms_eval
@pytest.mark.slow
def test_the_entry_point_names_the_class():
    from lmms_eval.api.model import lmms as base
    from lmms_eval.models import get_model, get_model_manifest

    entries = importlib.metadata.entry_points(group="lmms_eval.models")
    assert [e.value for e in entries if e.name == "twigvlm"] == ["twigvlm.evaluation.lmms:manifest"]
    assert get_model_manifest("twigvlm").simple_class_path == CLASS_PATH
    assert issubclass(get_model("twigvlm"), base) and get_model("twigvlm") is lmms.LmmsTwigVLM
    assert "torchvision" not in sys.modules


@needs_lmms_eval
@pytest.mark.slow
def test_its_evaluator_scores_what_the_model_says(task):
    """Every logged answer is the model's own, and the score is the count of right ones."""
    import datasets

    found = evaluated(task, "sprout_pope", "R=64,batch_size=4", limit=8)
    samples = found["samples"]["sprout_pope"]
    vlm = twigvlm.load()
    data = datasets.load_from_disk(str(task / "data"))["test"]
    right = 0
    for row, sample in zip(data, samples, strict=False):
        question = row["question"] + "\nAnswer the question using a single word or phrase."
        answer = vlm.answer(row["image"], question, retained_tokens=64, max_new_tokens=128)
        assert sample["filtered_resps"] == [answer]
        right += answer.lower() == row["answer"]
    assert len(samples) == 8
    assert found["results"]["sprout_pope"]["pope_accuracy,none"] == pytest.approx(right / 8)
    assert right > 5, "the embedded model knows such questions"
    measured = found["throughput"]
    assert measured["total_gen_tokens"] >= 8
    assert measured["avg_visual_tokens_asked"] == 64
    assert measured["avg_visual_tokens_measured"] == pytest.approx(64, abs=0.7)


@needs_lmms_eval
@pytest.mark.slow
def test_its_multiple_choice_takes_the_likelier_answer(task):
    found = evaluated(task, "sprout_choice", "R=64", limit=6, batch_size=2)
    samples = found["samples"]["sprout_choice"]
    right = 0
    for sample in samples:
        (yes, _), (no, _) = (tuple(r) for r in sample["filtered_resps"])
        right += (yes < no) == (sample["doc"]["answer"] == "yes")
    assert len(samples) == 6 and right >= 4
    assert found["results"]["sprout_choice"]["acc,none"] == pytest.approx(right / 6)


@needs_lmms_eval
@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_args", "words"),
    [("R=9", "legal is"), ("speed=1", "unknown option"), ("R=64,batch_size=0", "1 or more"), ("R", "name=value")],
)
def test_its_evaluator_passes_our_errors_on(task, model_args, words):
    with pytest.raises(InputError, match=words):
        evaluated(task, "sprout_pope", model_args)


LMMS_EVAL = """
import functools, runpy
from lmms_eval import tasks
tasks.TaskManager = functools.partial(tasks.TaskManager, include_defaults=False)
runpy.run_module("lmms_eval", run_name="__main__")
"""


@needs_lmms_eval
@pytest.mark.slow
def test_two_processes_answer_as_one(task, tmp_path):
    """Its command line under torchrun, which reads this folder's tasks alone."""
    (tmp_path / "lmms_eval_here.py").write_text(LMMS_EVAL)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words = shlex.split(
        "lmms_eval_here.py --model twigvlm --model_args R=64 --tasks sprout_pope --limit 5 --log_samples"
    )
    where = ["--include_path", str(task), "--output_path", str(tmp_path)]
    done = subprocess.run(
        [*torchrun, *words, *where], capture_output=True, text=True, env=environment(), cwd=tmp_path, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (results,), (samples,) = tmp_path.glob("**/*results.json"), tmp_path.glob("**/*samples*.jsonl")
    two = {line["doc_id"]: line["filtered_resps"] for line in map(json.loads, samples.read_text().splitlines())}
    alone = evaluated(task, "sprout_pope", "R=64", limit=5)
    assert two == {line["doc_id"]: line["filtered_resps"][0] for line in alone["samples"]["sprout_pope"]}
    assert len(two) == 5
    score = json.loads(results.read_text())["results"]["sprout_pope"]["pope_accuracy,none"]
    assert score == alone["results"]["sprout_pope"]["pope_accuracy,none"]


@pytest.mark.skipif(not INSTALLED, reason="lmms-eval is not installed")
@pytest.mark.slow
def test_the_commands_of_its_page_run(tmp_path):
    """All but the installation."""
    page = (ROOT / "docs" / "lmms-eval.md").read_text(encoding="utf-8")
    blocks = "".join(re.findall(r"```bash\n(.*?)```", page, re.S)).splitlines()
    for line in [line for line in blocks if line.startswith("python")]:
        words = shlex.split(line.replace("/tmp/twigvlm-task", str(tmp_path)).replace("--limit 12", "--limit 2"))
        done = subprocess.run(
            [sys.executable, *words[1:]], capture_output=True, text=True, env=environment(), cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr[-2000:]
    assert "pope_accuracy" in done.stdout


def test_its_page_names_every_option():
    page = (ROOT / "docs" / "lmms-eval.md").read_text(encoding="utf-8")
    assert [name for name in NAMES if f"`{name}`" not in page] == []
