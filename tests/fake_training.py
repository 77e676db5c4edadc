"""A training run that learns nothing: it tells of steps, keeps files and obeys as a real one does.

With more than three `train_iters` it waits after the third to be stopped. A `seed` of 13 is a run
that finds a row wrong before it has a folder.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import cast

from engine.endpoint import Endpoint
from engine.errors import ExitCode
from engine.protocol import TrainingStarted, TrainingStep
from engine.training.args import Command, as_json, parse_arguments
from engine.training.attended import _hold
from engine.training.run_folder import make_run_folder

STEPS = 3


def main() -> int:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_hold, args=(sys.stdin.fileno(),), daemon=True).start()
    command, *words = sys.argv[1:]
    args = parse_arguments(words, cast(Command, command))
    if args.seed == 13:
        print(f"jupiter medusa: {args.dataset[0]}: line 2: not JSON", file=sys.stderr)
        return ExitCode.BAD_INPUT
    assert args.save is not None and args.train_iters is not None
    run = make_run_folder(Path(args.save), add_version=True, arguments=as_json(args))
    endpoint = Endpoint(
        os.environ["JUPITER_EVENTS"], os.environ["JUPITER_COMMANDS"], rank=0, epoch=1
    )
    total = args.train_iters
    endpoint.send(TrainingStarted(run=str(run), iteration=0, total=total))
    for iteration in range(1, min(total, STEPS) + 1):
        step(endpoint, run, iteration, total, heads=command == "medusa")
    print("step 3 is done\x1b[31m", file=sys.stderr, flush=True)
    code = ExitCode.OK
    if total > STEPS:
        signal.sigwait({signal.SIGTERM})
        code = ExitCode.TERMINATED
    (run / "latest_checkpointed_iteration.txt").write_text(f"{min(total, STEPS)}\n")
    if code == ExitCode.OK and command == "medusa":
        (run / "heads").mkdir()
    endpoint.close()
    return code


def step(endpoint: Endpoint, run: Path, iteration: int, total: int, *, heads: bool) -> None:
    loss, memory = 4.0 / iteration, 1 << 30
    endpoint.send(
        TrainingStep(
            iteration=iteration,
            total=total,
            loss=loss,
            loss_per_head=(loss, loss + 1) if heads else (),
            accuracy_per_head=(0.5, 0.25) if heads else (),
            base_loss=None if heads else loss,
            base_accuracy=None if heads else 0.5,
            lr=1e-3,
            grad_norm=1.0,
            tokens_per_s=321.0,
            memory_bytes=memory,
            memory_kind="process",
            elapsed_s=float(iteration),
            remaining_s=float(total - iteration),
        )
    )
    record = {
        "iteration": iteration,
        "train_iters": total,
        **({"loss_per_head": [loss, loss + 1]} if heads else {"loss": loss, "accuracy": 0.5}),
        "learning_rate": 1e-3,
        "memory_bytes": memory,
        "elapsed_s": float(iteration),
    }
    with (run / "logging.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    sys.exit(main())
