"""Writing checkpoints, at once or while the run goes on."""

from __future__ import annotations

import argparse
import shutil
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from engine.checkpoint.dcp import Chunk, ChunkSavePlanner, DcpReader, state_of
from engine.checkpoint.mcore import VERSION, extra_states, write_common
from engine.checkpoint.mcore_files import name_of
from engine.checkpoint.torch_file import write_torch_file
from engine.errors import EngineError
from engine.model.config import ModelConfig
from engine.training.checkpoint import (
    OWN,
    Facts,
    Format,
    last_good,
    make_empty,
    publish,
    together,
    weight_chunks,
)
from engine.training.mesh import Mesh
from engine.training.optimizer import Optimizer
from engine.training.parallelize import Part
from engine.training.regions import Regions


@dataclass(frozen=True)
class Options:
    """What is written and how."""

    format: Format = "torch_dist"
    with_states: bool = True
    with_random: bool = True
    in_background: bool = False


class Saver:
    """Writes the checkpoints of a run; every rank calls every method.

    A checkpoint is written under another name and gets its own when it is on the disk as a whole.

    Args:
        args: plain values for common.pt, by Megatron's names.
        done: told by rank 0 of each checkpoint that is there; maybe from another thread.
    """

    def __init__(
        self,
        run: Path,
        config: ModelConfig,
        part: Part,
        optimizer: Optimizer,
        mesh: Mesh,
        options: Options,
        args: Mapping[str, Any],
        done: Callable[[Path], None] = lambda folder: None,
    ) -> None:
        self.run, self.config, self.part, self.optimizer = run, config, part, optimizer
        self.mesh, self.options, self.args, self.done = mesh, options, dict(args), done
        self._regions = Regions(config)
        self._writing: tuple[Path, Future[Any]] | None = None
        self._problem = ""
        self._published = threading.Event()

    def save(self, facts: Facts, own: Mapping[str, Any], vocabulary: Tensor | None) -> None:
        """Write a checkpoint, or begin to.

        Args:
            own: more plain values to be kept.

        Raises:
            EngineError: on all ranks, when one could not write this one or the one before; what
                was saved earlier is intact.
        """
        self.wait()
        final = self.run / name_of(facts.iteration)
        unfinished = self.run / f".{final.name}.partial"
        try:
            self._write(facts, own, vocabulary, unfinished, final)
        except EngineError as error:
            self._give_up(final, unfinished, str(error))

    def wait(self) -> None:
        """Until the checkpoint that is being written is there. Raises EngineError as `save`."""
        if self._writing is None:
            return
        final, future = self._writing
        self._writing = None
        problem = _problem_of(lambda: future.result())
        if self.mesh.rank == 0 and not problem:
            self._published.wait()
            problem = self._problem
        if told := self.mesh.world.first_text(problem):
            self._give_up(final, self.run / f".{final.name}.partial", told)

    def _give_up(self, final: Path, unfinished: Path, problem: str) -> None:
        if self.mesh.rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        raise EngineError(f"{final}: not saved: {problem}; {last_good(self.run)}") from None

    def _write(
        self,
        facts: Facts,
        own: Mapping[str, Any],
        vocabulary: Tensor | None,
        unfinished: Path,
        final: Path,
    ) -> None:
        world, options = self.mesh.world, self.options
        leads = self.mesh.rank == 0
        together(world, partial(make_empty, unfinished) if leads else None)
        self.optimizer.settle()
        chunks = weight_chunks(
            self.optimizer, self.part, self._regions, with_states=options.with_states
        )
        common = self._common(facts, own, vocabulary)
        objects = self._objects()
        if options.in_background:
            together(
                world, partial(self._write_common, unfinished, facts, common) if leads else None
            )
            self._begin(chunks, objects, unfinished, final, facts.iteration)
            return
        problem = _problem_of(partial(_write_dist, chunks, objects, unfinished))
        if told := world.first_text(problem):
            raise EngineError(told)

        def finish() -> None:
            if options.format == "torch":
                _as_torch_file(unfinished, self._torch_common(facts, common))
            else:
                self._write_common(unfinished, facts, common)
            publish(unfinished, final, facts.iteration)
            self.done(final)

        together(world, finish if leads else None)

    def _begin(
        self,
        chunks: Sequence[Chunk],
        objects: Mapping[str, Any],
        unfinished: Path,
        final: Path,
        iteration: int,
    ) -> None:
        self._published.clear()
        self._problem = ""
        future = async_save(
            state_of(chunks),
            storage_writer=FileSystemWriter(unfinished),
            planner=ChunkSavePlanner(chunks, objects),
            process_group=self.mesh.saving,
        )
        assert isinstance(future, Future)
        self._writing = final, future
        if self.mesh.rank == 0:
            future.add_done_callback(partial(self._publish, unfinished, final, iteration))

    def _publish(self, unfinished: Path, final: Path, iteration: int, future: Future[Any]) -> None:
        """As soon as all ranks have written, in the thread that knows it first."""
        try:
            if future.exception() is None:
                publish(unfinished, final, iteration)
                self.done(final)
        except OSError as error:
            self._problem = error.strerror or str(error)
        finally:
            self._published.set()

    def _objects(self) -> dict[str, Any]:
        """The states that Megatron-Core expects beside the base's weights; rank 0 writes them."""
        learns = any(piece.name.startswith("model.") for piece in self.optimizer.pieces)
        if self.mesh.rank != 0 or not learns:
            return {}
        return dict(extra_states(self.config, range(self.config.num_hidden_layers)))

    def _common(
        self, facts: Facts, own: Mapping[str, Any], vocabulary: Tensor | None
    ) -> dict[str, Any]:
        kept: dict[str, Any] = {"facts": {**vars(facts), "heads": dict(facts.heads)}, **own}
        if vocabulary is not None:
            kept["vocabulary"] = vocabulary
        if self.options.with_states:
            kept["updates"] = {r.value: n for r, n in self.optimizer.updates.items()}
        if self.options.with_random:
            mine = torch.get_rng_state()
            kept["random"] = [s.clone() for s in self.mesh.world.all_gather(mine[None])]
        return {OWN: kept}

    def _write_common(self, folder: Path, facts: Facts, common: Mapping[str, Any]) -> None:
        write_common(folder, self.args, facts.iteration, **common)

    def _torch_common(self, facts: Facts, common: Mapping[str, Any]) -> dict[str, Any]:
        args = argparse.Namespace(**self.args)
        return {
            "args": args,
            "iteration": facts.iteration,
            "checkpoint_version": VERSION,
            **common,
        }


def _write_dist(chunks: Sequence[Chunk], objects: Mapping[str, Any], folder: Path) -> None:
    with warnings.catch_warnings():  # of a single process, which is what is meant
        warnings.simplefilter("ignore", UserWarning)
        save(
            {},
            storage_writer=FileSystemWriter(folder),
            planner=ChunkSavePlanner(chunks, objects),
            no_dist=not dist.is_initialized(),
        )


def _as_torch_file(folder: Path, common: Mapping[str, Any]) -> None:
    """Put what was written into one file, and leave that alone. Raises OSError."""
    write_torch_file(DcpReader(folder), folder, common)
    for path in folder.iterdir():
        if path.is_file():
            path.unlink()


def _problem_of(work: Callable[[], Any]) -> str:
    """What kept `work` from writing, in a few words; "" when nothing did."""
    try:
        work()
    except CheckpointException as error:
        first = next(iter(error.failures.values()))[0]
        return getattr(first, "strerror", None) or str(first) or type(first).__name__
    except OSError as error:
        return error.strerror or str(error)
    return ""
