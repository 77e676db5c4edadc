"""Starting a training run: in this process, or once per rank under torchrun. Torch comes late.

NPROC_PER_NODE, NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT say how many ranks there are and
where. On one machine the ranks meet in files, and nothing listens beyond loopback.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from engine.checkpoint.sources import fetch
from engine.errors import ConfigError, EngineError, ExitCode, JupiterError, StageLostError
from engine.launch import LOOPBACK, module_environment
from engine.logs import describe_exit
from engine.model.config import ModelConfig
from engine.owners import watch_owners
from engine.run_dir import RunDir
from engine.training.args import Command, TrainArguments, model_source, parse_arguments
from engine.training.args_check import validate
from engine.training.args_resolve import shaped, with_model

STORE_VARIABLE = "JUPITER_STORE"
"""Names the file over which the ranks of one machine find each other."""
ERROR_VARIABLE = "JUPITER_ERROR_FILE"
"""Names the file for the first rank's error: told once, though every rank may have met it."""
# A rank that was asked to stop may still have a step to finish and a checkpoint to write.
SHUTDOWN_S = 600


def launch(words: Sequence[str], command: Command = "medusa") -> int:
    """Train as the words of `jupiter COMMAND` say; returns the exit code.

    Started under torchrun, this process is one of the ranks.

    Raises:
        JupiterError: of the kind that fits, in one line.
    """
    args = parse_arguments(words, command)
    if "RANK" in os.environ:
        return run_rank(args)
    local, nodes = _count("NPROC_PER_NODE"), _count("NNODES")
    validate(args, local * nodes)
    folder = fetch(model_source(args), lambda line: print(line, file=sys.stderr))
    with_model(args, shaped(args, ModelConfig.from_folder(folder)), folder)  # before ranks start
    if local * nodes == 1:
        return run_rank(args)
    run_dir = RunDir()
    try:
        return _run_agent([command, *words], local, nodes, run_dir)
    finally:
        run_dir.remove()


def run_rank(args: TrainArguments) -> int:
    """Train as one rank; rank 0 prints the run folder as the last line of stdout."""
    error_file = os.environ.get(ERROR_VARIABLE)
    if error_file is not None:
        watch_owners(os.getppid())
    from engine.training.trainer import train

    try:
        run = train(args)
    except JupiterError as error:
        if error_file is None:
            raise
        if not isinstance(error, StageLostError):  # then another rank knows the cause
            _leave_word(Path(error_file), error)
        return error.exit_code
    if os.environ.get("RANK", "0") == "0":
        print(run, flush=True)
    return ExitCode.OK


def _count(variable: str) -> int:
    text = os.environ.get(variable, "1")
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{variable}={text}: must be a whole number from 1")
    return int(text)


def _leave_word(path: Path, error: JupiterError) -> None:
    """Write the error down unless another rank was first."""
    text = json.dumps({"message": str(error), "exit_code": int(error.exit_code)})
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    try:
        os.link(unfinished, path)
    except FileExistsError:
        pass
    finally:
        unfinished.unlink()


def _run_agent(words: Sequence[str], local: int, nodes: int, run_dir: RunDir) -> int:
    """Be torchrun for the ranks of this machine; returns their exit code."""
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    errors = run_dir.path / "error.json"
    os.environ.update(_environment(run_dir, errors, local, nodes))
    # What torchrun logs of a failure says nothing that is not said better below.
    logging.disable(logging.CRITICAL)
    options = _torchrun_options(run_dir, local, nodes)
    try:
        torchrun.run(torchrun.parse_args([*options, "--module", "engine.cli.main", *words]))
    except SignalException as caught:
        stopped = caught.sigval == signal.SIGINT
        _raise_told(errors)
        return ExitCode.INTERRUPTED if stopped else ExitCode.TERMINATED
    except ChildFailedError as failed:
        _raise_told(errors)
        rank, failure = failed.get_first_failure()
        if failure.exitcode in (ExitCode.INTERRUPTED, ExitCode.TERMINATED):
            return failure.exitcode
        raise EngineError(f"rank {rank} {describe_exit(failure.exitcode)}") from None
    finally:
        logging.disable(logging.NOTSET)
    return ExitCode.OK


def _raise_told(errors: Path) -> None:
    """Raise the error that a rank has written down, if one has."""
    if errors.exists():
        told = json.loads(errors.read_text(encoding="utf-8"))
        error = EngineError(told["message"])
        error.exit_code = ExitCode(told["exit_code"])
        raise error


def _environment(run_dir: RunDir, errors: Path, local: int, nodes: int) -> dict[str, str]:
    threads = max(1, (os.cpu_count() or 1) // local)
    values = {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive"),
        ERROR_VARIABLE: str(errors),
        **module_environment(),
    }
    if nodes == 1:
        values |= {
            STORE_VARIABLE: str(run_dir.store(0)),
            "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", LOOPBACK),
            "NCCL_SOCKET_IFNAME": os.environ.get("NCCL_SOCKET_IFNAME", LOOPBACK),
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }
    return values


def _torchrun_options(run_dir: RunDir, local: int, nodes: int) -> list[str]:
    # fmt: off
    options = [
        "--nproc-per-node", str(local),
        "--nnodes", str(nodes),
        "--max-restarts", "0",
        "--shutdown-timeout", str(SHUTDOWN_S),
        "--log-dir", str(run_dir.path),
    ]
    if nodes > 1:
        return [
            *options,
            "--node-rank", os.environ.get("NODE_RANK", "0"),
            "--master-addr", os.environ.get("MASTER_ADDR", "127.0.0.1"),
            "--master-port", os.environ.get("MASTER_PORT", "29500"),
        ]
    return [
        *options,
        "--rdzv-backend", "c10d",
        "--rdzv-conf", "store_type=file",
        "--rdzv-endpoint", str(run_dir.rendezvous),
        "--rdzv-id", "jupiter",
        "--local-addr", "127.0.0.1",
    ]
    # fmt: on
