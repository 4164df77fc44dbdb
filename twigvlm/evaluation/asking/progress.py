"""How far a run is: a bar with the time it will take, and the score so far where the metric has one.

Follows the files of answers, so that it sees every shard and is the same in a launcher and in a
process that asks. Knows no model.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ...errors import InputError
from .answers import key_of
from .job import Job

SHARE = 0.02  # of the time may go into the running score
EVERY = 5.0  # seconds between two running scores, at least
SLOW = 30.0  # seconds between two bars where no terminal redraws them


class Progress:
    """A bar over the answers in a job's folder; `look` brings it up to date."""

    def __init__(self, job: Job, found: dict[str, dict[str, Any]], score: bool = True):
        self.job, self.found = job, dict(found)
        self._places: dict[Path, int] = {}
        self._head, self._scorable, self._due = 0, score, time.monotonic() + EVERY
        terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=len(job.questions), initial=len(found), desc=job.title, unit="q", dynamic_ncols=terminal,
            mininterval=0.5 if terminal else SLOW, file=sys.stderr,
        )  # fmt: skip
        self._known = {q.id for q in job.questions}

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_fault) -> None:
        self.bar.close()

    def look(self) -> None:
        """Read what was written since the last look."""
        before = len(self.found)
        for file in self.job.folder.shard_files():
            for line in self._new_lines(file):
                if key_of(line) in self._known:
                    self.found.setdefault(key_of(line), line)
        if self._scorable and time.monotonic() >= self._due:
            self._show_score()
        self.bar.update(len(self.found) - before)

    def _new_lines(self, file: Path) -> list[dict[str, Any]]:
        lines = []
        with contextlib.suppress(OSError), open(file, "rb") as data:
            data.seek(self._places.get(file, 0))
            whole = data.read().rpartition(b"\n")[0]
            for row in whole.split(b"\n") if whole else ():
                with contextlib.suppress(ValueError):
                    lines.append(json.loads(row))
            self._places[file] = self._places.get(file, 0) + len(whole) + bool(whole)
        return lines

    def _show_score(self) -> None:
        """Of the first questions that all have answers: what a scorer can take as a smaller benchmark."""
        start = time.monotonic()
        questions = self.job.questions
        while self._head < len(questions) and questions[self._head].id in self.found:
            self._head += 1
        count = self._head - self._head % self.job.task.together
        if count:
            try:
                score = self.job.score([self.found[q.id] for q in questions[:count]]).score
                self._scorable = score is not None or count < len(questions) // 10
                if score is not None:
                    self.bar.set_postfix_str(f"score {score:.1f} on {count}", refresh=False)
            except InputError:  # too few for this metric as yet
                pass
        now = time.monotonic()
        self._due = now + max(EVERY, (now - start) / SHARE)
