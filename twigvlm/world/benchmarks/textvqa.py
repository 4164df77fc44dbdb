"""TextVQA: words to be read, ten answers to each question, OCR tokens for some."""

from __future__ import annotations

import re

from ..draw import IMAGE_SIZE
from ..questions import SINGLE_WORD
from .folder import Folder
from .pool import Asked, gather, in_order, people, scene, with_word

TEXT_SCENES = 50  # with a word; half of them come with OCR tokens
BLANK_SCENES = 25  # without one


def write(out: Folder) -> None:
    words, blank = with_word(TEXT_SCENES), with_word(BLANK_SCENES, word=False)
    asked = gather("textvqa", "read", words, 2 * TEXT_SCENES, lambda q: q.answer not in ("Yes", "No"))
    asked += gather("textvqa", "read", words[::2], BLANK_SCENES, lambda q: q.answer == "Yes")
    asked += gather("textvqa", "read", blank, BLANK_SCENES, lambda q: q.answer == "No")
    tokens = {seed: [scene(seed).word] if seed in words[1::2] else [] for seed in words + blank}
    lines, data = [], []
    for number, q in enumerate(in_order(asked)):
        key = f"{q.seed:016x}"
        reference = [f"Reference OCR token: {', '.join(tokens[q.seed])}"] if tokens[q.seed] else []
        text = "\n".join([q.text, *reference, SINGLE_WORD])
        lines.append({"question_id": key, "image": f"{key}.jpg", "text": text, "category": "default"})
        data.append(_textvqa_item(number, key, q))
        out.picture(f"train_images/{key}.jpg", q.seed)
    head = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    out.lines("llava_textvqa_val_v051_ocr.jsonl", lines)
    out.json("TextVQA_0.5.1_val.json", {**head, "data": data})
    rows = [{"image_id": f"{seed:016x}", "ocr_tokens": found, "ocr_info": []} for seed, found in tokens.items()]
    out.json("TextVQA_Rosetta_OCR_v0.2_val.json", {**head, "data": rows})


def _textvqa_item(number: int, key: str, q: Asked) -> dict:
    return {
        "question": q.text,
        "image_id": key,
        "image_classes": sorted({o.shape for o in scene(q.seed).objects}),
        "flickr_original_url": "",
        "flickr_300k_url": "",
        "image_width": IMAGE_SIZE,
        "image_height": IMAGE_SIZE,
        "answers": people(q.right.lower(), f"textvqa {number}"),
        "question_tokens": re.findall(r"\w+", q.text.lower()),
        "question_id": number,
        "set_name": "val",
    }
