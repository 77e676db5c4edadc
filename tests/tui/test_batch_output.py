"""The output file: what is refused before anything runs, and that lines stay whole."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tui.batch_input import parse_requests
from tui.batch_lines import BatchOutputError, failure_line
from tui.batch_output import BatchOutput, OutputLostError, ReaderGoneError

A, B, C = (
    failure_line(request, "internal_error", "why")
    for request in parse_requests("in", b'{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "c"}')
)
LONG = b"x" * 300_000 + b"\n"
"""More than a pipe holds."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n')
    return path


def refusal(output: object, source: object, *, resume: bool = False) -> str:
    with pytest.raises(BatchOutputError) as caught:
        BatchOutput(str(output), str(source), resume=resume)
    return str(caught.value)


def write(output: BatchOutput, *lines: bytes) -> None:
    async def all_lines() -> None:
        for line in lines:
            await output.write(line)

    asyncio.run(all_lines())


@pytest.mark.parametrize("resume", [False, True])
def test_the_input_itself_is_refused_under_any_name(
    source: Path, tmp_path: Path, resume: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = source.read_bytes()
    soft, hard = tmp_path / "soft.jsonl", tmp_path / "hard.jsonl"
    soft.symlink_to(source)
    hard.hardlink_to(source)
    monkeypatch.chdir(tmp_path)
    for name in (source, soft, hard, "in.jsonl", "./in.jsonl"):
        assert refusal(name, source, resume=resume).startswith(f"{name}: is the input itself")
    assert refusal(source, soft, resume=resume).startswith(f"{source}: is the input itself")
    assert source.read_bytes() == before


def test_an_existing_output_is_refused_with_a_hint(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_bytes(A)
    assert "exists; add --resume" in refusal(out, source)
    assert out.read_bytes() == A


def test_a_missing_folder_a_folder_and_a_file_as_folder_are_refused(
    source: Path, tmp_path: Path
) -> None:
    assert "no such folder" in refusal(tmp_path / "no" / "out.jsonl", source)
    assert "is a folder" in refusal(tmp_path, source)
    assert "Not a directory" in refusal(source / "out.jsonl", source)


def test_resuming_standard_output_is_refused(source: Path) -> None:
    assert "-o FILE" in refusal("-", source, resume=True)
    assert "regular file" in refusal("/dev/null", source, resume=True)


def test_nothing_is_made_or_changed_before_begin(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with BatchOutput(str(out), str(source), resume=False):
        assert not out.exists()
    out.write_bytes(A + B[:9])
    with BatchOutput(str(out), str(source), resume=True):
        pass
    assert out.read_bytes() == A + B[:9]


def test_lines_are_in_the_file_when_write_returns(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with BatchOutput(str(out), str(source), resume=False) as output:
        output.begin()
        write(output, A, B)
        assert out.read_bytes() == A + B
        output.sync()


def test_resuming_keeps_mode_and_link_and_leaves_no_other_file(
    source: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "answers"
    folder.mkdir()
    out, link = folder / "out.jsonl", tmp_path / "link.jsonl"
    out.write_bytes(A + B + C[:20])
    out.chmod(0o640)
    link.symlink_to(out)
    with BatchOutput(str(link), str(source), resume=True) as output:
        output.begin(output.old_lines[1:])
        assert out.read_bytes() == B
        write(output, C)
    assert out.read_bytes() == B + C
    assert out.stat().st_mode & 0o777 == 0o640
    assert link.is_symlink()
    assert list(folder.iterdir()) == [out]


def test_resuming_a_whole_file_appends_to_it(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    out.write_bytes(A)
    inode = out.stat().st_ino
    with BatchOutput(str(out), str(source), resume=True) as output:
        output.begin(output.old_lines)
        write(output, B)
    assert (out.read_bytes(), out.stat().st_ino) == (A + B, inode)


@pytest.mark.parametrize("keep", [0, 1], ids=["replaced", "appended"])
def test_a_second_run_on_the_same_output_is_refused(
    source: Path, tmp_path: Path, keep: int
) -> None:
    out = tmp_path / "out.jsonl"
    with BatchOutput(str(out), str(source), resume=False) as output:
        output.begin()
        write(output, A)
        assert "another run" in refusal(out, source, resume=True)
    with BatchOutput(str(out), str(source), resume=True) as output:
        assert "another run" in refusal(out, source, resume=True)
        output.begin(output.old_lines[:keep])
        assert "another run" in refusal(out, source, resume=True)
    with BatchOutput(str(out), str(source), resume=True):
        pass


def test_two_new_runs_on_the_same_output_do_not_mix(source: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out.jsonl")
    with (
        BatchOutput(out, str(source), resume=False) as first,
        BatchOutput(out, str(source), resume=False) as second,
    ):
        first.begin()
        with pytest.raises(BatchOutputError, match="another run"):
            second.begin()


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """No file may grow beyond this many bytes: what a full disk is like.

    Only around the write itself: pytest's own output may be a file too.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_leaves_whole_lines(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with BatchOutput(str(out), str(source), resume=False) as output:
        output.begin()
        write(output, A)
        words = r"out\.jsonl: cannot write: File too large"
        with small_files(len(A) + len(B) // 2), pytest.raises(OutputLostError, match=words):
            write(output, B)
        assert out.read_bytes() == A


def test_a_full_disk_at_resume_leaves_the_old_file(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.jsonl"
    old = A + B + C[:5]
    out.write_bytes(old)

    def full(fd: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with BatchOutput(str(out), str(source), resume=True) as output:
        monkeypatch.setattr("os.write", full)
        with pytest.raises(OutputLostError, match="No space left"):
            output.begin(output.old_lines)
    assert out.read_bytes() == old
    assert sorted(tmp_path.iterdir()) == [source, out]


def test_devices_are_written_as_they_are(source: Path) -> None:
    with BatchOutput("/dev/null", str(source), resume=False) as output:
        output.begin()
        write(output, A)
        output.sync()
    with BatchOutput("/dev/full", str(source), resume=False) as output:
        output.begin()
        with pytest.raises(OutputLostError, match="No space left"):
            write(output, A)


def test_a_named_pipe_without_a_reader_is_an_error_and_not_a_wait(
    source: Path, tmp_path: Path
) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with (
        BatchOutput(str(pipe), str(source), resume=False) as output,
        pytest.raises(OutputLostError, match="nobody reads"),
    ):
        output.begin()


@contextmanager
def stdout_to_pipe() -> Iterator[int]:
    """The read end of a pipe that descriptor 1 writes to."""
    saved = os.dup(1)
    read, end = os.pipe()
    os.dup2(end, 1)
    os.close(end)
    try:
        yield read
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(read)


def test_only_answers_reach_standard_output(source: Path) -> None:
    with stdout_to_pipe() as pipe:
        with BatchOutput(None, str(source), resume=False) as output:
            output.begin()
            os.write(1, b"a library that prints\n")
            write(output, A)
        os.write(1, b"after")
        assert os.read(pipe, 1 << 16) == A + b"after"


def test_a_slow_reader_does_not_hold_up_the_event_loop(source: Path) -> None:
    async def scenario(output: BatchOutput, pipe: int) -> bytes:
        writing = [asyncio.create_task(output.write(line)) for line in (LONG, A, LONG)]
        got = await read_all(pipe, 2 * len(LONG) + len(A))
        await asyncio.gather(*writing)
        return got

    with stdout_to_pipe() as pipe, BatchOutput("-", str(source), resume=False) as output:
        output.begin()
        assert asyncio.run(scenario(output, pipe)) == LONG + A + LONG


def test_a_line_begun_is_ended_when_the_run_is_cancelled(source: Path) -> None:
    async def scenario(output: BatchOutput, pipe: int) -> bytes:
        writing = asyncio.create_task(output.write(LONG))
        got = await read_all(pipe, 1)
        writing.cancel()
        got += await read_all(pipe, len(LONG) - 1)
        await asyncio.wait([writing])
        assert writing.cancelled()
        return got

    with stdout_to_pipe() as pipe, BatchOutput("-", str(source), resume=False) as output:
        output.begin()
        assert asyncio.run(scenario(output, pipe)) == LONG


async def read_all(fd: int, size: int) -> bytes:
    """`size` bytes, without blocking the event loop that also writes them."""
    loop, there, got = asyncio.get_running_loop(), asyncio.Event(), b""
    os.set_blocking(fd, False)
    loop.add_reader(fd, there.set)
    while len(got) < size:
        await there.wait()
        there.clear()
        with suppress(BlockingIOError):
            got += os.read(fd, size - len(got))
    loop.remove_reader(fd)
    return got


def test_a_reader_that_has_gone_is_told_apart(source: Path) -> None:
    with stdout_to_pipe() as pipe, BatchOutput("-", str(source), resume=False) as output:
        output.begin()
        # Another file takes the number of the read end, which so is closed.
        with open(os.devnull, "rb") as nothing:
            os.dup2(nothing.fileno(), pipe)
        with pytest.raises(ReaderGoneError):
            write(output, A)
