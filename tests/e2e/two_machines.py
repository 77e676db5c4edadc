"""Two machines in network namespaces, one of them cut off in the middle: `test_machines.py` runs
this in namespaces of its own, with the folder of a config.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from engine.bench.network.rig import Rig, address
from engine.processes import ProcessHandle, descendants, wait_all_gone

TUI = str(Path(sys.executable).with_name("jupiter-tui"))
PORT = 29600
PATIENCE_S = 60.0
NOTICED_S = 3.5
"""Three seconds, and what the way of a line to the test may take."""
GONE_S = 5.0


class Program:
    """A shipped command on one of the machines."""

    def __init__(
        self, rig: Rig, machine: int, words: list[str], state: Path, **streams: int
    ) -> None:
        environment = {
            **os.environ,
            "JUPITER_STATE_DIR": str(state),
            "JUPITER_CACHE_DIR": str(state / "cache"),
        }
        self.process = subprocess.Popen(
            rig.command(machine, words),
            stdout=streams.get("stdout", subprocess.DEVNULL),
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert self.process.stderr is not None
        self.told = Lines(self.process.stderr)

    def close(self) -> None:
        """Whatever happened, nothing is left."""
        print("told:", *self.told.all, *self.told.come(), sep="\n  ", file=sys.stderr)
        handles = [ProcessHandle(pid) for pid in descendants(self.process.pid)]
        self.process.kill()
        self.process.wait()
        assert wait_all_gone(handles, GONE_S)
        for handle in handles:
            handle.close()


class Lines:
    """The lines of a stream, as they come."""

    def __init__(self, stream: IO[str]) -> None:
        self.all: list[str] = []
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, args=(stream,), daemon=True).start()

    def _read(self, stream: IO[str]) -> None:
        for line in stream:
            self._lines.put(line)
        self._lines.put("")

    def wait_for(self, test: Callable[[str], bool]) -> str:
        """The next line for which `test` holds."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"waited in vain; there was: {self.all}") from None
            self.all.append(line)
            if not line:
                raise AssertionError(f"it ended; there was: {self.all}")
            if test(line):
                return line

    def come(self) -> list[str]:
        """Those that nobody has waited for."""
        return [self._lines.get() for _ in range(self._lines.qsize())]

    def rest(self) -> list[str]:
        """All lines to the end."""
        return list(iter(lambda: self._lines.get(timeout=PATIENCE_S), ""))


def main(folder: Path) -> None:
    """Everything, with assertions; prints how soon the loss was noticed."""
    rig = Rig(2)
    with ExitStack() as stack:
        words = [TUI, "--config", str(folder / "config.json"), "--batch", str(folder / "in.jsonl")]
        words += ["-o", "-", "--progress", "json"]
        words += ["--nnodes", "2", "--listen", f"{address(0)}:{PORT}"]
        first = Program(rig, 0, words, folder / "first", stdout=subprocess.PIPE)
        stack.callback(first.close)
        invitation = first.told.wait_for(lambda line: "jupiter join" in line)
        join = json.loads(invitation)["message"].partition("run: ")[2].split()
        join[0] = str(Path(sys.executable).with_name("jupiter"))
        other = Program(rig, 1, [*join, "--name", "b", "--receive"], folder / "other")
        stack.callback(other.close)
        other.told.wait_for(lambda line: "receiving model" in line)
        answers = cut_off(rig, first, other)
        assert first.process.wait(PATIENCE_S) == 0
        assert other.process.wait(PATIENCE_S) == 0
        assert len(answers) == len((folder / "in.jsonl").read_text().splitlines())
        assert len(set(answers)) == 1, "an answer differs"


def cut_off(rig: Rig, first: Program, other: Program) -> list[str]:
    """The texts of all answers; in the middle of them the cable is out for a while."""
    assert first.process.stdout is not None
    answers = Lines(first.process.stdout)
    lines = [answers.wait_for(bool)]
    ports(rig)
    rig.connect(1, up=False)
    since = time.monotonic()
    first.told.wait_for(lambda line: "node 1 (b) has been silent" in line)
    noticed = time.monotonic() - since
    print(f"noticed after {noticed:.2f} s")
    assert noticed < NOTICED_S
    first.told.wait_for(lambda line: "waiting for node 1 (b)" in line)
    other.told.wait_for(lambda line: "has been silent" in line)
    rig.connect(1, up=True)
    first.told.wait_for(lambda line: "all machines are here again" in line)
    first.told.wait_for(lambda line: '"summary"' in line)
    print(f"done {time.monotonic() - since:.1f} s after the cut")
    bodies = [json.loads(line)["response"]["body"] for line in [*lines, *answers.rest()]]
    return [body["choices"][0]["message"]["content"] for body in bodies]


def ports(rig: Rig) -> None:
    """Both machines listen on the asked address and on loopback only."""
    for machine in (0, 1):
        words = rig.command(machine, ["ss", "--no-header", "-tln"])
        told = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        heard = [line.split()[3].rpartition(":") for line in told.splitlines()]
        assert {host for host, _, _ in heard} <= {address(machine), "127.0.0.1"}, told
        assert (str(PORT) in {port for _, _, port in heard}) == (machine == 0), told


if __name__ == "__main__":
    main(Path(sys.argv[1]))
