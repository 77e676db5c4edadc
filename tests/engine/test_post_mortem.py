"""Who died first, where the kernel and torchrun tell it in another order."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.errors import ExitCode
from engine.logs import torchrun_log
from engine.post_mortem import PostMortem
from engine.protocol import WorkerError

SUMMARY = """
E failed (exitcode: {code}) local_rank: {rank} (pid: {pid}) of binary: python
"""


def verdict(folder: Path, *ends: tuple[int, int, int]) -> None:
    """What torchrun writes: rank, pid and exit code of each that failed."""
    first, *others = ends
    text = SUMMARY.format(rank=first[0], pid=first[1], code=first[2])
    for rank, pid, code in others:
        text += f"[1]:\n  rank      : {rank} (local_rank: {rank})\n"
        text += f"  exitcode  : {code} (pid: {pid})\n"
    torchrun_log(folder).write_text(text)


@pytest.mark.parametrize("killed_first", [True, False])
def test_a_killed_rank_is_the_cause_though_its_neighbour_was_seen_to_end_before_it(
    tmp_path: Path, killed_first: bool
) -> None:
    evidence = PostMortem(tmp_path)
    for rank, pid in enumerate((100, 101)):
        evidence.reported(rank, pid)
    evidence.gone(100)  # rank 0 lost its neighbour, and the kernel told of it first
    assert not evidence.clear()
    ends = [(1, 101, -9), (0, 100, int(ExitCode.STAGE_LOST))]
    verdict(tmp_path, *(ends if killed_first else reversed(ends)))
    evidence.gone(101)
    message = str(evidence.error(1))
    assert message.startswith("rank 1 (process 101) was killed by SIGKILL")


def test_words_of_a_worker_that_ended_by_itself_may_be_under_way(tmp_path: Path) -> None:
    evidence = PostMortem(tmp_path)
    for rank, pid in enumerate((100, 101)):
        evidence.reported(rank, pid)
    evidence.gone(101)
    verdict(tmp_path, (1, 101, -9), (0, 100, int(ExitCode.STAGE_LOST)))
    assert not evidence.words_missing()  # neither has anything to say
    verdict(tmp_path, (1, 101, int(ExitCode.BAD_INPUT)))
    assert evidence.words_missing()
    evidence.last_words(1, WorkerError(message="truncated", exit_code=ExitCode.BAD_INPUT))
    assert not evidence.words_missing()
