"""Run folders of training runs, as files: what each run was, and whether it still runs.

Free of Textual and torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import psutil

from engine.errors import ConfigError
from engine.paths import make_private, state_dir
from tui.store import write_private

Status = Literal["running", "finished", "stopped", "ended"]
PROCESS = "process.json"
"""In a run folder: the process of a run that was started here, and its log."""
KEEP = 30
TAIL_BYTES = 1 << 16
DEFAULT_ROOT = "megatron_output"


class RunProcess(msgspec.Struct, frozen=True):
    """Who runs a run: a pid, and when that process was made, for a pid may be in use again."""

    pid: int
    created: float
    log: str

    @property
    def alive(self) -> bool:
        """Whether just this process is still there."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.created) < 0.01
            return bool(same and process.status() != psutil.STATUS_ZOMBIE)
        except psutil.Error:
            return False


@dataclass(frozen=True)
class RunFolder:
    """What a run folder tells."""

    path: Path
    args: dict[str, Any]
    """args.json: everything the run was told, with what the model says filled in."""
    checkpoint: int | None
    """Steps of the last whole checkpoint."""
    heads: Path | None
    """The trained heads, once the run is over."""
    base: Path | None
    """With medusa2 the trained base model."""
    process: RunProcess | None
    steps: int | None
    """Steps of the whole run, where its log says so."""

    @property
    def kind(self) -> str:
        """The command that it is of."""
        return str(self.args.get("command", "medusa"))

    @property
    def status(self) -> Status:
        """Running; finished (its heads, or all its steps); stopped (it can go on); or ended."""
        if self.process is not None and self.process.alive:
            return "running"
        all_done = self.kind != "medusa" and self.checkpoint == self.steps
        if self.heads is not None or (all_done and self.checkpoint is not None):
            return "finished"
        return "ended" if self.checkpoint is None else "stopped"

    @property
    def log(self) -> Path | None:
        """What the run has said, where that is kept."""
        path = Path(self.process.log) if self.process is not None else None
        return path if path is not None and path.is_file() else None


def read_run(path: Path) -> RunFolder:
    """Read a run folder.

    Raises:
        ConfigError: it is none; what is missing is named.
    """
    file = path / "args.json"
    try:
        args = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise ConfigError(f"{path}: no run folder: it has no args.json") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not JSON: {error}") from None
    if not isinstance(args, dict):
        raise ConfigError(f"{file}: must hold one JSON object")
    heads, base = path / "heads", path / "model"
    return RunFolder(
        path=path,
        args=args,
        checkpoint=_checkpoint(path),
        heads=heads if heads.is_dir() else None,
        base=base if base.is_dir() else None,
        process=_process(path),
        steps=_steps(path / "logging.jsonl"),
    )


def _checkpoint(path: Path) -> int | None:
    try:
        text = (path / "latest_checkpointed_iteration.txt").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return int(text) if text.isascii() and text.isdigit() else None


def _steps(log: Path) -> int | None:
    """What the last line about a step says."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("train_iters"), int):
            return int(record["train_iters"])
    return None


def _process(path: Path) -> RunProcess | None:
    try:
        return msgspec.json.decode((path / PROCESS).read_bytes(), type=RunProcess)
    except (OSError, msgspec.DecodeError):
        return None


def write_process(path: Path, pid: int, log: Path) -> None:
    """Say in the run folder which process runs it, so that it can be found again.

    Raises OSError.
    """
    try:
        created = psutil.Process(pid).create_time()
    except psutil.Error:
        return  # over already: there is nothing to find again
    write_private(path / PROCESS, msgspec.json.encode(RunProcess(pid, created, str(log))))


# --- the list of runs -----------------------------------------------------------------------------


def recent_runs() -> list[RunFolder]:
    """The runs that were started or opened here, and those of the default folder; latest first."""
    paths = {Path(name).resolve(): None for name in _remembered()}
    paths |= {path.parent.resolve(): None for path in Path(DEFAULT_ROOT).glob("*/v*/args.json")}
    found = []
    for path in paths:
        try:
            found.append((path.stat().st_mtime, read_run(path)))
        except (OSError, ConfigError):
            continue  # removed since
    found.sort(key=lambda pair: pair[0], reverse=True)
    return [run for _, run in found[:KEEP]]


def remember(path: Path) -> None:
    """Put a run folder on the list. Raises OSError."""
    names = [str(path), *(name for name in _remembered() if name != str(path))]
    make_private(_list().parent)
    write_private(_list(), json.dumps(names[:KEEP], indent=2).encode())


def _list() -> Path:
    return state_dir() / "training" / "runs.json"


def _remembered() -> list[str]:
    try:
        names = json.loads(_list().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
