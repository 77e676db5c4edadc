"""`python -m tests.fuzz [TARGET ...] --runs N`: the fuzz tests with as many inputs as wanted.

`--atheris` lets the coverage of the readers guide the inputs, where atheris is installed; each
target then has a process of its own, as libFuzzer ends the one that it runs in.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path


def main() -> int:
    """0 when nothing was found, else 1."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", help="readers to try; all of them by default")
    parser.add_argument("--runs", type=int, default=10_000, help="inputs for each (10000)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--atheris", action="store_true", help="inputs guided by coverage")
    args = parser.parse_args()
    from tests.fuzz.targets import TARGETS

    if unknown := set(args.targets) - set(TARGETS):
        parser.error(f"no such target: {', '.join(unknown)}; there are {', '.join(TARGETS)}")
    found = 0
    for name in args.targets or TARGETS:
        began = time.monotonic()
        failed = _guided(name, args) if args.atheris else _random(name, args)
        found += failed
        print(
            f"{name}: {'FOUND' if failed else 'ok'}, {time.monotonic() - began:.0f} s", flush=True
        )
    return 1 if found else 0


def _random(name: str, args: argparse.Namespace) -> bool:
    from tests.fuzz.run import Hang, fuzz

    with tempfile.TemporaryDirectory() as folder:
        try:
            taken, refused = fuzz(name, args.runs, Path(folder), seed=args.seed)
        except (Exception, Hang) as error:
            for one in error.exceptions if isinstance(error, ExceptionGroup) else [error]:
                place = traceback.extract_tb(one.__traceback__)[-1]
                print(f"{name}: {type(one).__name__}: {one} ({place.filename}:{place.lineno})")
                print("\n".join(getattr(one, "__notes__", ())))
            return True
    print(f"{name}: {taken + refused} inputs, {taken} taken, {refused} refused")
    return False


def _guided(name: str, args: argparse.Namespace) -> bool:
    command = [sys.executable, "-m", "tests.fuzz.guided", name, str(args.runs), str(args.seed)]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stderr.splitlines()
    print("\n".join(lines[-1:] if done.returncode == 0 else lines[-25:]))
    return done.returncode != 0


if __name__ == "__main__":
    sys.exit(main())
