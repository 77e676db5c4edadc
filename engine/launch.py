"""Starting the workers of one launch through torchrun, and ending them for certain.

On one machine nothing listens beyond loopback: torchrun's rendezvous and the process group meet
in files, and gloo and NCCL are told to use the loopback interface.
"""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from signal import SIGKILL, SIGTERM

import psutil
from msgspec.json import decode as json_decode

import engine
from engine.config import JupiterConfig, config_json
from engine.errors import EngineError
from engine.keeper import CAN_FORK
from engine.logs import new_log_dir, torchrun_log
from engine.processes import ProcessHandle, descendants, wait_all_gone
from engine.run_dir import Run, RunDir

WORKER = Path(engine.__file__).with_name("worker.py")
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
# Seconds that torchrun leaves its workers between SIGTERM and SIGKILL; its own default is 30.
SHUTDOWN_TIMEOUT_S = 1
REAP_S = 1.0

Command = Callable[["Launch"], list[str]]


class Launch:
    """One launch of the workers: its run folder, its logs, its processes.

    Args:
        config: the run; one worker per stage.
        model_folder: the Hugging Face-style folder of the base model.
        epoch: number of this launch, stamped on every message.
        command: builds the command line that starts the workers.
        ranks: those that are started on this machine; all of them without it.
        interface: the network interface by which the stages talk.
        spread: other ranks are on other machines.
    """

    def __init__(
        self,
        config: JupiterConfig,
        model_folder: Path,
        epoch: int,
        command: Command | None = None,
        *,
        ranks: range | None = None,
        interface: str = LOOPBACK,
        spread: bool = False,
    ) -> None:
        self.config = config
        self.ranks = range(config.world_size) if ranks is None else ranks
        self.interface = interface
        self._spread = spread
        self.model_folder = model_folder
        self.epoch = epoch
        self.log_dir = new_log_dir()
        self.run_dir = RunDir()
        self.process: subprocess.Popen[bytes] | None = None
        self._wanted = [1] * config.world_size
        self._command = command or torchrun_command
        self._workers: dict[int, ProcessHandle] = {}
        atexit.register(self.kill_now)

    def spawn(self) -> int:
        """Start torchrun with its workers; returns its pid.

        It gets no terminal: no stdin, output to a file, and a session of its own, so that Ctrl+C
        reaches only the client. Raises EngineError when it cannot be started.
        """
        try:
            self.run_dir.write_run(self._run())
            with torchrun_log(self.log_dir).open("ab") as log:
                self.process = subprocess.Popen(
                    self._command(self),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=worker_environment(self.config, self.interface),
                    start_new_session=True,
                )
        except OSError as error:
            raise EngineError(f"the workers cannot be started: {error}") from None
        return self.process.pid

    def replace(self, ranks: Iterable[int], epoch: int) -> bool:
        """Have another worker started for each of `ranks` as soon as it has none; from now on they
        belong to `epoch`.

        Returns whether that takes as long as a start. Raises EngineError when it cannot be written.
        """
        self.epoch = epoch
        for rank in ranks:
            self._wanted[rank] += 1
        self._write()
        return False

    def change(self, config: JupiterConfig, epoch: int, wanted: Iterable[int]) -> None:
        """What workers are told that start from now on, as another machine has it.

        Raises EngineError when it cannot be written.
        """
        self.config, self.epoch, self._wanted = config, epoch, list(wanted)
        self._write()

    def _write(self) -> None:
        try:
            self.run_dir.write_run(self._run())
        except OSError as error:
            raise EngineError(f"{self.run_dir.run_file}: {error.strerror}") from None

    def _run(self) -> Run:
        return Run(
            epoch=self.epoch,
            events=self.run_dir.events,
            commands=self.run_dir.commands,
            client_pid=os.getpid(),
            model_folder=str(self.model_folder),
            log_dir=str(self.log_dir),
            store=str(self.run_dir.store(self.epoch)),
            config=json_decode(config_json(self.config)),
            workers=tuple(self._wanted),
            first_rank=self.ranks.start,
            exchange=self.run_dir.exchange if self._spread else "",
        )

    def exit_code(self) -> int | None:
        """torchrun's exit code (negative: a signal), or None while it runs."""
        return self.process.poll() if self.process else None

    def add_descendants(self) -> None:
        """Remember every process that torchrun has started so far: all have to end with it."""
        if self.process is None or self.process.poll() is not None:
            return
        for pid in descendants(self.process.pid):
            if pid not in self._workers:
                with suppress(OSError):  # it may have ended already
                    self._workers[pid] = ProcessHandle(pid)

    def kill_worker(self, pid: int) -> None:
        """End one process below torchrun; nothing if it has ended."""
        if pid in self._workers:
            self._workers[pid].signal(SIGKILL)

    def unreaped(self) -> bool:
        """Whether the kernel still lists a worker, be it only for torchrun to take notice."""
        return any(psutil.pid_exists(pid) for pid in self._workers)

    def terminate(self) -> None:
        """Ask torchrun to end its workers and itself."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(SIGTERM)

    def kill_now(self) -> None:
        """End every process of this launch by SIGKILL and remove the run folder.

        The last resort, also of `atexit`: needs no event loop; idempotent; takes no longer than
        REAP_S seconds.
        """
        self.add_descendants()
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
        for worker in self._workers.values():
            worker.signal(SIGKILL)
        wait_all_gone(self._workers.values(), REAP_S / 2)
        if self.process is not None:
            with suppress(subprocess.TimeoutExpired):  # stuck in the kernel: no more can be done
                self.process.wait(REAP_S / 2)
        self._forget()

    def _forget(self) -> None:
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()
        self.run_dir.remove()
        atexit.unregister(self.kill_now)


def torchrun_command(launch: Launch, worker: Path = WORKER) -> list[str]:
    """torchrun for one worker per stage, in a process that ends with this one.

    Where it can, it forks the workers: they have torch, which it has loaded, at once.
    """
    # fmt: off
    return [
        sys.executable, "-m", "engine.owned", str(os.getpid()), "torch.distributed.run",
        "--nnodes", "1",
        "--nproc-per-node", str(len(launch.ranks)),
        "--max-restarts", "0",
        "--shutdown-timeout", str(SHUTDOWN_TIMEOUT_S),
        "--rdzv-backend", "c10d",
        "--rdzv-conf", "store_type=file",
        "--rdzv-endpoint", str(launch.run_dir.rendezvous),
        "--rdzv-id", "jupiter",
        "--local-addr", "127.0.0.1",
        "--redirects", "3",
        "--log-dir", str(launch.log_dir),
        *(("--start-method", "fork", "--run-path") if CAN_FORK else ()),
        str(worker), str(launch.run_dir.path),
    ]
    # fmt: on


def worker_environment(config: JupiterConfig, interface: str = LOOPBACK) -> dict[str, str]:
    """The environment of torchrun and its workers; what the user has set goes first.

    Stages talk over the network interface `interface`.

    A waiting stage must not spin: it would take the cores from the one that works. With one
    sequence in flight only one stage computes at a time, so each may use all cores.
    """
    defaults = {
        "OMP_NUM_THREADS": str(usable_cores()),
        "OMP_WAIT_POLICY": "passive",
        "GOMP_SPINCOUNT": "0",
        "KMP_BLOCKTIME": "0",
        "GLOO_SOCKET_IFNAME": interface,
        "NCCL_SOCKET_IFNAME": interface,
    }
    fixed = {
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "PYTHONUNBUFFERED": "1",
        **module_environment(),
    }
    if config.num_threads is not None:
        fixed["OMP_NUM_THREADS"] = str(config.num_threads)
    return {**defaults, **os.environ, **fixed}


def module_environment() -> dict[str, str]:
    """Variables with which `python -m` finds this very package, whatever the current folder holds.

    `-m` puts the current folder first, and a folder named `engine` there would be taken for ours.
    """
    root = Path(engine.__file__).parent.parent
    if root.name in ("site-packages", "dist-packages"):
        return {"PYTHONSAFEPATH": "1"}
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    return {"PYTHONSAFEPATH": "1", "PYTHONPATH": path}


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
