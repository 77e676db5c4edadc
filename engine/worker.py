"""One rank of a launch: `python -m engine.worker RUN_DIR`, started by torchrun.

torch is imported late: before that, the queue is connected and the owners are watched, so that a
worker whose client dies during the start ends as well.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

from engine.config import JupiterConfig, parse_config
from engine.endpoint import Endpoint, watch_owners
from engine.errors import ExitCode, JupiterError, StageLostError
from engine.protocol import StageState, WorkerError

SUBSCRIBE_S = 60.0


def main(run_dir: str) -> int:
    """Serve as the rank that torchrun's environment names; returns the exit code."""
    run = json.loads((Path(run_dir) / "run.json").read_text(encoding="utf-8"))
    watch_owners(run["client_pid"])
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    endpoint = Endpoint(run["events"], run["commands"], rank=rank, epoch=run["epoch"])
    try:
        endpoint.send(StageState(phase="starting", pid=os.getpid()))
        if not endpoint.wait_subscribed(SUBSCRIBE_S):
            print("no heartbeat from the client", file=sys.stderr)
            return ExitCode.ENGINE_FAILED
        return _work(run, rank, local_rank, endpoint)
    finally:
        endpoint.close()


def _work(run: dict[str, str], rank: int, local_rank: int, endpoint: Endpoint) -> int:
    try:
        config = parse_config(run["config"], "run.json")  # type: ignore[arg-type]
        _serve(config, run, rank, local_rank, endpoint)
    except StageLostError as error:
        # Not a WorkerError: the cause is another rank, which is reported in its own right.
        print(error, file=sys.stderr)
        return error.exit_code
    except JupiterError as error:
        print(error, file=sys.stderr)
        endpoint.send(WorkerError(message=str(error), exit_code=error.exit_code))
        return error.exit_code
    except Exception as error:
        traceback.print_exc()
        message = f"{type(error).__name__}: {error}"
        endpoint.send(WorkerError(message=message, exit_code=ExitCode.ENGINE_FAILED))
        return ExitCode.ENGINE_FAILED
    return ExitCode.OK


def _serve(
    config: JupiterConfig, run: dict[str, str], rank: int, local_rank: int, endpoint: Endpoint
) -> None:
    import torch

    from engine.pipeline.build import build_stage, choose_device, make_plan, will_compile
    from engine.pipeline.group import choose_backend, join_by_file
    from engine.pipeline.run import run_rank

    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    plan = make_plan(config, Path(run["model_folder"]))
    layers = plan.layers(rank)

    def state(phase: str, done: int = 0, total: int = 0) -> None:
        endpoint.send(
            StageState(
                phase=phase,  # type: ignore[arg-type]
                first_layer=layers.start,
                num_layers=len(layers),
                done=done,
                total=total,
                pid=os.getpid(),
            )
        )

    device = choose_device(config.device, local_rank)
    state("compiling" if will_compile(plan, device) else "loading")
    stage = build_stage(plan, rank, device, lambda done, total: state("loading", done, total))
    if config.world_size > 1:
        state("connecting")
        backend = choose_backend(config, device)
        join_by_file(Path(run["store"]), rank, config.world_size, backend, config)
    state("ready")
    run_rank(plan, stage, rank, inbox=endpoint.inbox, emit=endpoint.send)
    state("stopped")


if __name__ == "__main__":
    code = main(sys.argv[1])
    sys.stdout.flush()
    sys.stderr.flush()
    # Straight out: a receive that still waits in a thread must not hold the process back.
    os._exit(code)
