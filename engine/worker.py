"""One rank of a launch: `worker.py RUN_DIR`, started by torchrun.

What torchrun starts is the rank's keeper (engine/keeper.py), a fork of torchrun where that is
possible; the worker is a fork of it, which has torch loaded from the beginning.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path

from engine.config import JupiterConfig, parse_config
from engine.endpoint import Endpoint, watch_owners
from engine.errors import ExitCode, JupiterError, StageLostError
from engine.keeper import CAN_FORK, keep
from engine.protocol import Regroup, StageState, WorkerError
from engine.run_dir import Run, read_run

SUBSCRIBE_S = 60.0
# A client that has not said within so many seconds how to go on has another process in mind.
REGROUP_S = 30.0


def main(run_dir: str) -> int:
    """Serve as the rank that torchrun's environment names; returns the exit code."""
    folder = Path(run_dir)
    if not CAN_FORK:  # no quick recovery then
        return work(read_run(folder))
    # A fork of torchrun has its handlers, which end the launch; SIGINT comes when torchrun is gone,
    # and that the keeper sees for itself.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run = read_run(folder)
    rank = run.first_rank + int(os.environ["RANK"])
    with suppress(OSError):  # the command line is torchrun's, of all ranks alike
        Path("/proc/self/comm").write_text(f"jupiter-rank-{rank}")
    endpoint = Endpoint(run.events, run.commands, rank=rank, epoch=run.epoch)
    endpoint.send(StageState(phase="starting"))
    endpoint.close()  # its threads must not be there when the worker is forked
    _load_torch()
    return keep(folder, work)


def _load_torch() -> None:
    import engine.pipeline.build
    import engine.pipeline.group
    import engine.pipeline.run  # noqa: F401


def work(run: Run) -> int:
    """Be the worker of this process's rank; returns its exit code."""
    watch_owners(run.client_pid)
    local_rank = int(os.environ["LOCAL_RANK"])
    rank = run.first_rank + int(os.environ["RANK"])
    endpoint = Endpoint(run.events, run.commands, rank=rank, epoch=run.epoch)
    try:
        endpoint.send(StageState(phase="starting", pid=os.getpid()))
        if not endpoint.wait_subscribed(SUBSCRIBE_S):
            print("no heartbeat from the client", file=sys.stderr)
            return ExitCode.ENGINE_FAILED
        return _work(run, rank, local_rank, endpoint)
    finally:
        endpoint.close()
        sys.stdout.flush()
        sys.stderr.flush()


def _work(run: Run, rank: int, local_rank: int, endpoint: Endpoint) -> int:
    try:
        config = parse_config(run.config, "run.json")
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


def _serve(config: JupiterConfig, run: Run, rank: int, local_rank: int, endpoint: Endpoint) -> None:
    import torch

    from engine.pipeline.build import build_stage, choose_device, make_plan, will_compile
    from engine.pipeline.group import choose_backend, join_over, leave, store_of
    from engine.pipeline.run import Kept, run_rank

    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    plan = make_plan(config, Path(run.model_folder))
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
    backend, store = choose_backend(config, device), run.store
    kept = Kept.of(plan) if rank == 0 else None
    while True:
        if config.world_size > 1:
            state("connecting")
            met = store_of(Path(store), run.exchange, config)
            join_over(met, rank, config.world_size, backend, config)
        state("ready")
        try:
            run_rank(plan, stage, rank, inbox=endpoint.inbox, emit=endpoint.send, kept=kept)
            break
        except StageLostError as error:
            print(error, file=sys.stderr, flush=True)
            state("lost")
        leave()  # not while the error, and with it what uses the connections, is there
        store = _regrouped(endpoint)
    state("stopped")


def _regrouped(endpoint: Endpoint) -> str:
    """Wait until the client has the stages meet again; the store of the new group.

    Raises StageLostError where it does not.
    """
    while True:
        try:
            command = endpoint.inbox.get(timeout=REGROUP_S)
        except queue.Empty:
            raise StageLostError("the stages were not brought together again") from None
        if isinstance(command, Regroup):
            endpoint.change_epoch(command.epoch)
            return command.store


if __name__ == "__main__":
    code = main(sys.argv[1])
    sys.stdout.flush()
    sys.stderr.flush()
    if not CAN_FORK:
        # Straight out: a receive that still waits in a thread must not hold the process back.
        os._exit(code)
    sys.exit(code)
