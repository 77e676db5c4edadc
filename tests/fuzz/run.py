"""Runs one target of the fuzz tests over many damaged inputs."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings

from tests.fuzz.inputs import damaged
from tests.fuzz.targets import TARGETS, check

HANG_S = 5.0


class Hang(BaseException):
    """An input that keeps its reader busy; not an Exception, so that no reader catches it."""


@contextmanager
def limit(seconds: float = HANG_S) -> Iterator[None]:
    """Raise Hang in the main thread when the block takes longer than `seconds`."""

    def stop(*_: object) -> None:
        raise Hang(f"still reading after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def fuzz(name: str, runs: int, folder: Path, *, seed: int) -> tuple[int, int]:
    """Read `runs` inputs with the target `name`; how many were taken, and how many refused.

    Raises what a reader raised beside its refusals, with the smallest input that hypothesis finds
    for it.
    """
    target, counts = TARGETS[name], [0, 0]
    seeds = target.seeds(folder)
    for valid in seeds:
        assert check(target, valid, folder), f"{name}: a valid input was refused"

    @hypothesis.seed(seed)
    @settings(
        max_examples=runs,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(damaged(seeds, text=target.text))
    def one(data: bytes) -> None:
        with limit():
            counts[not check(target, data, folder)] += 1

    one()
    return counts[0], counts[1]
