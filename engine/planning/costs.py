"""Seconds and bytes of any split, from a profile and the model's sizes. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from engine.planning.memory import ModelSizes
from engine.planning.profiles import Profile
from engine.planning.simulator import Hop, Sharing

ENTRY_BYTES = 160
"""Of a message besides its rows: header and the entry's fixed numbers."""
TOKEN_BYTES = 16
"""A row's token and parent."""


@dataclass(frozen=True, eq=False)
class Costs:
    """What each stage needs for any number of layers and rows."""

    profile: Profile
    num_layers: int
    """Of the whole model."""
    row_bytes: int
    """Of one row of hidden states on a link."""
    sizes: ModelSizes | None = None
    """None where memory is of no concern."""
    sequences: int = 1
    """At once: the stages have KV caches for so many."""

    @property
    def stages(self) -> int:
        """Devices of the profile; a plan uses them all, in their order."""
        return len(self.profile.devices)

    @property
    def sharing(self) -> Sharing:
        """Which stages share a host, beyond the cores that they leave to each other anyhow."""
        devices = self.profile.devices
        return Sharing(self.profile.hosts, [d.slowdown / d.share_slowdown for d in devices])

    def stage_s(
        self, rank: int, layers: int, rows: int, context: int, *, crowded: bool = False
    ) -> float:
        """Computing of one micro-batch, judging aside.

        crowded: others are under way, so that the stage leaves cores to those of its host.
        """
        seconds = layers * self.layer_s(rank, rows, context)
        if not crowded:
            return self.fixed_s(rank) + seconds
        busy_ms = self.profile.links[rank - 1].busy_ms if rank else 0.0
        return self.fixed_s(rank) + busy_ms / 1000.0 + seconds * self.crowd(rank)

    def crowd(self, rank: int) -> float:
        """How many times longer a stage takes for the cores that it leaves to others."""
        hosts = self.profile.hosts
        alone = hosts.count(hosts[rank]) == 1
        return 1.0 if alone else self.profile.devices[rank].share_slowdown

    @cache  # noqa: B019 (a few thousand numbers, for as long as a plan is made)
    def layer_s(self, rank: int, rows: int, context: int) -> float:
        """Computing of one layer."""
        return self.profile.devices[rank].layer_s(rows, context)

    def fixed_s(self, rank: int) -> float:
        """What a micro-batch takes besides its layers."""
        return self.profile.devices[rank].stage_ms / 1000.0

    def judge_s(self, nodes: int = 1, *, sequences: int = 1, drafting: float = 1.0) -> float:
        """What the last stage needs behind its layers; see DeviceProfile.judge_s."""
        return self.profile.devices[-1].judge_s(nodes, sequences=sequences, drafting=drafting)

    def hop(self, rank: int, rows: int) -> Hop:
        """The way of `rows` to the next stage; from the last one the result goes back."""
        if self.stages == 1:
            return Hop()
        link = self.profile.links[rank]
        size = ENTRY_BYTES
        if rank < self.stages - 1:
            size += rows * (self.row_bytes + TOKEN_BYTES)
        return Hop(link.latency_ms / 1000.0, link.transfer_s(size))

    def memory(self, rank: int, layers: int) -> int:
        """Bytes that a stage needs; 0 where the sizes are not known."""
        if self.sizes is None:
            return 0
        # Only what a stage holds besides its layers depends on its place among the others.
        split = [0] * self.stages
        split[rank] = layers
        return (
            self.sizes.stages(split)[rank].total(self.sequences)
            + self.profile.devices[rank].process_bytes
        )

    def limits(self) -> dict[str, int]:
        """Memory of each host that has a limit: the most that one of its stages was told."""
        found: dict[str, int] = {}
        for host, device in zip(self.profile.hosts, self.profile.devices, strict=True):
            if device.memory_bytes is not None:
                found[host] = max(found.get(host, 0), device.memory_bytes)
        return found

    def fits(self, split: Sequence[int]) -> bool:
        """Whether every host has the memory for its stages."""
        needed: dict[str, int] = {}
        for rank, (host, layers) in enumerate(zip(self.profile.hosts, split, strict=True)):
            needed[host] = needed.get(host, 0) + self.memory(rank, layers)
        return all(needed[host] <= limit for host, limit in self.limits().items())

    # --- micro-batches ---------------------------------------------------------------------

    def prefill(
        self, split: Sequence[int], chunks: Sequence[int], start: int = 0
    ) -> tuple[list[list[float]], list[list[Hop]]]:
        """Work and hops of a prompt's chunks behind `start` cached tokens; see `simulate`."""
        work, hops, context = [], [], start
        crowded = len(chunks) > 1
        for rows in chunks:
            work.append(
                [self.stage_s(r, n, rows, context, crowded=crowded) for r, n in enumerate(split)]
            )
            hops.append([self.hop(rank, rows) for rank in range(len(split))])
            context += rows
        work[-1][-1] += self.judge_s() * (self.crowd(self.stages - 1) if crowded else 1.0)
        return work, hops

    def decode(
        self,
        split: Sequence[int],
        rows: int,
        context: int,
        judge_s: float = 0.0,
        *,
        crowded: bool = False,
    ) -> tuple[list[float], list[Hop]]:
        """Work and hops of one decode step of `rows` nodes; `judge_s` as `judge_s()` tells."""
        work = [
            self.stage_s(rank, n, rows, context, crowded=crowded) for rank, n in enumerate(split)
        ]
        work[-1] += judge_s * (self.crowd(len(split) - 1) if crowded else 1.0)
        return work, [self.hop(rank, rows) for rank in range(len(split))]
