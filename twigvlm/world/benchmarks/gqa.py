"""GQA: questions, scene graphs and programs, as far as its figures need them."""

from __future__ import annotations

from collections.abc import Iterable

from ..draw import IMAGE_SIZE, _box
from ..questions import SINGLE_WORD
from ..scenes import SceneObject
from .folder import Folder
from .pool import SCENES, Asked, balanced, gather, in_order, scene

_STRUCTURE = {  # kind → GQA's structural and semantic type
    "exist": ("verify", "obj"),
    "relation": ("verify", "rel"),
    "compare": ("compare", "attr"),
    "colour": ("query", "attr"),
    "shape": ("query", "cat"),
    "where": ("query", "rel"),
}


def write(out: Folder) -> None:
    asked = balanced("gqa", "exist", SCENES, 40) + balanced("gqa", "relation", SCENES, 32)
    asked += gather("gqa", "relation", SCENES, 16, lambda q: q.answer not in ("Yes", "No"))
    asked += balanced("gqa", "compare", SCENES, 32)
    for kind, count in (("colour", 32), ("shape", 28), ("where", 20)):
        asked += gather("gqa", kind, SCENES, count)
    questions, lines = {}, []
    for number, q in enumerate(in_order(asked)):
        key, image = f"20{number:06d}", f"n{q.seed}"
        questions[key] = _gqa_question(key, image, q)
        text = f"{q.text}\n{SINGLE_WORD}"
        lines.append({"question_id": key, "image": f"{image}.jpg", "text": text, "category": "default"})
        out.picture(f"data/images/{image}.jpg", q.seed)
    out.lines("llava_gqa_testdev_balanced.jsonl", lines)
    out.json("data/testdev_balanced_questions.json", questions)
    out.json("data/testdev_balanced_sceneGraphs.json", {f"n{q.seed}": _scene_graph(q.seed) for q in in_order(asked)})


def _gqa_question(key: str, image: str, q: Asked) -> dict:
    structural, semantic = _STRUCTURE[q.kind]
    if structural == "verify" and q.answer not in ("Yes", "No"):
        structural = "choose"
    answer = q.answer.lower()
    return {
        "semantic": _program(q),
        "entailed": [key],
        "equivalent": [key],
        "question": q.text,
        "imageId": image,
        "isBalanced": True,
        "groups": {"global": q.kind if structural == "query" else None, "local": f"{q.kind}-{image}"},
        "answer": answer,
        "semanticStr": "->".join(f"{step['operation']}: {step['argument']}" for step in _program(q)),
        "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
        "types": {"detailed": q.kind, "semantic": semantic, "structural": structural},
        "fullAnswer": f"{q.answer[0].upper()}{q.answer[1:]}.",
    }


def _program(q: Asked) -> list[dict]:
    """GQA's functional program, as far as its length and operations count: select, relate, and what is asked."""

    def step(operation: str, argument: str, *dependencies: int) -> dict:
        return {"operation": operation, "dependencies": list(dependencies), "argument": argument}

    things = [o for o in scene(q.seed).objects if o.shape in q.text or o.name in q.text] or scene(q.seed).objects[:1]
    select = step("select", f"{things[0].shape} ({things[0].place})")
    if q.kind == "exist":
        return [select, step("exist", "?", 0)]
    if q.kind == "relation":
        return [select, step("relate", "object,relation,s", 0), step("verify rel", "relation", 1)]
    if q.kind == "compare":
        return [select, step("select", "object"), step("same attr", "attribute", 0, 1)]
    argument = {"colour": "color", "shape": "shape", "where": "hposition"}[q.kind]
    return [select, step("query", argument, 0)]


def _scene_graph(seed: int) -> dict:
    objects = scene(seed).objects
    return {
        "width": IMAGE_SIZE,
        "height": IMAGE_SIZE,
        "objects": {str(o.place): _graph_object(o, objects) for o in objects},
    }


def _graph_object(obj: SceneObject, objects: Iterable[SceneObject]) -> dict:
    left, top, diameter = _box(obj)
    relations = []
    for other in objects:
        if obj.column != other.column:
            side = "left" if obj.column < other.column else "right"
            relations.append({"name": f"to the {side} of", "object": str(other.place)})
    box = {"x": left, "y": top, "w": diameter, "h": diameter}
    return {"name": obj.shape, **box, "attributes": [obj.colour, obj.size], "relations": relations}
