"""A log that grows: whole lines, nothing that a terminal would obey, the next launch's file."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tui import log_file
from tui.log_file import Change, LogFile


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "stderr.log"


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def test_lines_come_as_they_are_written(log: Path) -> None:
    follower = LogFile(lambda: log)
    append(log, b"one\ntw")
    assert follower.poll() == Change(("one",), "tw")
    assert follower.poll() == Change((), "tw")
    append(log, b"o\n\nthree\n")
    assert follower.poll() == Change(("two", "", "three"))


def test_a_file_that_is_not_there_yet_is_waited_for(log: Path) -> None:
    known: list[Path] = []
    follower = LogFile(lambda: known[-1] if known else None)
    assert follower.poll() == Change()
    assert follower.path is None
    known.append(log)
    assert follower.poll() == Change()
    assert follower.problem == "No such file or directory"
    append(log, b"hello\n")
    assert follower.poll() == Change(("hello",))
    assert follower.problem == ""


def test_the_file_of_the_next_launch_takes_the_place_of_the_last(log: Path, tmp_path: Path) -> None:
    files = [log]
    follower = LogFile(lambda: files[-1])
    append(log, b"old\nhalf")
    follower.poll()
    files.append(tmp_path / "next.log")
    append(files[-1], b"new\n")
    assert follower.poll() == Change(("new",), restarted=True)


def test_a_file_that_was_cut_short_is_read_anew(log: Path) -> None:
    follower = LogFile(lambda: log)
    append(log, b"a long first line\n")
    follower.poll()
    log.write_bytes(b"again\n")
    assert follower.poll() == Change(("again",), restarted=True)


def test_a_character_that_is_split_between_two_looks_is_whole(log: Path) -> None:
    follower = LogFile(lambda: log)
    whole = "grün\n".encode()
    append(log, whole[:3])
    assert follower.poll() == Change((), "gr")
    append(log, whole[3:])
    assert follower.poll() == Change(("grün",))


def test_control_sequences_are_taken_out_or_made_visible(log: Path) -> None:
    follower = LogFile(lambda: log)
    append(log, b"\x1b[31mred\x1b[0m \x1b]0;title\x07 bell\x07 \xff\n\x1b[2J")
    change = follower.poll()
    assert change.lines == ("red  bell␇ \ufffd",)
    assert "\x1b" not in change.partial


def test_an_escape_sequence_that_is_split_between_two_looks_does_no_harm(log: Path) -> None:
    follower = LogFile(lambda: log)
    append(log, b"a\x1b")
    assert follower.poll().partial == "a␛"
    append(log, b"[2Jb\n")
    assert follower.poll().lines == ("ab",)


def test_a_carriage_return_hides_nothing(log: Path) -> None:
    follower = LogFile(lambda: log)
    append(log, b"secret\rshown\r\nnext\n")
    assert follower.poll().lines == ("secret", "shown", "next")


def test_of_a_long_file_the_end_is_read_from_a_whole_line_on(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_file, "OPEN_BYTES", 100)
    append(log, b"".join(b"line %03d\n" % n for n in range(50)))
    follower = LogFile(lambda: log)
    lines = follower.poll().lines
    assert lines == tuple(f"line {n:03d}" for n in range(39, 50))
    assert follower.skipped == 50 * 9 - 100


def test_a_lot_of_text_is_read_in_parts(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_file, "READ_BYTES", 64)
    append(log, b"".join(b"line %03d\n" % n for n in range(20)))
    follower = LogFile(lambda: log)
    lines: list[str] = []
    while (change := follower.poll()).more:
        lines += change.lines
    assert [*lines, *change.lines] == [f"line {n:03d}" for n in range(20)]


def test_a_line_without_end_becomes_several(log: Path) -> None:
    append(log, b"x" * 25_000)
    follower = LogFile(lambda: log)
    change = follower.poll()
    assert max(map(len, change.lines)) == log_file.LINE_LENGTH
    assert sum(map(len, change.lines)) == 25_000


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_named(log: Path) -> None:
    append(log, b"hidden\n")
    log.chmod(0)
    follower = LogFile(lambda: log)
    assert follower.poll() == Change()
    assert follower.problem == "Permission denied"


def test_a_folder_in_the_place_of_the_file_is_a_problem_and_no_crash(tmp_path: Path) -> None:
    follower = LogFile(lambda: tmp_path)
    assert follower.poll() == Change()
    assert follower.problem == "Is a directory"
