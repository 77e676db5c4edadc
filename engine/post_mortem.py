"""Why an engine died: the first that went, in one clear message."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping
from pathlib import Path

from engine.errors import EngineError, ExitCode
from engine.logs import describe_exit, exit_codes, rank_log, tail, torchrun_log, with_last_lines
from engine.protocol import NODE_PIDS, WorkerError

# torchrun's words when it was itself told to end.
_GOT_SIGNAL = re.compile(r"SignalException: Process \d+ got signal: (\d+)")


# Ranks that end so have followed another: they lost their neighbour, or torchrun stopped them.
_FOLLOWED = (ExitCode.STAGE_LOST, -signal.SIGTERM)


class PostMortem:
    """Evidence about an end, in the order in which it was seen.

    torchrun stops all ranks when one dies, and the neighbours of a dead rank die of the closed
    connection: only the first one is the cause.

    Args:
        log_dir: the launch's logs.
        epoch: of the launch, that these ends belong to.
        rank_of: ranks of processes that lived through the epoch before.
    """

    def __init__(
        self, log_dir: Path, epoch: int | None = None, rank_of: Mapping[int, int] | None = None
    ) -> None:
        self._log_dir = log_dir
        self._epoch = epoch
        self._rank_of = dict(rank_of or {})
        self._gone: list[int] = []
        self._dismissed: set[int] = set()
        self._last_words: dict[int, WorkerError] = {}
        self._told_at_once = False  # the first evidence was a worker's own last words

    def reported(self, rank: int, pid: int) -> bool:
        """Note which process a rank is; False when that was known."""
        new = pid not in self._rank_of
        self._rank_of[pid] = rank
        return new

    def gone(self, pid: int) -> bool:
        """A process has ended; whether it is one that had reported, and is missed."""
        if pid in self._dismissed:
            return False
        missed = pid in self._rank_of and pid not in self._gone
        self._gone.append(pid)
        return missed

    def ended_by_themselves(self) -> list[int]:
        """Ranks that have said why they end; their processes may not have, yet."""
        return list(self._last_words)

    def any_gone(self) -> bool:
        """Whether a process has ended."""
        return bool(self._gone)

    def forget(self, pid: int) -> None:
        """A process is no evidence any more: its end is wanted."""
        self._rank_of.pop(pid, None)
        self._dismissed.add(pid)

    def living(self) -> dict[int, int]:
        """Which rank each process is that has reported and has not ended."""
        return {pid: rank for pid, rank in self._rank_of.items() if pid not in self._gone}

    def all_gone(self, world_size: int) -> bool:
        """Whether every rank has reported and has ended."""
        return len(set(self._rank_of.values())) == world_size and not self.living()

    def last_words(self, rank: int, error: WorkerError) -> None:
        """A worker has said why it will end."""
        self._told_at_once |= not self._gone and not self._last_words
        self._last_words.setdefault(rank, error)

    def clear(self) -> bool:
        """Whether nothing more need be waited for to name the cause."""
        if self._told_at_once or not self._gone:
            return self._told_at_once
        first = self._rank_of.get(self._gone[0])
        verdict = exit_codes(self._log_dir, self._epoch, self._dismissed)
        if any(pid not in self._rank_of for pid, _ in verdict.values()):
            return True
        return first in verdict and verdict[first][1] not in _FOLLOWED

    def words_missing(self) -> bool:
        """Whether a worker has ended with an exit code of its own, and has not said why: what it
        sent may be under way still."""
        codes = exit_codes(self._log_dir, self._epoch, self._dismissed)
        own = {rank for rank, (_, code) in codes.items() if code > 0 and code not in _FOLLOWED}
        return not own <= self._last_words.keys()

    def error(self, torchrun_exit: int | None) -> EngineError:
        """The error to show.

        Args:
            torchrun_exit: torchrun's exit code (negative: a signal), None while it runs.
        """
        rank = self._cause(torchrun_exit)
        if rank is not None:
            return self._said(rank) or self._stopped_from_outside() or self._silent(rank)
        log = torchrun_log(self._log_dir)
        if torchrun_exit is None:
            return EngineError(with_last_lines("torchrun ended", log))
        if torchrun_exit < 0:
            return EngineError(f"torchrun {describe_exit(torchrun_exit)}")
        return EngineError(with_last_lines(f"torchrun {describe_exit(torchrun_exit)}", log))

    def _cause(self, torchrun_exit: int | None) -> int | None:
        """The rank that went first; None when it was torchrun."""
        if self._told_at_once:
            return next(iter(self._last_words))
        verdict = exit_codes(self._log_dir, self._epoch, self._dismissed)
        first = self._rank_of.get(self._gone[0]) if self._gone else None
        if first is None:
            if torchrun_exit is not None and torchrun_exit < 0:
                return None
            # torchrun ended in order, so one that had not yet reported was the cause.
            return next(iter([*self._last_words, *verdict]), None)
        named = next((rank for rank in verdict if verdict[rank][1] not in _FOLLOWED), None)
        if named is None:
            return first
        # What went first in our eyes may have followed another: one that never reported, or one
        # whose end the kernel told us of a moment later.
        unseen = verdict[named][0] not in self._rank_of
        followed = first in verdict and verdict[first][1] in _FOLLOWED
        return named if unseen or followed else first

    def _said(self, rank: int) -> EngineError | None:
        words = self._last_words.get(rank)
        if words is None:
            return None
        if words.exit_code == ExitCode.BAD_INPUT:
            error = EngineError(words.message)
            error.exit_code = ExitCode.BAD_INPUT
            return error
        log = rank_log(self._log_dir, rank)
        return EngineError(
            f"rank {rank}: {words.message} (exit code {words.exit_code}; log: {log})"
        )

    def _stopped_from_outside(self) -> EngineError | None:
        log = torchrun_log(self._log_dir)
        found = _GOT_SIGNAL.search("\n".join(tail(log, 200)))
        if found is None:
            return None
        return EngineError(f"torchrun was told to stop by {signal.Signals(int(found[1])).name}")

    def _silent(self, rank: int) -> EngineError:
        """A rank that ended without a word: its exit code and the end of its log."""
        pids = {known: pid for pid, known in self._rank_of.items()}
        codes = exit_codes(self._log_dir, self._epoch, self._dismissed)
        how = describe_exit(codes[rank][1]) if rank in codes else "ended"
        pid = codes[rank][0] if rank in codes else pids[rank]
        log = rank_log(self._log_dir, rank)
        return EngineError(with_last_lines(f"rank {rank} ({_process(pid)}) {how}", log))


def _process(pid: int) -> str:
    node, own = divmod(pid, NODE_PIDS)
    return f"process {own} on node {node}" if node else f"process {pid}"
