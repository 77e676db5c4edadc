"""`jupiter bench ui`: does the workbench keep up with a fast model?

The workbench runs as it is in a terminal of its own, here a pseudo-terminal that this process
holds; only the engine is played (tui/bench_app.py), at a fixed number of tokens per second. What
has reached the screen is judged from outside, by the marks in the text that the terminal was sent.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Sequence
from pathlib import Path

from engine.errors import EngineError, ExitCode, JupiterError
from tui.bench_text import MARK, document, tokens

PATIENCE_S = 30.0
"""How much longer than planned anything may take before the run is given up."""
SIZE = (120, 36)
CTRL_Q = b"\x11"
_ESCAPE = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_=>])")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the bench; its last line is the JSON."""
    parser = argparse.ArgumentParser(prog="jupiter bench ui", description=__doc__.split("\n")[0])
    parser.add_argument("--rate", type=float, default=200.0, help="tokens per second")
    parser.add_argument("--code-lines", type=int, default=400, help="lines of the code block")
    args = parser.parse_args(argv)
    try:
        print(json.dumps(measure(args.rate, args.code_lines)))
    except JupiterError as error:
        print(f"jupiter bench ui: {error}", file=sys.stderr)
        return error.exit_code
    return ExitCode.OK


def measure(rate: float, code_lines: int) -> dict[str, object]:
    """Stream the document at `rate` tokens per second; the figures that the JSON has."""
    pieces = tokens(document(code_lines))
    print(f"{len(pieces)} tokens at {rate:g} per second in a terminal of {SIZE[0]}×{SIZE[1]}")
    with tempfile.TemporaryDirectory(prefix="jupiter-bench-") as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "tui.bench_app", str(rate), str(code_lines), str(report)]
        terminal = Terminal(command, {**os.environ, "JUPITER_STATE_DIR": folder})
        try:
            terminal.wait_for(b"ready", PATIENCE_S)
            terminal.send(b"Go\r")
            last = MARK.findall("".join(pieces))[-1]
            terminal.wait_for(last.encode(), len(pieces) / rate + PATIENCE_S)
            terminal.send(CTRL_Q)
            terminal.wait_end()
        finally:
            terminal.close()
        told = json.loads(report.read_text(encoding="utf-8"))
    behind = worst_delay(pieces, told.pop("began_at"), rate, terminal.marks)
    return {"bench": "ui", **told, "behind_s": round(behind, 3)}


def worst_delay(pieces: list[str], began_at: float, rate: float, seen: dict[str, float]) -> float:
    """The longest time in seconds from a mark's arrival to its being seen.

    A mark that was never seen was passed over when the next one was.
    """
    worst, seen_at = 0.0, float("inf")
    for index in reversed(range(len(pieces))):
        if found := MARK.search(pieces[index]):
            seen_at = min(seen_at, seen.get(found[0], float("inf")))
            worst = max(worst, seen_at - (began_at + index / rate))
    return worst


class Terminal:
    """A program in a pseudo-terminal; `marks` tells when each mark was first sent to it."""

    def __init__(self, command: list[str], environ: dict[str, str]) -> None:
        self.marks: dict[str, float] = {}
        self._rest = b""
        self._seen = b""
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", SIZE[1], SIZE[0], 0, 0))
        environ |= {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
        environ.pop("NO_COLOR", None)
        # As its controlling terminal: if this process is killed, the workbench is hung up.
        self._process = subprocess.Popen(
            command, env=environ, preexec_fn=lambda: os.login_tty(slave)
        )
        os.close(slave)

    def send(self, keys: bytes) -> None:
        """Type."""
        os.write(self._master, keys)

    def wait_for(self, text: bytes, timeout: float) -> None:
        """Take in what is shown until `text` is; EngineError if it is not so in `timeout` s."""
        deadline = time.monotonic() + timeout
        while text not in self._seen:
            if not self._read() or time.monotonic() > deadline:
                shown = self._seen.decode(errors="replace").strip()[-300:]
                raise EngineError(f"the workbench never showed {text.decode()!r}; last: {shown}")

    def wait_end(self) -> None:
        """Wait until the program has ended."""
        while self._read():
            pass
        self._process.wait(PATIENCE_S)

    def close(self) -> None:
        """Leave nothing behind."""
        self._process.kill()
        self._process.wait()
        os.close(self._master)

    def _read(self) -> bool:
        """Take in one piece of what is written; False when there is none for long, or the end."""
        if not select.select([self._master], [], [], PATIENCE_S)[0]:
            return False
        try:
            data = os.read(self._master, 1 << 16)
        except OSError:  # how Linux tells the end of a terminal's other side
            return False
        now = time.monotonic()
        # What an escape sequence or a mark may be cut off from stays for the next piece.
        whole = self._rest + data
        cut = max(0, len(whole) - 64)
        text = _ESCAPE.sub(b"", whole)
        self._rest = whole[cut:]
        self._seen = (self._seen + text)[-(1 << 17) :]
        for mark in MARK.findall(text.decode(errors="replace")):
            self.marks.setdefault(mark, now)
        return True


if __name__ == "__main__":
    sys.exit(main())
