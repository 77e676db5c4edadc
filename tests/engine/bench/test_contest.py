"""Players take turns; one that fails drops out."""

from __future__ import annotations

import pytest

from engine.bench.contest import WARM_UP_TOKENS, Contest
from engine.bench.figures import BFLOAT16, FLOAT32, LOOKUP, OURS, Run
from engine.bench.players import OurEngine, Peer, PeerError, PeerProcess, Question
from engine.errors import EngineError

WARM_UP = Question((), (0,))
QUESTIONS = [Question((), (n,)) for n in (1, 2, 3)]


class Fake:
    """Answers at a fixed rate and writes down what happens; fails at the question `fails_at`."""

    def __init__(
        self, name: str, log: list[str], fails_at: int | None = None, rate: float = 10
    ) -> None:
        self.name, self.log, self.fails_at, self.rate = name, log, fails_at, rate

    async def start(self) -> None:
        self.log.append(f"{self.name} start")

    async def answer(self, question: Question, max_tokens: int) -> Run:
        (number,) = question.tokens
        if number == self.fails_at:
            raise PeerError("out of breath")
        self.log.append(f"{self.name} {number} ({max_tokens})")
        return Run((number,), 0.1, 10, 10 / self.rate, 10)

    async def stop(self) -> None:
        self.log.append(f"{self.name} stop")


class FakeLookup(Peer):
    """Transformers' lookup without a process."""

    def __init__(self) -> None:
        super().__init__(LOOKUP, PeerProcess([], 1), [], "")
        self.modes: list[str] = []

    async def start(self) -> None:
        self.modes.append(self.mode)

    async def answer(self, question: Question, max_tokens: int) -> Run:
        return Run((1,), 0.1, 1, 1.0, 1)


class FailingEngine(OurEngine):
    """Our own, dead at the start."""

    def __init__(self, log: list[str]) -> None:
        self.name, self.log = OURS, log

    async def start(self) -> None:
        raise EngineError("no stage came up")

    async def stop(self) -> None:
        self.log.append("ours stop")


def contest(*players: object) -> Contest:
    return Contest(players, WARM_UP, 7, lambda line: None)  # type: ignore[arg-type]


async def test_side_by_side_each_is_first_once() -> None:
    log: list[str] = []
    made = contest(*(Fake(name, log) for name in "abc"))
    await made.run(QUESTIONS, side_by_side=True)
    asked = [line for line in log if "(7)" in line]
    assert "".join(line[0] for line in asked) == "abcbcacab"
    assert [line[2] for line in asked] == list("111222333")
    assert log.index(f"c 0 ({WARM_UP_TOKENS})") < log.index("a 1 (7)")
    assert [run.tokens for run in made.runs["b"]] == [(1,), (2,), (3,)]


async def test_one_after_the_other_only_one_is_loaded_at_a_time() -> None:
    log: list[str] = []
    await contest(Fake("a", log), Fake("b", log)).run(QUESTIONS, side_by_side=False)
    assert log.index("a stop") < log.index("b start")


async def test_one_that_fails_drops_out_with_its_reason_and_is_stopped() -> None:
    log: list[str] = []
    made = contest(Fake("a", log), Fake("b", log, fails_at=2))
    await made.run(QUESTIONS, side_by_side=True)
    assert made.missing == {"b": "out of breath"}
    assert list(made.runs) == ["a"]
    assert len(made.runs["a"]) == 3
    assert "b 3 (7)" not in log
    assert "b stop" in log


async def test_without_our_engine_there_is_no_contest_and_nothing_is_left_running() -> None:
    log: list[str] = []
    with pytest.raises(EngineError, match="no stage came up"):
        await contest(Fake("a", log), FailingEngine(log)).run(QUESTIONS, side_by_side=True)
    assert log[-2:] == ["a stop", "ours stop"]


@pytest.mark.parametrize(("bfloat16", "mode"), [(20, "bfloat16+lookup"), (5, "float32+lookup")])
async def test_lookup_runs_in_the_dtype_that_is_faster_here(bfloat16: float, mode: str) -> None:
    lookup = FakeLookup()
    log: list[str] = []
    players = (Fake(FLOAT32, log, rate=10), Fake(BFLOAT16, log, rate=bfloat16), lookup)
    await contest(*players).run(QUESTIONS[:1], side_by_side=False)
    assert lookup.modes == [mode]
