"""Answers on disk: JSON lines that survive a power cut, one file a shard, merged into one. Knows nothing of models and scores."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import shortuuid

from ...errors import InputError, RunError
from ...files import Appender, alone, check_folder, encode, lock, read_lines, whole, write_bytes, write_json
from ..tasks.base import Question
from .setting import LATE

SETTINGS, MERGED, RESULT, UPLOAD, LOGS = "settings.json", "merge.jsonl", "result.json", "upload", "logs"
PER_QUESTION = "per_question.json"
SHARDS, FIGURES = "[0-9]*_[0-9]*.jsonl", "[0-9]*_[0-9]*.figures"
NAMED = 5  # offenders that an error names


def answer_line(question: Question, text: str, model: str, setting: str, metadata: Mapping | None = None) -> dict:
    """One line in LLaVA's format. The answer's id is a hash, so that a repeated run writes the same bytes."""
    identity = "\0".join((model, setting, question.id, question.prompt, text))
    line = {
        "question_id": question.id,
        "prompt": question.prompt,
        "text": text,
        "answer_id": shortuuid.uuid(name=whole(identity)),
        "model_id": model,
        "metadata": dict(metadata or {}),
    } | dict(question.line)
    if str(line["question_id"]) != question.id:  # the benchmark's own ids are not unique
        line["metadata"] = line["metadata"] | {"id": question.id}
    return line


def key_of(line: Mapping[str, Any]) -> str:
    """The id of the question that a line answers."""
    metadata = line.get("metadata")
    return str(metadata["id"] if isinstance(metadata, Mapping) and "id" in metadata else line.get("question_id"))


@dataclass(frozen=True)
class Folder:
    """`<out>/answers/<split>/<model>/<setting>`: the answers of one run and what was made of them."""

    path: Path

    def prepare(self, identity: Mapping[str, Any]) -> None:
        """Make sure that answers can be written here and that those present were made the same way.

        Raises InputError otherwise. Nothing is left behind in a folder that cannot be used.
        """
        check_folder(self.path, "--out")
        self.path.mkdir(parents=True, exist_ok=True)
        self.compare(identity)

    def record(self, identity: Mapping[str, Any]) -> None:
        """Note how the answers are made, or check that it was so noted."""
        with alone(self.path / f".{SETTINGS}.lock"):  # never over another's
            if not (self.path / SETTINGS).exists():
                write_json(dict(identity), self.path / SETTINGS)
        self.compare(identity)

    def compare(self, identity: Mapping[str, Any]) -> None:
        """Raise InputError for answers here that were made another way."""
        file = self.path / SETTINGS
        found = self.shard_files()  # looked for first: another shard writes its settings before its first answer
        if not file.exists():
            if found:
                raise InputError(f"{found[0]}: answers without {SETTINGS}, made nobody knows how; move them away")
            return
        try:
            noted = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as fault:
            raise InputError(f"{file}: cannot be read ({fault}); delete the folder to start anew") from fault
        known = {**dict.fromkeys((*noted, *identity)), **noted}
        asked = {**noted, **dict.fromkeys(noted.keys() - set(LATE) - identity.keys()), **identity}
        differ = [f"{key} {known[key]!r}, not {asked[key]!r}" for key in known if known[key] != asked[key]]
        if differ:
            raise InputError(
                f"{self.path}: its answers were made with {'; '.join(differ)}; choose another --out or delete the folder"
            )

    def tidy(self) -> None:
        """Remove what `prepare` made, where nothing was written since."""
        with contextlib.suppress(OSError):
            for folder in (self.path, *self.path.parents[:4]):
                folder.rmdir()

    def shard_files(self) -> list[Path]:
        return sorted(self.path.glob(SHARDS))

    def answers(self, questions: Sequence[Question]) -> dict[str, dict[str, Any]]:
        """Question id → its line, over all shards. Raises InputError, by name, for duplicate and foreign ones."""
        known = {q.id: q for q in questions}
        found: dict[str, dict[str, Any]] = {}
        duplicate, foreign, other = [], [], []
        for file in self.shard_files():
            for line in read_lines(file):
                key = key_of(line)
                if key not in known:
                    foreign.append(f"{key} in {file.name}")
                elif key in found:
                    duplicate.append(f"{key} in {file.name}")
                elif not isinstance(line.get("text"), str) or line.get("prompt") != _prompt(known[key]):
                    other.append(f"{key} in {file.name}")
                else:
                    found[key] = line
        _refuse(self.path, duplicate, "answers a question twice", "delete one of the lines")
        _refuse(self.path, foreign, "answers a question that was not asked", "delete the line, or choose another --out")
        _refuse(self.path, other, "answers another prompt", "delete the line, and it is asked again")
        return found

    def broken(self) -> dict[str, str]:
        """Question id → why it could not be asked, as the shards noted."""
        lines = [line for file in sorted(self.path.glob(FIGURES)) for line in read_lines(file)]
        return {line["broken"]: line["reason"] for line in lines if "broken" in line}

    def merge(self, questions: Sequence[Question], skipped: Mapping[str, dict]) -> list[dict[str, Any]]:
        """Write all answers in the order of the questions; their lines. `skipped` stand in for broken ones.

        Raises InputError for a missing answer, and as `answers` does.
        """
        found = self.answers(questions)
        missing = [q.id for q in questions if q.id not in found and q.id not in skipped]
        _refuse(self.path, missing, "has no answer", "run again without --num-shards/--shard, and it is asked")
        lines = [found[q.id] if q.id in found else skipped[q.id] for q in questions]
        try:
            write_bytes(b"".join(map(encode, lines)), self.path / MERGED)
        except OSError as fault:
            raise RunError(f"{self.path / MERGED}: cannot be written ({fault.strerror})") from fault
        return lines


def open_shard(folder: Folder, index: int, count: int) -> tuple[Appender, Appender]:
    """The files of a shard's answers and figures. Raises InputError while a run with another count is going on."""
    for file in folder.shard_files():
        if int(file.stem.split("_")[0]) != count:
            lock(file).release()  # a run with another number of shards may be writing here
    name = f"{count}_{index}"
    return Appender(folder.path / f"{name}.jsonl"), Appender(folder.path / f"{name}.figures", durable=False)


def _prompt(question: Question) -> str:
    return question.line.get("prompt", question.prompt)


def _refuse(folder: Path, names: Sequence[str], what: str, remedy: str) -> None:
    if names:
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        raise InputError(f"{folder}: {', '.join(names[:NAMED])}{more} {what}; {remedy}")
