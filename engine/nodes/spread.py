"""A launch whose workers are on several machines: here, and where the hub has them started."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from msgspec.json import decode as json_decode

from engine.config import JupiterConfig, config_json
from engine.launch import Command, Launch
from engine.nodes.attached import Attached
from engine.nodes.hub import Hub
from engine.nodes.messages import Begin, Kill
from engine.nodes.seats import Seat, share_out
from engine.protocol import NODE_PIDS


class SpreadLaunch(Launch):
    """As `Launch`, for the first machine of several.

    Args:
        hub: has seats for the others.
        seats: of those that take part.
        config, model_folder, epoch, command: as for `Launch`.
    """

    def __init__(
        self,
        hub: Hub,
        seats: Sequence[Seat],
        config: JupiterConfig,
        model_folder: Path,
        epoch: int,
        command: Command | None = None,
    ) -> None:
        here, *others = share_out(config.world_size, 1 + len(seats))
        super().__init__(
            config, model_folder, epoch, command, ranks=here, interface=hub.interface, spread=True
        )
        self._hub = hub
        self._others = {seat.number: ranks for seat, ranks in zip(seats, others, strict=True)}
        self._attached = Attached(
            self.run_dir.events, self.run_dir.commands, self.run_dir.exchange, self.log_dir
        )

    @property
    def nodes(self) -> list[int]:
        """Numbers of the other machines that take part."""
        return list(self._others)

    def spawn(self) -> int:
        """As `Launch.spawn`; the others start theirs."""
        self._hub.attach(self._attached)
        self._tell_others()
        return super().spawn()

    def replace(self, ranks: Iterable[int], epoch: int) -> bool:
        """As `Launch.replace`; True also when a machine starts from nothing."""
        super().replace(ranks, epoch)
        anew = any(not self._hub.seats[number - 1].begun for number in self._others)
        self._tell_others()
        return anew

    def _tell_others(self) -> None:
        config = json_decode(config_json(self.config))
        for number, ranks in self._others.items():
            begin = Begin(
                epoch=self.epoch,
                first_rank=ranks.start,
                ranks=len(ranks),
                workers=tuple(self._wanted),
                config=config,
            )
            self._hub.begin(number, begin)

    def kill_worker(self, pid: int) -> None:
        """As `Launch.kill_worker`, wherever the worker is."""
        if pid < NODE_PIDS:
            super().kill_worker(pid)
        else:
            self._hub.post(pid // NODE_PIDS, Kill(pid % NODE_PIDS))

    def kill_now(self) -> None:
        """As `Launch.kill_now`; the others end theirs."""
        self._hub.detach(self._attached)
        super().kill_now()
