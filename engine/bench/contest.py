"""Has players answer the same questions in turns; one that fails drops out, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from engine.bench.figures import BFLOAT16, FLOAT32, LOOKUP, Run, figures
from engine.bench.players import OurEngine, Peer, Player, Question
from engine.errors import JupiterError

Progress = Callable[[str], None]
WARM_UP_TOKENS = 32


@dataclass
class Contest:
    """What was measured, by player; and why a player has nothing."""

    players: Sequence[Player]
    warm_up: Question
    max_tokens: int
    progress: Progress
    runs: dict[str, list[Run]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    _warm: dict[str, Run] = field(default_factory=dict)

    async def run(self, questions: Sequence[Question], *, side_by_side: bool) -> None:
        """Ask every player every question; afterwards none of them is left running.

        Side by side they all stay loaded and take turns at each question, another one first each
        time, so that whatever else the machine does meets all alike. Otherwise they come one
        after the other, and only one is in memory at a time.

        Raises:
            JupiterError: our own engine failed; there is nothing to compare then.
        """
        groups = [list(self.players)] if side_by_side else [[player] for player in self.players]
        try:
            for group in groups:
                await self._run_group(group, questions)
        finally:
            for player in self.players:
                await player.stop()

    async def _run_group(self, group: list[Player], questions: Sequence[Question]) -> None:
        for player in group:
            self.progress(f"loading {player.name}")
            await self._ask(player, None)
        for index, question in enumerate(questions):
            turn = index % len(group)
            for player in [*group[turn:], *group[:turn]]:
                await self._ask(player, question)
            rates = ", ".join(f"{p.name} {self._rate(p)}" for p in group if p.name in self.runs)
            self.progress(f"{index + 1} of {len(questions)} prompts, tokens/s: {rates}")
        for player in group:
            await player.stop()

    async def _ask(self, player: Player, question: Question | None) -> None:
        """One answer; without a question, the start and an answer that is not counted."""
        name = player.name
        if name in self.missing:
            return
        try:
            if question is None:
                self._choose_dtype(player)
                await player.start()
                self._warm[name] = await player.answer(self.warm_up, WARM_UP_TOKENS)
            else:
                run = await player.answer(question, self.max_tokens)
                self.runs.setdefault(name, []).append(run)
        except JupiterError as error:
            if isinstance(player, OurEngine):
                raise
            self.runs.pop(name, None)
            self.missing[name] = str(error)
            self.progress(f"{name} dropped out: {error}")

    def _choose_dtype(self, player: Player) -> None:
        """Lookup runs in the dtype that was faster without it, when both were warmed up."""
        if isinstance(player, Peer) and player.name == LOOKUP:
            rates = {name: figures([run]).tokens_per_s for name, run in self._warm.items()}
            faster = (rates.get(BFLOAT16) or 0) > (rates.get(FLOAT32) or 0)
            player.mode = f"{'bfloat16' if faster else 'float32'}+lookup"

    def _rate(self, player: Player) -> str:
        rate = figures(self.runs[player.name]).tokens_per_s
        return "n/a" if rate is None else f"{rate:.1f}"
