"""One benchmark under one setting: its files, its folder of answers, its result.

Knows no model: what is asked here was answered elsewhere. Standard library only.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...files import alone, write_json
from ..tasks.base import Question, Score, Source, Task
from ..tasks.reading import write_whole
from .answers import MERGED, PER_QUESTION, RESULT, UPLOAD, Folder, answer_line
from .costs import summary
from .setting import EMBEDDED_DATA, EMBEDDED_NAME, Setting, default_data

PIECE = 8  # neighbouring questions that go to one shard, unless batches are larger


@dataclass(frozen=True)
class Job:
    """What is asked, of which model, and where the answers go."""

    task: Task
    setting: Setting
    data: Path
    split: str
    out: Path
    skip_broken: bool = False

    @cached_property
    def files(self) -> dict[str, Path]:
        return self.task.files(self.data, self.split)

    @cached_property
    def questions(self) -> list[Question]:
        """Those that are asked, in the benchmark's order."""
        return self._every[: self.setting.limit]

    @property
    def in_all(self) -> int:
        """Questions of the whole benchmark."""
        return len(self._every)

    @property
    def every(self) -> list[Question]:
        """Those of the whole benchmark."""
        return self._every

    @cached_property
    def _every(self) -> list[Question]:
        stamp = self.files["questions"].stat() if self.files["questions"].exists() else None
        return _questions(self.task, self.data, self.split, stamp and (stamp.st_mtime_ns, stamp.st_size))

    @cached_property
    def folder(self) -> Folder:
        return Folder(self.out / "answers" / self.split_name / self.setting.model_name / self.setting.name)

    @property
    def split_name(self) -> str:
        """The split as its folder is called: with the benchmark's name, so that one --out can hold several."""
        told = self.task.name.split("_")[0] in self.split.replace("-", "")
        return self.split if told else f"{self.task.name}_{self.split}"

    @cached_property
    def _sources(self) -> tuple[Source, Source | None]:
        """Question records and truth, as scorers take them."""
        questions = self.files["questions"]
        return self.task.read_questions(questions), self.task.read_truth(self.files.get("annotations"), questions)

    def score(self, lines: list[dict[str, Any]], strict: bool = False) -> Score:
        """Of answer lines to the first questions, in their order."""
        asked, truth = self._sources
        said = Source(self.folder.path / MERGED, lines)
        return self.task.score_records(asked.first(len(lines)), truth, said, strict)

    def score_without(self, lines: Sequence[dict[str, Any]], gone: Collection[int]) -> Score:
        """Of answer lines to all that was asked, but for the questions at these places."""
        asked, truth = self._sources
        left = [i for i in range(len(lines)) if i not in gone]
        said = Source(self.folder.path / MERGED, [lines[i] for i in left])
        return self.task.score_records(Source(asked.path, [asked.rows[i] for i in left]), truth, said)

    def forget(self) -> None:
        """A list of many jobs holds no benchmark's annotations but those that it is busy with."""
        self.__dict__.pop("_sources", None)

    @cached_property
    def identity(self) -> dict[str, Any]:
        return self.setting.identity(self.task.name, self.split, self.questions)

    @property
    def title(self) -> str:
        return f"{self.task.title} {self.setting.name}"

    def check(self) -> None:
        """Raise InputError for a file of the benchmark that is not there."""
        for path in (path for role, path in self.files.items() if role != "upload"):
            if not path.exists():
                raise InputError(
                    f"{path}: not there, and {self.task.title} needs it; playground/README.md says where it comes from"
                )

    def match(self) -> None:
        """Raise InputError where answers could not be scored: annotations that are damaged, stripped or of other questions.

        Scores empty answers to all that is asked, so that it stops at whatever the score would stop at.
        """
        self.check()
        self.questions  # noqa: B018 (a question file that is broken speaks for itself)
        try:
            self.score([self._empty_answer(question) for question in self.questions], strict=True)
        except InputError as fault:
            raise InputError(
                f"{self.task.title} could not be scored, so nothing is asked: {fault}; "
                f"{self.task.remedy}, or ask without scoring (--answer-only)"
            ) from fault
        finally:
            self.forget()

    def open(self) -> dict[str, dict[str, Any]]:
        """Check data, folder and answers before anything is loaded; question id → answer line there is."""
        self.check()
        questions = self.questions
        self.folder.prepare(self.identity)
        return self.folder.answers(questions)

    def pieces(self, part: int, count: int, size: int | None) -> list[list[Question]]:
        """The questions of a shard, in runs that may be asked together; all shards' pieces are all questions."""
        n = len(self.questions)
        length = min(size or PIECE, -(-n // count))
        pieces = [self.questions[i : i + length] for i in range(0, n, length)]
        return pieces[part::count]

    def complete(self, found: Collection[str]) -> bool:
        """Whether these ids are all that can be answered."""
        return len(found) == len(self.questions) or not self.missing(found)

    def done(self) -> bool:
        """Whether nothing is left to ask; raises InputError for answers that cannot be used."""
        self.check()
        self.folder.compare(self.identity)
        return self.complete(self.folder.answers(self.questions))

    def missing(self, found: Collection[str] | None = None) -> list[str]:
        """Ids of questions that wait for an answer."""
        found = self.folder.answers(self.questions) if found is None else found
        broken = self.folder.broken() if self.skip_broken else {}
        return [q.id for q in self.questions if q.id not in found and q.id not in broken]

    # ------------------------------------------------------------------ the result

    def finish(self, command: str, commit: str | None) -> dict[str, Any]:
        """Merge, score, write the upload file and result.json; what stands in there.

        Raises InputError for answers that are missing, duplicate or foreign.
        """
        with alone(self.folder.path / ".lock"):
            found = self.folder.answers(self.questions)
            broken = {k: v for k, v in self.folder.broken().items() if k not in found} if self.skip_broken else {}
            lines = self.folder.merge(
                self.questions,
                {q.id: self._empty_answer(q, {"broken": True}) for q in self.questions if q.id in broken},
            )
            score = self.score(lines, strict=True)
            note, upload = "; ".join(filter(None, (self._partial(), score.note))), None
            if self.setting.limit is None:
                try:
                    upload = self._upload(lines)
                except InputError as fault:
                    note = "; ".join(filter(None, (note, f"no upload file: {fault}")))
            result = self._describe(score) | {"note": note, "upload": str(upload) if upload else None}
            result["broken"] = len(broken)
            if broken:
                result["doubts"]["broken_images_answered_empty"] = len(broken)
            result |= self._configuration() | summary(self.folder.path, [q.id for q in self.questions])
            result |= _provenance(result.pop("sessions"), command, commit)
            result["per_question"] = self._write_per_question(
                dict(score.per_question) | ({"broken": broken} if broken else {})
            )
            write_json(result, self.folder.path / RESULT)
        self.forget()
        return result

    def _partial(self) -> str:
        """What a run on some of the questions is not; "" where all were asked."""
        if len(self.questions) == self.in_all:
            return ""
        return (
            f"partial: the first {len(self.questions)} of {self.in_all} questions were asked; not to be compared with "
            "figures of the whole benchmark"
        )

    def _write_per_question(self, facts: Mapping[str, Any]) -> str | None:
        """What is said of single questions, beside the result; None where nothing is."""
        file = self.folder.path / PER_QUESTION
        if not facts:
            file.unlink(missing_ok=True)
            return None
        write_whole(file, json.dumps(facts, ensure_ascii=False) + "\n")
        return str(file)

    def _empty_answer(self, question: Question, metadata: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Stands in for an answer that there is not, as where a picture is broken."""
        return answer_line(question, self.task.clean(""), self.setting.model_name, self.setting.name, metadata)

    def _upload(self, lines: list[dict[str, Any]]) -> Path | None:
        out = self.folder.path / (UPLOAD + self.task.upload_suffix)
        if out.is_dir():
            shutil.rmtree(out)
        asked, truth = self._sources
        said = Source(self.folder.path / MERGED, lines)
        return self.task.upload(self.task.upload_questions(asked), truth, said, out)

    def _describe(self, score: Score) -> dict[str, Any]:
        setting = self.setting
        return {
            "task": self.task.name,
            "title": self.task.title,
            "split": self.split,
            "metric": score.metric or self.task.metric,
            "score": score.score,
            "parts": score.sums,
            "doubts": dict(score.doubts),
            "questions": len(self.questions),
            "questions_in_all": self.in_all,
            "partial": len(self.questions) < self.in_all,
            "limit": setting.limit,
            "model": setting.model_name,
            "setting": setting.name,
            "method": setting.method,
            "R": setting.R,
            "published": dict(self.task.published),
            "answers": str(self.folder.path / MERGED),
            "result": str(self.folder.path / RESULT),
        }

    def _configuration(self) -> dict[str, Any]:
        facts = asdict(self.setting) | {"data": str(self.data), "identity": self.identity}
        facts |= {"base": self.setting.model.base or EMBEDDED_NAME, "skip_broken": self.skip_broken}
        facts["twig"] = self.setting.twig_name
        return {"configuration": facts}


@lru_cache(maxsize=16)  # the same benchmark under several settings is read once
def _questions(task: Task, data: Path, split: str, _stamp: tuple | None) -> list[Question]:
    found = task.questions(data, split)
    place = task.files(data, split)["questions"]
    if not found:
        raise InputError(f"{place}: holds no question")
    twice = [name for name, count in Counter(q.id for q in found).items() if count > 1]
    if twice:
        raise InputError(f"{place}: {', '.join(twice[:5])} stand there twice; repair the file")
    return found


def _provenance(sessions: list[Mapping[str, Any]], command: str, commit: str | None) -> dict[str, Any]:
    """Versions and device from the process that asked last; the command and commit of the one that scores."""
    facts: dict[str, Any] = {"command": command, "commit": commit}
    if sessions:
        last = sessions[-1]
        facts["asked_with_commits"] = sorted({s["commit"] for s in sessions if s["commit"]})
        keys = (
            "time",
            "python",
            "torch",
            "transformers",
            "device",
            "device_type",
            "threads",
            "dtype",
            "letters",
            "workers",
        )
        facts |= {key: last[key] for key in keys}
        facts["sessions"] = len(sessions)
    return facts


def find_data(setting: Setting, task: Task, data: Path | None) -> Path:
    """The folder of all benchmarks: the one given, else the one that belongs to the model; of own files their folder.

    The embedded data are made at their first use. Raises InputError where there is nothing.
    """
    if task.own_files:
        return default_out(task, Path(), task.splits[0])
    folder = data if data is not None else default_data(setting.embedded)
    if folder.resolve() == EMBEDDED_DATA.resolve():
        from ...world.drawn import ensure

        ensure(folder, task.name)
    elif not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give --data (DATA=…); playground/README.md says what goes there")
    return folder


def find_split(task: Task, data: Path, split: str | None) -> str:
    """The split asked for, else the first whose files are all there; of the embedded data one that can be scored."""
    if split is not None:
        if split not in task.splits:
            raise InputError(f"{task.title} has no split {split!r}; there are {', '.join(task.splits)}")
        return split
    there = [name for name in task.splits if all(path.exists() for path in task.files(data, name).values())]
    if data.resolve() == EMBEDDED_DATA.resolve():  # nobody uploads its answers to a server
        there.sort(key=lambda name: "annotations" not in task.files(data, name))
    return there[0] if there else task.splits[0]


def default_out(task: Task, data: Path, split: str) -> Path:
    """LLaVA's place: beside the benchmark's questions."""
    return task.files(data, split)["questions"].parent
