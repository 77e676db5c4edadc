"""One training run that is watched: started here, attached to, or over long ago.

A run that is started here is a process of its own (engine/training/attended.py): it stops with a
checkpoint when this process ends, unless it is told to go on alone. Free of Textual and torch.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from engine.errors import EngineError, ExitCode
from engine.logs import describe_exit
from engine.paths import make_private, state_dir
from engine.processes import ProcessHandle
from engine.protocol import EventEnvelope, TrainingStarted, TrainingStep
from engine.queue_client import Item, QueueClient
from engine.run_dir import RunDir
from engine.training.attended import LEAVE
from tui.run_folders import RunFolder, read_run, remember, write_process
from tui.text import log_text
from tui.training_form import RANKS
from tui.training_history import History, Tail

Phase = Literal["preparing", "training", "stopping", "finished", "stopped", "failed"]
ATTENDED = "engine.training.attended"
EPOCH = 1
KEEP_LOGS = 50
PREFIX = re.compile(r"jupiter (?:medusa|sft|pt): ")


class TrainingRun:
    """A run as it is seen from here; `poll` brings it up to date."""

    def __init__(self) -> None:
        self.phase: Phase = "preparing"
        self.history = History()
        self.folder: Path | None = None
        """None until the run has made it."""
        self.log: Path | None = None
        self.said = ""
        """The last line of the log."""
        self.problem = ""
        """Why the run failed, or what went wrong around it."""
        self._process: subprocess.Popen[bytes] | None = None
        self._handle: ProcessHandle | None = None
        self._queue: QueueClient | None = None
        self._sockets: RunDir | None = None
        self._log_tail: Tail | None = None
        self._steps_tail: Tail | None = None
        self._ending = False
        self._changed = True

    # --- three ways to begin -----------------------------------------------------------------

    @classmethod
    def start(cls, command: str, words: Sequence[str], ranks: int = 1) -> TrainingRun:
        """Start `jupiter COMMAND WORDS`; on a running event loop.

        Raises:
            EngineError: no log, no sockets or no process can be made; the line says why.
        """
        run = cls()
        run.log = _new_log()
        run._log_tail = Tail(run.log)
        sockets = run._sockets = RunDir()
        try:
            run._queue = QueueClient(
                sockets.events, sockets.commands, epoch=EPOCH, world_size=1, on_batch=run._learn
            )
            with run.log.open("ab") as log:
                run._process = subprocess.Popen(
                    [sys.executable, "-m", ATTENDED, command, *words],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=log,
                    env=_environment(sockets, ranks),
                    start_new_session=True,  # no terminal's signal reaches it
                )
        except OSError as error:
            run.close()
            raise EngineError(f"the training cannot be started: {error}") from None
        except EngineError:
            run.close()
            raise
        run._handle = ProcessHandle(run._process.pid)
        run._queue.start(run._process.pid)
        return run

    @classmethod
    def open(cls, found: RunFolder) -> TrainingRun:
        """Look at a run folder; a run that still goes on is attached to."""
        run = cls()
        run.folder, run.log = found.path, found.log
        run._follow(found.path)
        if found.log is not None:
            run._log_tail = Tail(found.log)
        if found.process is not None and found.process.alive:
            with suppress(OSError):
                run._handle = ProcessHandle(found.process.pid)
        if run._handle is None:
            run._end(None)
        run.poll()
        return run

    # --- what it is doing --------------------------------------------------------------------

    @property
    def running(self) -> bool:
        """Whether there is a process."""
        return self._handle is not None

    @property
    def own(self) -> bool:
        """Whether it was started here: it ends with this process, unless told otherwise."""
        return self._process is not None and self.running

    def poll(self) -> bool:
        """Read what is new; whether there was anything."""
        gone = self._handle is not None and self._handle.gone()  # before its last words are read
        self._read()
        if gone and self._queue is not None and not self._ending:
            self._ending = True  # what it has sent may still be on its way: end at the next look
        elif gone:
            code = None if self._process is None else self._process.wait()
            self._close_queue()
            self._read()
            self._end(code)
        changed, self._changed = self._changed, False
        return changed

    def _read(self) -> None:
        for line in self._log_tail.new_lines() if self._log_tail else ():
            if line.strip():
                self.said, self._changed = log_text(line.strip()), True
        for line in self._steps_tail.new_lines() if self._steps_tail else ():
            self.history.add_line(line)
            self._changed = True
        if self.phase == "preparing" and self.history.points:
            self.phase = "training"

    def _learn(self, batch: list[Item]) -> None:
        """From the shared queue."""
        for item in batch:
            if not isinstance(item, EventEnvelope):
                continue
            if isinstance(item.body, TrainingStarted):
                self.history.started(item.body.iteration, item.body.total)
                self._begun(Path(item.body.run))
            elif isinstance(item.body, TrainingStep):
                self.history.add_step(item.body)
                if self.phase == "preparing":
                    self.phase = "training"
            self._changed = True

    def _begun(self, folder: Path) -> None:
        self.folder = folder
        self._follow(folder)
        assert self._process is not None and self.log is not None
        try:
            write_process(folder, self._process.pid, self.log)
            remember(folder)
        except OSError as error:
            self.problem = f"the run cannot be put on the list: {error}"

    def _follow(self, folder: Path) -> None:
        self._steps_tail = Tail(folder / "logging.jsonl")

    def _end(self, code: int | None) -> None:
        """The process is gone; its exit code, where it was ours, and its folder say how."""
        if self._handle is not None:
            self._handle.close()
            self._handle = None
        self._cut_tie()
        self._changed = True
        found = None
        if self.folder is not None:
            with suppress(EngineError, ValueError, OSError):
                found = read_run(self.folder)
        asked = code in (ExitCode.INTERRUPTED, ExitCode.TERMINATED, -signal.SIGTERM)
        if found is not None and found.status == "finished":
            self.phase = "finished"
        elif asked or (code is None and found is not None and found.status == "stopped"):
            self.phase = "stopped"
        else:
            self.phase = "failed"
            self.problem = self._reason(code)

    def _reason(self, code: int | None) -> str:
        if told := PREFIX.match(self.said):
            return self.said[told.end() :]
        how = "the run ended before its work was written"
        if code:
            how = f"the training process {describe_exit(code)}"
        return f"{how}; its last words: {self.said}" if self.said else how

    # --- what can be done about it -----------------------------------------------------------

    def stop(self) -> None:
        """Ask it to finish its step, save a checkpoint and end."""
        if self._handle is not None and self.phase != "stopping":
            self.phase, self._changed = "stopping", True
            self._handle.signal(signal.SIGTERM)
            self._untie()  # a second signal would end it before its checkpoint

    def kill(self) -> None:
        """End it at once; what was learnt since the last checkpoint is lost."""
        if self._handle is not None:
            self.phase, self._changed = "stopping", True
            self._handle.signal(signal.SIGKILL)

    def leave(self) -> None:
        """Let it go on alone when this process ends; it can be attached to again."""
        self._untie()
        self.close()

    def _untie(self) -> None:
        tie = None if self._process is None else self._process.stdin
        if tie is not None and not tie.closed:
            with suppress(OSError):
                tie.write(LEAVE)
                tie.close()

    def close(self) -> None:
        """Look no further; a run of our own that was not left stops with a checkpoint."""
        self._cut_tie()
        if self._handle is not None:
            self._handle.close()
            self._handle = None
        self._close_queue()

    def _cut_tie(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()

    def _close_queue(self) -> None:
        if self._queue is not None:
            self._queue.close()
            self._queue = None
        if self._sockets is not None:
            self._sockets.remove()
            self._sockets = None


def _new_log() -> Path:
    folder = state_dir() / "training"
    path = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**6:06}.log"
    try:
        make_private(folder)
        path.touch(mode=0o600)
        for old in sorted(folder.glob("*.log"))[:-KEEP_LOGS]:
            old.unlink()
    except OSError as error:
        raise EngineError(
            f"{folder}: no log can be written ({error.strerror}); set JUPITER_STATE_DIR"
        ) from None
    return path


def _environment(sockets: RunDir, ranks: int) -> dict[str, str]:
    return {
        **os.environ,
        RANKS: str(ranks),
        "JUPITER_EVENTS": sockets.events,
        "JUPITER_COMMANDS": sockets.commands,
        "JUPITER_EPOCH": str(EPOCH),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive"),
    }
