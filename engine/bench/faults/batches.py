"""Trials on `jupiter-tui --batch`: it is ended in the middle, and resumed."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from engine.bench.faults import harm
from engine.bench.faults.counts import Counts
from engine.bench.faults.processes import Witness
from engine.bench.prompts import OWN
from engine.config import JupiterConfig, config_json
from engine.errors import EngineError

LINES = 12
TOKENS = 32
MOST_RUNS = 3
"""So often a batch may have to be started until all is done."""
HARMS = ("client", "worker", "torchrun", "disk")


class BatchTrials:
    """The same lines over and over; each time something ends in the middle.

    Args:
        config: of the engine.
        rng: decides what ends, and when.
        say: takes a line about each trial.
    """

    def __init__(
        self, config: JupiterConfig, rng: random.Random, say: Callable[[str], None]
    ) -> None:
        self._rng, self._say = rng, say
        self._config = config_json(config)
        self._witness = Witness()
        self._whole: dict[str, str] = {}

    def run(self, trials: int) -> Counts:
        """Go through the trials; raises EngineError when an undisturbed batch does not end."""
        counts = Counts()
        with tempfile.TemporaryDirectory(prefix="jupiter-faults-") as name:
            folder = Path(name)
            (folder / "config.json").write_text(self._config, encoding="utf-8")
            (folder / "in.jsonl").write_text("".join(_lines()), encoding="utf-8")
            if self._finish(self._start(folder, "whole.jsonl")) != 0:
                raise EngineError("a batch that nothing disturbs does not come to its end")
            self._whole = _answers(folder / "whole.jsonl")[0]
            for number in range(1, trials + 1):
                what = self._rng.choice(HARMS)
                output = folder / f"{number}.jsonl"
                survived = self._trial(folder, output, what)
                texts, doubled = _answers(output)
                wrong = doubled + sum(texts.get(name) != text for name, text in self._whole.items())
                counts.add(survived=survived, wrong=wrong if survived else 0, seconds=None)
                outcome = "wrong" if wrong else "survived" if survived else "lost"
                self._say(f"{number}/{trials} batch ({what}): {outcome}")
        counts.orphans = self._witness.left()
        return counts

    def _trial(self, folder: Path, output: Path, what: str) -> bool:
        """Whether all was done in the end."""
        for attempt in range(MOST_RUNS):
            process = self._start(folder, output.name, *(["--resume"] if attempt else []))
            if attempt == 0:
                self._disturb(process, what)
            if self._finish(process) == 0:
                return True
        return False

    def _start(self, folder: Path, output: str, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "tui.cli", "--config", "config.json"),
                *("--batch", "in.jsonl", "-o", output, "--progress", "json", *words),
            ],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def _disturb(self, process: subprocess.Popen[str], what: str) -> None:
        """Wait until some lines are done, and do it."""
        assert process.stderr is not None
        left = self._rng.randrange(1, LINES // 2)
        for line in process.stderr:
            left -= json.loads(line)["event"] == "line"
            if left == 0:
                break
        self._witness.look()
        with suppress(psutil.NoSuchProcess, ProcessLookupError):
            if what == "disk":
                harm.fill_disk(process.pid)
            else:
                harm.kill(self._victim(process.pid, what))

    def _victim(self, client: int, what: str) -> int:
        if what == "client":
            return client
        children = psutil.Process(client).children(recursive=True)
        torchrun = next(p for p in children if p.ppid() == client)
        if what == "torchrun":
            return int(torchrun.pid)
        keepers = {p.pid for p in children if p.ppid() == torchrun.pid}
        return int(self._rng.choice([p.pid for p in children if p.ppid() in keepers]))

    def _finish(self, process: subprocess.Popen[str]) -> int:
        assert process.stderr is not None
        for _ in process.stderr:
            pass
        process.stderr.close()
        return process.wait()


def _lines() -> list[str]:
    return [
        json.dumps(
            {
                "custom_id": f"line-{number}",
                "prompt": OWN[number % len(OWN)],
                "max_tokens": TOKENS + number,
                "temperature": 0,
            }
        )
        + "\n"
        for number in range(LINES)
    ]


def _answers(path: Path) -> tuple[dict[str, str], int]:
    """Text by id, and how many lines were there more than once; a broken last line is passed
    over, as `--resume` does."""
    texts: dict[str, str] = {}
    doubled = 0
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with suppress(ValueError, KeyError, TypeError):
            record = json.loads(line)
            choice = record["response"]["body"]["choices"][0]
            doubled += record["custom_id"] in texts
            texts[record["custom_id"]] = choice.get("text") or choice["message"]["content"]
    return texts, doubled
