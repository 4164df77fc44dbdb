"""Other ways to put the same question, as people type: for training data, not for the benchmarks' own formats."""

from __future__ import annotations

import random
import re
from dataclasses import replace

from .questions import LETTER, SINGLE_WORD, YES_NO, Question

BRIEF = ("Answer briefly.", "Answer with one word.", "One word, please.")
# What a question may look like instead; `\1` is what it asks about. The first rule that fits is used.
RULES = tuple(
    (re.compile(pattern), forms)
    for pattern, forms in (
        (r"(?:Is there|Can you see) (an? .+?)(?: in the (?:image|picture))?\?", (
            r"Is there \1?", r"Is \1 in the picture?", r"Do you see \1?", r"Does the image show \1?")),
        (r"What colour is (.+)\?|What is the colour of (.+)\?|Which colour does (.+) have\?", (
            r"What color is \1?", r"Tell me the colour of \1.", r"\1: what colour?", r"What colour does \1 have?")),
        (r"What shape is (.+)\?|What is the shape of (.+)\?|Which shape does (.+) have\?", (
            r"What shape does \1 have?", r"Tell me the shape of \1.", r"\1: what shape?", r"What is \1?")),
        (r"How many (.+) are (?:there|in the image)\?|Count the (.+)\.", (
            r"How many \1 do you see?", r"How many \1?", r"What is the number of \1?", r"How many \1 does the picture show?")),
        (r"Where (?:in the image )?is (.+)\?|In which part of the picture is (.+)\?", (
            r"Where is \1 in the picture?", r"What is the place of \1?", r"Where can you see \1?", r"\1: where?")),
        (r"What word is written in the image\?|What does the text say\?|Which word can be read in the picture\?", (
            "What is written?", "Read the text.", "Read the word in the image.", "What is the word?")),
        (r"Are there more (.+) than (.+)\?", (r"Are more \1 than \2 in the picture?", r"More \1 than \2?")),
    )
)  # fmt: skip
DESCRIPTIONS = (
    "Describe the image.", "Describe the picture.", "Describe the picture in detail.", "What do you see?",
    "What is in the picture?", "Please describe the image in detail.", "Tell me everything that is in the image.",
)  # fmt: skip
OTHER_SHARE, BRIEF_SHARE, CARELESS_SHARE = 0.4, 0.15, 0.1


def rephrase(question: Question, rng: random.Random) -> Question:
    """The same question, perhaps in other words, with another hint, or typed carelessly."""
    if question.kind == "describe":
        return replace(question, text=rng.choice(DESCRIPTIONS)) if rng.random() < OTHER_SHARE else question
    line, *rest = question.text.split("\n")
    line, *hint = line.split(f" {YES_NO}")[:1] + [f" {YES_NO}"] * (YES_NO in line)
    if rng.random() < OTHER_SHARE:
        line = _other(line, rng)
    if rng.random() < CARELESS_SHARE:
        line = line[0].lower() + line[1:].rstrip("?.")
    if question.kind != "choice" and not hint and rest in ([], [SINGLE_WORD]) and rng.random() < BRIEF_SHARE:
        rest = [rng.choice(BRIEF)]
    if rest and rest[-1] == LETTER and rng.random() < BRIEF_SHARE:
        rest[-1] = "Answer with the letter."
    return replace(question, text="\n".join(["".join([line, *hint]), *rest]))


def forms(question: Question, rng: random.Random) -> dict[str, Question]:
    """The same short question (no choice) as people may put it: bare, with either hint, in other words, carelessly."""
    line = question.text.split("\n")[0].removesuffix(f" {YES_NO}")
    texts = {
        "bare": line,
        "hint": f"{line}\n{SINGLE_WORD}",
        "brief": f"{line}\n{rng.choice(BRIEF)}",
        "other words": _other(line, rng),
        "careless": line[0].lower() + line[1:].rstrip("?."),
    }
    return {name: replace(question, text=text) for name, text in texts.items()}


def _other(line: str, rng: random.Random) -> str:
    """The first line of a question in other words; unchanged where no rule fits."""
    for pattern, forms in RULES:
        if match := pattern.fullmatch(line):
            said = [part for part in match.groups() if part]
            form = rng.choice(forms)
            for number, part in enumerate(said, 1):
                form = form.replace(f"\\{number}", part)
            return form[0].upper() + form[1:]
    return line
