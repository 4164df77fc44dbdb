"""Files appear whole or not at all, and those that are added to survive a kill."""

from __future__ import annotations

import pytest

from twigvlm.errors import InputError
from twigvlm.files import PART, Appender, add_line, copy, read_lines, replacing


def test_what_goes_wrong_leaves_the_old_file_alone(tmp_path):
    file = tmp_path / "new" / "a.txt"
    with replacing(file) as part:
        part.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(file) as part:
        part.write_text("ne")
        assert part.suffix == ".txt" and part.name.startswith(PART)
        raise ZeroDivisionError
    with pytest.raises(FileNotFoundError):
        copy(tmp_path / "nothing", file)
    assert file.read_text() == "old" and [f.name for f in file.parent.iterdir()] == ["a.txt"]
    copy(file, tmp_path / "b.txt")
    assert (tmp_path / "b.txt").read_text() == "old"


def test_a_line_that_was_cut_short_is_ended_before_the_next(tmp_path):
    file = tmp_path / "log.jsonl"
    add_line({"step": 1}, file)
    with open(file, "a") as log:
        log.write('{"st')
    add_line({"step": 2}, file)
    add_line({"step": 3}, file)
    assert file.read_text() == '{"step": 1}\n{"st\n{"step": 2}\n{"step": 3}\n'


def test_an_appender_takes_what_was_cut_short_away_and_lets_nobody_else_write(tmp_path):
    file = tmp_path / "new" / "a.jsonl"
    with Appender(file) as lines:
        lines.write([{"a": 1}, {"a": 2}])
        with pytest.raises(InputError, match="another process is writing it"):
            Appender(file)
    with open(file, "a") as log:
        log.write('{"a": 3')
    assert read_lines(file) == [{"a": 1}, {"a": 2}]
    with Appender(file, durable=False) as lines:
        lines.write([{"a": 4}])
    assert read_lines(file) == [{"a": 1}, {"a": 2}, {"a": 4}]
