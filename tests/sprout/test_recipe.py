"""The embedded base's recipe: rows that equal what users ask, growth that keeps the function, measures that measure."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from twigvlm.prompt.template import VICUNA_V1, encode
from twigvlm.sprout import measure
from twigvlm.sprout.measure import Asked
from twigvlm.sprout.recipe.drills import DRILLS, drill
from twigvlm.sprout.recipe.language import BACK, LOOKING, Talk, double, start
from twigvlm.sprout.recipe.lessons import Lesson, lesson_batch, patches
from twigvlm.sprout.recipe.stage import StageConfig
from twigvlm.sprout.recipe.talk import collate, converse, short_question, single
from twigvlm.sprout.recipe.tokenizer import build_tokenizer
from twigvlm.sprout.recipe.tower import SIDE, pixels
from twigvlm.sprout.train import STAGES, Course, config
from twigvlm.training.muon import Muon, for_decoder, orthogonal
from twigvlm.world.draw import draw
from twigvlm.world.phrasing import DESCRIPTIONS, forms, rephrase
from twigvlm.world.questions import DESCRIBE, KINDS, ask
from twigvlm.world.scenes import COLOURS, PLACES, SHAPES, SPLITS, WORDS, sample_scene

CPU = torch.device("cpu")
TALKS = [stage for stage in STAGES if stage.lesson.kind not in ("windows", "labels")]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def tiny(tokenizer, layers: int = 4, seed: int = 0):
    """A model whose layers do something."""
    return start(config(layers, 32, tokenizer), seed)


def asked_of(tokenizer, scenes: int = 3, kinds=("colour", "count")) -> Asked:
    world = measure.scenes_of("validation", scenes)
    numbers, questions, rows = zip(*measure.quiz(world, tokenizer, kinds), strict=True)
    return Asked(list(numbers), [q.kind for q in questions], list(rows), *measure.views(world, tokenizer, False))


def test_orthogonal_changes_have_singular_values_near_one():
    for shape in ((3, 16, 16), (2, 16, 40), (2, 40, 16)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(1))))
        assert values.min() > 0.3 and values.max() < 1.3


def test_muon_goes_on_from_its_state_to_the_same_bits():
    def run(steps, weights, state=None):
        layer = torch.nn.Linear(8, 8)
        layer.load_state_dict(weights)
        optimizer = Muon([layer.weight], [layer.bias], 0.02)
        if state:
            optimizer.load_state_dict(state)
        for i in steps:
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(i))
            optimizer.zero_grad()
            (layer(x) - x).square().mean().backward()
            optimizer.step()
        return {k: v.clone() for k, v in layer.state_dict().items()}, optimizer.state_dict()

    begin = torch.nn.Linear(8, 8).state_dict()
    whole, _ = run(range(6), begin)
    half = run(range(3), begin)
    again, _ = run(range(3, 6), *half)
    assert all(torch.equal(whole[k], again[k]) for k in whole)


def test_only_the_decoders_matrices_are_made_orthogonal(tokenizer):
    model = tiny(tokenizer)
    optimizer = for_decoder(model, StageConfig("x", 1, 0.01))
    hidden, others = ({id(p) for p in group["params"]} for group in optimizer.param_groups)
    decoder = model.model.language_model
    assert {id(p) for layer in decoder.layers for p in layer.parameters() if p.ndim == 2} == hidden
    assert id(decoder.embed_tokens.weight) in others and id(decoder.norm.weight) in others
    assert model.lm_head.weight is decoder.embed_tokens.weight


@pytest.mark.parametrize("system", [True, False])
def test_a_row_is_what_the_stock_model_sees(tokenizer, system):
    """Ids, the picture's place and the positions: Talk's guesses are those of LlavaForConditionalGeneration."""
    scene = sample_scene("validation", 1)
    question = ask(scene, "colour", random.Random(0))
    row = single(question, tokenizer, system)
    model = tiny(tokenizer)
    values = pixels([draw(scene)])
    batch = collate([row]) | {"pixels": values, "keep": torch.arange(SIDE * SIDE)}
    text = VICUNA_V1.render([(f"<image>\n{question.text}", question.answer)])
    if not system:
        text = text.removeprefix(f"{VICUNA_V1.system} ")
    ids = torch.tensor([encode(tokenizer, text, model.config.image_token_index, SIDE * SIDE)])
    with torch.no_grad():
        mine = Talk(model).logits(batch)[0, row.head :]
        stock = model(input_ids=ids, pixel_values=values).logits[0, row.head + SIDE * SIDE :]
    torch.testing.assert_close(mine, stock, atol=1e-4, rtol=1e-4)


def test_a_start_looks_back(tokenizer):
    """The heads of BACK attend to the token so many places before, over text and symbols alike."""
    model = start(config(1, 128, tokenizer))
    task, batch = Talk(model), lesson_batch(0, Lesson(0, scenes=2), tokenizer)
    hidden, positions = task.embed(batch)
    part = task.layers[0].self_attn
    task.decoder.config._attn_implementation = "eager"
    mask = torch.full((hidden.shape[1], hidden.shape[1]), -torch.inf).triu(1)[None, None]
    rotary = task.decoder.rotary_emb(hidden, positions)
    _, weights = part(task.layers[0].input_layernorm(hidden), position_embeddings=rotary, attention_mask=mask)
    words = batch["heads"].max().item() + 9 + max(BACK.values())
    for head, back in BACK.items():
        assert weights[:, head].diagonal(-back, 1, 2)[:, words:].min() > 0.9


def test_drills_tell_the_truth(tokenizer):
    """Every fact named is the scene's; letters stand for their options; all kinds are drawn."""
    kinds = set()
    for seed in range(300):
        scene = sample_scene("train", seed)
        question = drill(scene, random.Random(seed))
        kinds.add(question.kind)
        text, said = question.text, question.answer.split(", ")
        if question.kind == "differ":
            one, other = (named(scene, name) for name in text.rstrip("?").lower().split(" and "))
            assert (said[0] == "left") == (one.column < other.column), text
            assert (said[0] == "right") == (one.column > other.column), text
            assert (said[1] == "above") == (one.row < other.row) and (said[1] == "below") == (one.row > other.row), text
            assert (said[2] == "larger") == ((one.size, other.size) == ("large", "small")), text
            assert (said[2] == "same") == (one.size == other.size), text
            assert said[3:] == [("No", "Yes")[one.colour == other.colour], ("No", "Yes")[one.shape == other.shape]]
        elif question.kind == "size":
            [name] = re.findall("the ([a-z ]+?)(?= small|[?])", text)
            assert said == [named(scene, name).size], text
        elif question.kind == "places":
            what = text.rstrip("?").split(" the ")[-1].removesuffix("s")
            assert said == [PLACES[o.place] for o in scene.objects if fits(o, what)], text
        elif question.kind == "counts":
            numbers = {name: int(number) for name, number in (s.split(": ") for s in said)}
            assert all(numbers[name] == sum(fits(o, name) for o in scene.objects) for name in numbers), text
            assert sum(numbers.values()) == len(scene.objects)
        elif question.kind == "facts":
            assert all(PLACES[named(scene, name).place] == place for name, place in (s.split(": ") for s in said))
        else:
            assert all(f"{letter}. {option}" in text for option, letter in (s.split(": ") for s in said)), text
    assert kinds == {kind.__name__ for kind in DRILLS}


def named(scene, name: str):
    """The one object of the scene with this name."""
    [found] = [o for o in scene.objects if fits(o, name.removeprefix("the "))]
    return found


def fits(obj, name: str) -> bool:
    """An object goes by this name ("red star", "stars", "red object")."""
    return set(name.replace("crosse", "cross").split()) <= {obj.colour, obj.shape, "object"}


def test_usual_answers_are_asked_less(tokenizer):
    """Neither ones among counts nor refusals among comparisons are most of the answers."""
    said = {"count": [], "compare": []}
    for seed in range(1500):
        question = short_question(sample_scene("train", seed), random.Random(seed), 0.0)
        if question and question.kind in said and "larger" not in question.text:
            said[question.kind].append(question.answer)
    for kind, usual in (("count", "1"), ("compare", "No")):
        assert 0.2 < said[kind].count(usual) / len(said[kind]) < 0.5


def test_a_wiped_batch_shows_the_last_quarter_no_picture(tokenizer):
    """As the measures' pruned pass with every visual token kept up to there; and it makes a difference."""
    task, batch = Talk(tiny(tokenizer, 8)), lesson_batch(0, Lesson(0, scenes=3), tokenizer)
    with torch.no_grad():
        hidden, positions = task.embed(batch)
        entering = task.run(hidden, positions, task.layers[:LOOKING])
        count = hidden.shape[1] - batch["ids"].shape[1]
        every = batch["heads"][:, None] + torch.arange(count)
        wanted = measure.through_pruned(task, batch, entering, positions, every, LOOKING, 6)
        found = task.guesses(task.upwards(entering, positions, batch | {"wiped": True}), batch)
        whole = task.guesses(task.upwards(entering, positions, batch), batch)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found, whole, atol=1e-3)


def test_doubling_nearly_keeps_the_function(tokenizer):
    shallow = tiny(tokenizer)
    deep = double(double(shallow, config(8, 32, tokenizer)), config(16, 32, tokenizer))
    batch = lesson_batch(0, Lesson(0, scenes=2), tokenizer)
    with torch.no_grad():
        one, other = Talk(shallow).logits(batch), Talk(deep).logits(batch)
        none = Talk(shallow).logits(batch, [])
    assert len(deep.model.language_model.layers) == 16
    assert (one - other).norm() < 0.5 * (one - none).norm()


def test_conversations_have_every_shape(tokenizer):
    """With and without the system sentence, descriptions first, last and in between, none too long; answers count."""
    lesson = Lesson(0, described=0.5, drilled=0.0)
    rows = [converse(sample_scene("train", i), random.Random(i), tokenizer, lesson) for i in range(60)]
    assert {row.head for row in rows} == {3, 32} or len({row.head for row in rows}) == 2
    assert all(len(row.ids) <= 160 and len(row.turns) >= 2 for row in rows)
    places = set()
    for row in rows:
        kinds = [q.kind for q, _, _ in row.turns]
        assert kinds.count("describe") <= 1
        if "describe" in kinds:
            at = kinds.index("describe")
            places.add("first" if at == 0 else "last" if at == len(kinds) - 1 else "between")
        for question, begin, end in row.turns:
            assert tokenizer.decode(row.ids[begin:end]).strip() == f"{question.answer}</s>"
            assert all(w >= 0.5 for w in row.weights[begin:end])
    assert places == {"first", "last", "between"}


def test_other_phrasings_ask_the_same(tokenizer):
    """Names and options stay; every kind has other words; what a benchmark asks is not touched."""
    for kind in KINDS:
        seen = 0
        for i in range(200):
            question = ask(sample_scene("train", i), kind, random.Random(i))
            if not question:
                continue
            other = rephrase(question, random.Random(i))
            assert (other.kind, other.answer, other.options) == (question.kind, question.answer, question.options)
            assert names(other.text) == names(question.text)
            assert other.text.split("\n")[1:5] == question.text.split("\n")[1:5] or kind != "choice"
            seen += other.text != question.text
        assert seen > 10
    told = {rephrase(ask(sample_scene("train", 0), "describe", r), r).text for r in map(random.Random, range(80))}
    assert told & set(DESCRIPTIONS) and told & set(DESCRIBE)


def names(text: str) -> list[str]:
    """The shapes and colours in a question's first line."""
    return [w for w in re.findall("[a-z]+", text.split("\n")[0]) if w in (*SHAPES, *COLOURS)]


@pytest.mark.parametrize("stage", TALKS, ids=lambda s: s.name)
def test_lessons_are_functions_of_the_step_about_training_scenes(tokenizer, stage, monkeypatch):
    seeds = []
    real = sample_scene
    monkeypatch.setattr(
        "twigvlm.sprout.recipe.lessons.sample_scene",
        lambda split, seed: seeds.append((split, seed)) or real(split, seed),
    )
    lesson = replace(stage.lesson, scenes=2)
    one, other = (lesson_batch(5, lesson, tokenizer) for _ in range(2))
    assert all(torch.equal(v, other[k]) if torch.is_tensor(v) else v == other[k] for k, v in one.items())
    assert {split for split, _ in seeds} == {SPLITS[0]}
    assert len(one["ids"]) == 2 * lesson.talks == len(one["of"])
    following = lesson_batch(6, lesson, tokenizer)
    assert following["ids"].shape != one["ids"].shape or not torch.equal(one["ids"], following["ids"])


def test_no_two_stages_see_the_same_scenes():
    offsets = [stage.lesson.offset for stage in TALKS]
    assert len(set(offsets)) == len(offsets)
    assert all(stage.steps * stage.lesson.scenes < 1 << 28 for stage in STAGES)


def test_attention_is_taught_in_the_middle_alone_and_not_to_the_end():
    """No loss on attention in what becomes layers 0..7 of 32, and none in the last third of the training."""
    for stage in STAGES:
        if stage.lesson.helped:
            assert LOOKING * 32 // stage.layers >= 8 and (LOOKING + 1) * 32 // stage.layers - 1 <= 20
            rest = sum(s.steps for s in STAGES[STAGES.index(stage) + 1 :])
            assert stage.lesson.helped <= stage.steps and rest > sum(s.steps for s in STAGES) / 3


def test_the_loss_on_looking_falls_when_a_token_looks_at_what_it_names(tokenizer):
    model, batch = tiny(tokenizer), lesson_batch(0, Lesson(0, scenes=4, helped=10), tokenizer)
    assert batch["looks"].any() and batch["help"] > 0
    _, figures = Talk(model).loss(batch)
    optimizer = torch.optim.Adam(model.model.language_model.layers[LOOKING].self_attn.parameters(), 0.01)
    task = Talk(model)
    for _ in range(30):
        hidden, positions = task.embed(batch)
        distance = task.looking(batch, task.run(hidden, positions, task.layers[:LOOKING]), positions)
        optimizer.zero_grad()
        distance.backward()
        optimizer.step()
    assert distance.item() < 0.7 * figures["looking"]


def test_printed_words_say_that_they_are_words(tokenizer):
    scene = next(s for s in (sample_scene("train", i) for i in range(50)) if s.word)
    symbols = patches(scene, tokenizer)
    word, mark = (encode(tokenizer, w, -1, 0, bos=False)[0] for w in (scene.word, "word"))
    written = (symbols == word).any(-1)
    assert written.any() and torch.equal(written, (symbols == mark).any(-1))
    assert scene.word in WORDS


def test_skipping_layers_that_do_nothing_changes_nothing(tokenizer):
    model, asked = tiny(tokenizer), asked_of(tokenizer)
    with torch.no_grad():
        for layer in model.model.language_model.layers[1:3]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    task = Talk(model)
    whole = [task.logits(b) for _, b in asked.batches(CPU)]
    skipped = [task.logits(b, [task.layers[0], task.layers[3]]) for _, b in asked.batches(CPU)]
    other = [task.logits(b, task.layers[:2]) for _, b in asked.batches(CPU)]
    assert all(torch.equal(a, b) for a, b in zip(whole, skipped, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(whole, other, strict=True))
    assert measure.without_blocks(task, asked, 1, 2).keys() == {1, 2}


def taught(tokenizer, asked: Asked):
    """A tiny model that knows the answers to these rows by heart, so that accuracies differ from zero."""
    model = tiny(tokenizer)
    task, (rows, batch) = Talk(model), next(asked.batches(CPU))
    optimizer = torch.optim.Adam(model.model.language_model.parameters(), 0.01)
    batch["weights"] = torch.zeros_like(batch["weights"])
    for i, row in enumerate(rows):
        batch["weights"][i, row.turns[0][1] : row.turns[0][2]] = 1
    for _ in range(60):
        loss, _ = task.loss(batch | {"help": 0.0})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return task


def test_measures_agree_where_they_must(tokenizer):
    """The lens' last layer is the model; pruning that keeps all is no pruning; keeping nothing is worse or equal."""
    asked = asked_of(tokenizer, 4)
    task = taught(tokenizer, asked)
    right = measure.answers(task, asked)
    whole = measure.percent(right)
    assert whole > 50
    told = measure.share(right, asked.scenes)
    assert measure.lens(task, asked)[-1] == told and told.percent == whole
    curve = measure.looking_curve(task, asked, keep=9, K=1, F=4)
    assert curve.keys() == {"0", "1", "2", "3", "random"} and set(curve.values()) == {told}
    low, high = measure.interval(right, asked.scenes)
    assert low <= whole <= high
    kinds = measure.by_kind(right, asked)
    assert kinds.keys() == {"colour", "count"}
    for kind, share in kinds.items():
        own = [r for r, k in zip(right, asked.kinds, strict=True) if k == kind]
        assert share.low <= share.percent == measure.percent(own) <= share.high and share.asked == len(own)


def test_attention_is_the_layers_own(tokenizer):
    model, asked = tiny(tokenizer), asked_of(tokenizer, 2)
    task, (rows, batch) = Talk(model), next(asked.batches(CPU))
    hidden, positions = task.embed(batch)
    last = torch.tensor([row.turns[0][1] - 1 for row in rows]) + 9
    seen = measure.attention(task, task.layers[0], hidden, positions, last)
    task.decoder.config._attn_implementation = "eager"
    layer, width = task.layers[0], hidden.shape[1]
    mask = torch.full((width, width), -torch.inf).triu(1)[None, None]
    _, weights = layer.self_attn(
        layer.input_layernorm(hidden), position_embeddings=task.decoder.rotary_emb(hidden, positions),
        attention_mask=mask,
    )  # fmt: skip
    own = weights[torch.arange(len(last)), :, last].mean(1)
    torch.testing.assert_close(seen, own, atol=1e-5, rtol=1e-4)


def test_intervals_draw_scenes_not_questions():
    right, scenes = [[True]] * 50 + [[False]] * 50, [i // 50 for i in range(100)]
    assert measure.interval(right, scenes) == (0.0, 100.0)
    narrow = measure.interval(right, list(range(100)))
    assert 35 < narrow[0] < 50 < narrow[1] < 65


def test_turns_are_asked_in_any_order(tokenizer):
    rows = [row for _, row in measure.talks(measure.scenes_of("test", 20), tokenizer)]
    assert all(len(row.turns) == 4 for row in rows)
    assert {[q.kind for q, _, _ in row.turns].index("describe") for row in rows} == {0, 1, 2, 3}


def test_a_description_can_be_the_second_turn(tokenizer):
    for _, row in measure.afterwards(measure.scenes_of("test", 5), tokenizer):
        (first, _, _), (second, begin, _) = row.turns
        assert first.kind != "describe" and second.text == DESCRIBE[0]
        assert tokenizer.decode(row.ids[:begin]).endswith(f"USER: {DESCRIBE[0]} ASSISTANT:")


def test_phrasings_ask_the_same_in_every_way(tokenizer):
    """All forms, each with and without the system sentence, over all kinds; what is asked about stays."""
    world = measure.scenes_of("test", 20)
    asked = measure.phrased(world, tokenizer)
    ways = forms(ask(world[0], "colour", random.Random(0)), random.Random(0))
    assert len(asked) == 2 * len(ways) == len(set(asked))
    assert len({question.text for question in ways.values()}) == len(ways)
    for name, rows in asked.items():
        heads = {row.head for _, row in rows}
        assert len(heads) == 1 and (max(heads) < 10) == ("without" in name), name
        assert len({row.turns[0][0].kind for _, row in rows}) > 2


def test_measure_names_what_it_needs(capsys, tmp_path):
    assert measure.main(["--what", "luck", "--base", "x"]) == 2
    assert "luck" in capsys.readouterr().err
    assert measure.main(["--base", "x", "--checkpoint", "y"]) == 2
    assert "either --base FOLDER" in capsys.readouterr().err
    assert measure.main(["--checkpoint", str(tmp_path / "none.pt")]) == 2
    assert "none.pt" in capsys.readouterr().err


def test_a_checkpoint_can_be_measured_too(tmp_path, tokenizer):
    model = tiny(tokenizer)
    weights = {k: v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(weights, tmp_path / "model.safetensors")
    loaded = Course(tmp_path, hidden=32).load(tmp_path / "model.safetensors").state_dict()
    assert all(torch.equal(v, loaded[k]) for k, v in weights.items())


def test_measure_reads_any_stages_file(capsys, tmp_path, tokenizer):
    """Depth and width are the file's; what has no eyes is shown no pictures; the figures are written."""
    words = {k: v for k, v in tiny(tokenizer, 2).state_dict().items() if "vision_tower" not in k}
    torch.save({"weights": words, "step": 3}, tmp_path / "words.pt")
    flags = ["--checkpoint", str(tmp_path / "words.pt"), "--scenes", "1"]
    assert measure.main([*flags, "--pictures"]) == 2
    assert "holds no tower" in capsys.readouterr().err
    assert measure.main([*flags, "--out", str(tmp_path / "figures.json")]) == 0
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found["layers"] == 2 and len(found["lens"]) == 2 and {f"turn {i}" for i in range(1, 5)} <= found.keys()
    assert found["all"]["low"] <= found["all"]["percent"] <= found["all"]["high"]
    assert found["described in the second turn"]["asked"] == 1 == found["descriptions, exact"]["asked"]
    assert found["looking"].keys() == {"0", "1", "random"} and found["layers skipped at once"] == 1


def test_turns_stand_beside_the_same_questions_alone(tokenizer, tmp_path):
    """By itself a question of a conversation is the same question; all figures have intervals and become JSON."""
    task, scenes = Talk(tiny(tokenizer)), measure.scenes_of("test", 3)
    found = measure.measure(task, tokenizer, scenes, ("skip", "lens", "looking", "turns"), False)
    assert found["the same questions alone"].asked == 12
    share, low, high = found["turns over the same alone, %"]
    assert low <= share <= high
    plain = json.loads(json.dumps(measure._plain(found)))
    for one in (*plain["without those from"].values(), *plain["lens"], *plain["looking"].values(), plain["turn 1"]):
        assert one.keys() == {"percent", "low", "high", "asked"}
