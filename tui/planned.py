"""What the planner says to the stage editor: its split, and what a split would take. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from engine.config import JupiterConfig
from engine.errors import ConfigError
from engine.planning.auto import PROMPT
from engine.planning.costs import Costs
from engine.planning.measuring import cached, named_profile
from engine.planning.planner import Prediction, Workload, config_chunks, plan, predict
from engine.planning.setup import costs_of, workload
from tui.metrics import UNKNOWN
from tui.stage_view import ABOUT, Compared, ms


@dataclass(frozen=True)
class Planner:
    """Measured devices of a number of stages, and what they are planned for."""

    config: JupiterConfig
    costs: Costs
    load: Workload

    @classmethod
    def load_for(cls, config: JupiterConfig, folder: Path, stages: int) -> Planner:
        """From the profile that `config` names, or the one kept from a measurement.

        Raises ConfigError where there is none of so many stages.
        """
        config = replace(config, stage_num_hidden_layers_list=[1] * stages, num_stages=stages)
        if config.plan_profile is not None:
            profile = named_profile(config, config.plan_profile)
        elif (found := cached(config)) is not None:
            profile = found
        else:
            raise ConfigError(
                f"{stages} stages were not measured yet: `jupiter plan --stages {stages}` does"
            )
        load = workload(config, folder, PROMPT, config.max_num_seqs)
        sequences = load.sequences if config.plan_aim == "throughput" else 1
        return cls(config, costs_of(config, folder, profile, sequences), load)

    def split(self) -> tuple[int, ...]:
        """The planned one; raises ConfigError where none fits into memory."""
        return plan(self.costs, self.config.plan_aim, self.load).split

    def predict(self, split: Sequence[int]) -> Prediction | None:
        """What a split takes with the config's chunks; None for another number of stages."""
        if len(split) != self.costs.stages or sum(split) != self.costs.num_layers:
            return None
        chunks = config_chunks(self.load, len(split), self.config.num_sub_sequences)
        return predict(self.costs, split, self.load, chunks)

    def lines(self, live: Sequence[int], draft: Sequence[int]) -> list[Compared]:
        """Its predictions for both splits, a line for each figure."""
        both = [self.predict(split) for split in (live, draft)]

        def line(label: str, texts: Sequence[str]) -> Compared:
            before, after = texts
            return Compared(f"planner: {label}", before, after)

        return [
            line(
                f"first token of {self.load.prompt}",
                [UNKNOWN if p is None else f"{ABOUT}{ms(p.ttft_s)} ms" for p in both],
            ),
            line(
                "per token",
                [UNKNOWN if p is None else f"{ABOUT}{ms(p.token_s)} ms" for p in both],
            ),
            line("bubbles", [UNKNOWN if p is None else f"{ABOUT}{p.bubble:.0%}" for p in both]),
        ]
