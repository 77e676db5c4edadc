"""The training loop: steps, evaluations, checkpoints, and the heads at the end."""

from __future__ import annotations

import dataclasses
import gc
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoint.mcore import parallel_args
from engine.errors import EngineError
from engine.training.ahead import ahead
from engine.training.args import TrainArguments, as_json, model_source
from engine.training.batch import Targets, make_batch
from engine.training.data import micro_batches, sequences
from engine.training.export import copy_texts, export_base, export_heads
from engine.training.figures import Losses, Step
from engine.training.hidden_cache import HiddenCache
from engine.training.int8_base import Int8Base
from engine.training.mesh import leave
from engine.training.metrics import RunLog, memory_bytes
from engine.training.optimizer import Role, global_norm
from engine.training.run_folder import make_run_folder
from engine.training.saving import Options, Saver
from engine.training.setup import Session, prepare
from engine.training.signals import EXIT_CODES, StopSignals
from engine.training.template import Sample


def train(args: TrainArguments) -> Path:
    """Train as `args` say; runs in every rank. Returns the run folder.

    Ctrl+C and SIGTERM save a checkpoint and raise SystemExit(130) or SystemExit(143).

    Raises:
        JupiterError: of the kind that fits, in one line.
    """
    try:
        with StopSignals() as signals:
            return Trainer(prepare(args), signals).run()
    finally:
        leave()


class Trainer:
    """One rank of a run."""

    def __init__(self, session: Session, signals: StopSignals) -> None:
        self.session, self.signals = session, signals
        self.inputs, self.args = session.inputs, session.inputs.args
        self.mesh, self.objective, self.facts = session.mesh, session.objective, session.facts
        self._stop = [False] * len(EXIT_CODES)
        self.run_folder = self._make_folder()
        self.log: RunLog | None = None
        if self.mesh.rank == 0:
            self.log = RunLog(
                self.run_folder,
                self.args,
                total=self.inputs.total,
                has_base=self.objective.has_base,
                has_heads=self.objective.has_heads,
            )
            self.log.started(self.facts.iteration)
            for note in self.inputs.notes:
                self.log.note(note)
        self.batches = self._batches()
        self.saver = self._make_saver()

    def run(self) -> Path:
        """All steps that are left; returns the run folder."""
        try:
            self._fill_caches()
            if self.args.manual_gc:
                gc.disable()
                gc.collect()
            self.signals.deferred = True
            while self.facts.iteration < self.inputs.total:
                self._step()
                self._after_step()
            self.saver.wait()
            self.signals.deferred = False
            self._finish()
        finally:
            gc.enable()
            if self.log is not None:
                self.log.close()
        return self.run_folder

    # --- one step ------------------------------------------------------------------------------

    def _step(self) -> None:
        began = time.perf_counter()
        session, iteration = self.session, self.facts.iteration
        rates = self._rates(iteration)
        micro = [next(self.batches) for _ in range(self.args.accumulation_steps(self.mesh.dp))]
        session.optimizer.zero_grads()
        figures = self._pass(micro, session.cache, base_learns=Role.BASE in rates, learn=True)
        squares = session.optimizer.reduce(frozenset(rates))
        tokens = sum(len(sample) for samples in micro for sample in samples)
        stop = [self.signals.received is each for each in EXIT_CODES]
        # One message a step for all that the ranks have to tell each other.
        counted = tokens * self.mesh.last * self.mesh.leads
        shared = torch.tensor([counted, *stop], dtype=torch.float64)
        memory = torch.zeros(self.mesh.world.size, dtype=torch.float64)
        memory[self.mesh.rank] = memory_bytes()
        message = torch.cat([squares[None], shared, figures.flatten(), memory])
        shared = self.mesh.world.sum_(message)
        memory = shared[-len(memory) :]
        loss_scale = session.loss_scale.value
        grad_norm = math.sqrt(shared[0].item()) / loss_scale
        losses = self._losses(shared[2 + len(stop) : -len(memory)].view_as(figures))
        usable = session.loss_scale.update(grad_norm)
        if not math.isfinite(losses.loss) or (usable and not math.isfinite(grad_norm)):
            raise EngineError(
                f"step {iteration + 1}: the loss is {losses.loss:g} and the gradient's norm "
                f"{grad_norm:g}; try a lower learning rate or a longer warm-up"
            )
        if usable:
            session.optimizer.step(rates, grad_norm, loss_scale)
        self._stop = [bool(flag) for flag in shared[2 : 2 + len(stop)]]
        self.facts = dataclasses.replace(
            self.facts,
            iteration=iteration + 1,
            consumed_samples=self.facts.consumed_samples + self.args.global_batch_size,
        )
        held = tuple(map(int, memory.tolist()))
        self._tell(losses, rates, grad_norm, int(shared[1]), held, began)

    def _rates(self, iteration: int) -> dict[Role, float]:
        """Learning rates of the roles that learn in this step."""
        schedules, joins = self.session.schedules, self.args.medusa_warmup_iters
        if not self.objective.has_heads:
            return {Role.BASE: schedules[Role.BASE](iteration)}
        rates = {Role.HEADS: schedules[Role.HEADS](iteration)}
        if self.objective.has_base and iteration >= joins:
            rates[Role.BASE] = schedules[Role.BASE](iteration - joins)
        return rates

    def _pass(
        self,
        micro: Sequence[Sequence[Sample]],
        cache: HiddenCache | None,
        *,
        base_learns: bool,
        learn: bool,
    ) -> Tensor:
        """Micro-batches through the stages, and back if they are to learn.

        Returns, on the last stage, per loss the sum over its targets, how many were predicted
        rightly, how many there were and how many were dropped: float64 [4, losses] of this rank's
        rows; zeros on the other stages, and where another rank has the same rows.
        """
        pipeline, objective = self.session.pipeline, self.objective
        figures = torch.zeros(4, len(objective.distances), dtype=torch.float64)
        targets: list[Targets] = []
        scales: list[float] = []
        if self.mesh.last:
            targets = [objective.targets(samples, self.inputs.device) for samples in micro]
            figures[2:] = _counts(targets, len(objective.distances))
            counts = figures[2].clone()
            # Only a step has a common sum; replicas take in different numbers of held-out rows.
            scales = objective.scales(
                (self.mesh.replicas.sum_(counts) if learn else counts).tolist()
            )
            if learn:
                scales = [scale * self.session.loss_scale.value for scale in scales]

        def loss(index: int, hidden: Tensor) -> Tensor:
            total, part = objective.loss(
                pipeline.model, hidden, targets[index], scales, base_learns=base_learns
            )
            figures[:2] += part.cpu()
            return total

        def finish(index: int, hidden: Tensor) -> None:
            with torch.set_grad_enabled(learn), pipeline.autocast():
                total = loss(index, hidden)
            if learn:
                total.backward()

        if cache is not None:
            if self.mesh.last:
                for index, samples in enumerate(micro):
                    finish(index, cache.rows(samples, self.inputs.device))
            return figures
        sharing = self.session.part.sharing
        batches = [make_batch(samples, self.inputs.device, sharing) for samples in micro]
        if base_learns and learn:
            self.session.optimizer.expect(len(batches))
            pipeline.train(batches, lambda i, hidden: loss(i, hidden[targets[i].positions]))
        else:
            pipeline.forward(batches, lambda i, hidden: finish(i, hidden[targets[i].positions]))
        return figures if self.mesh.tensor.index == 0 else torch.zeros_like(figures)

    def _losses(self, figures: Tensor) -> Losses:
        sums, right, kept, dropped = figures.tolist()
        each = [total / max(count, 1) for total, count in zip(sums, kept, strict=True)]
        return Losses(
            loss=sum(w * value for w, value in zip(self.objective.weights, each, strict=True)),
            each=tuple(each),
            accuracy=tuple(
                hits / max(count + out, 1)
                for hits, count, out in zip(right, kept, dropped, strict=True)
            ),
            dropped=int(sum(dropped)),
        )

    def _tell(
        self,
        losses: Losses,
        rates: dict[Role, float],
        grad_norm: float,
        tokens: int,
        memory: tuple[int, ...],
        began: float,
    ) -> None:
        params_norm = None
        heads, has_base = self.objective.has_heads, self.objective.has_base
        if self.args.log_params_norm and self.facts.iteration % self.args.log_interval == 0:
            params_norm = global_norm(self.session.optimizer.squared_params(), self.mesh.world)
        if self.log is not None:
            self.log.step(
                Step(
                    iteration=self.facts.iteration,
                    consumed_samples=self.facts.consumed_samples,
                    losses=losses,
                    lr=rates[Role.HEADS if heads else Role.BASE],
                    base_lr=rates.get(Role.BASE, 0.0) if heads and has_base else None,
                    grad_norm=grad_norm,
                    params_norm=params_norm,
                    tokens=tokens,
                    memory=memory,
                    seconds=time.perf_counter() - began,
                    loss_scale=self.session.loss_scale.value if self.args.fp16 else None,
                )
            )

    # --- between steps -------------------------------------------------------------------------

    def _after_step(self) -> None:
        iteration, args = self.facts.iteration, self.args
        is_end = iteration == self.inputs.total
        interval = args.eval_interval or args.save_interval
        stopped = [code for flag, code in zip(self._stop, EXIT_CODES.values(), strict=True) if flag]
        evaluates = not stopped and (is_end or iteration % interval == 0)
        saves = bool(stopped) or is_end or iteration % args.save_interval == 0
        if evaluates:
            self._evaluate()
        if saves:
            self._save()
        if args.manual_gc:
            every = args.manual_gc_interval
            if evaluates or saves or (every and iteration % every == 0):
                gc.collect()
        if stopped and not is_end:
            self.saver.wait()
            if self.log is not None:
                self.log.note(f"stopped after step {iteration}; saved in {self.run_folder}")
            raise SystemExit(int(stopped[0]))

    def _evaluate(self) -> None:
        """Losses of the rows held out, which the replicas share."""
        session, args = self.session, self.args
        if not self.inputs.held_out or not args.eval_iters:
            return
        units = sequences(self.inputs.held_out, args)[: args.eval_iters * args.global_batch_size]
        mine = units[self.mesh.replica :: self.mesh.dp]
        size = args.micro_batch_size
        micro = [
            [sample for unit in mine[at : at + size] for sample in unit]
            for at in range(0, len(mine), size)
        ]
        figures = self._pass(micro, session.held_out_cache, base_learns=False, learn=False)
        losses = self._losses(self.mesh.world.sum_(figures))
        if self.log is not None:
            self.log.evaluation(self.facts.iteration, losses)

    def _save(self) -> None:
        vocabulary = self.objective.vocabulary
        ids = None if vocabulary is None else vocabulary.ids.cpu()
        own = {"loss_scale": self.session.loss_scale.state()} if self.args.fp16 else {}
        self.saver.save(self.facts, own, ids)
        if self.log is not None:
            self.log.plot()

    def _make_saver(self) -> Saver:
        args, inputs, session = self.args, self.inputs, self.session
        mesh = self.mesh
        parallel = parallel_args(
            inputs.config, tp=mesh.tp, pp=mesh.pp, cp=mesh.cp, dtype=torch.float32
        )
        log = self.log
        return Saver(
            self.run_folder,
            inputs.config,
            session.part,
            session.optimizer,
            mesh,
            Options(
                "torch" if args.ckpt_format == "torch" else "torch_dist",
                with_states=not args.no_save_optim,
                with_random=not args.no_save_rng,
                in_background=args.async_save,
            ),
            as_json(args) | parallel,
            (lambda folder: log.note(f"saved {folder}")) if log is not None else _say_nothing,
        )

    def _finish(self) -> None:
        """Write what the engine can load."""
        session, dtype = self.session, self.inputs.export_dtype
        vocabulary = self.objective.vocabulary
        if not self.objective.has_heads:
            if self.log is not None:
                self.log.note(f"weights are in {self.run_folder}; see jupiter export --to_hf")
            return
        if self.objective.has_base:
            export_base(
                session.part, self.inputs.folder, self.run_folder / "model", self.mesh, dtype
            )
        if self.mesh.last and self.mesh.replica == 0 and self.mesh.leads:
            export_heads(
                session.part.model,
                self.run_folder / "heads",
                layout=self.args.layout,
                dtype=dtype,
                base_model=model_source(self.args),
                trained_on=None if vocabulary is None else vocabulary.ids,
            )
        self.mesh.world.wait()  # the heads are there before rank 0 says so
        if self.log is not None:
            self.log.note(f"heads are in {self.run_folder / 'heads'}")

    # --- before the first step -----------------------------------------------------------------

    def _make_folder(self) -> Path:
        name = ""
        if self.mesh.rank == 0:
            assert self.args.save is not None
            name = str(
                make_run_folder(
                    Path(self.args.save).expanduser().absolute(),
                    add_version=self.args.add_version,
                    arguments=as_json(self.args),
                )
            )
            if self.args.command != "medusa":
                copy_texts(self.inputs.folder, Path(name), self.inputs.config)
        return Path(self.mesh.world.first_text(name))

    def _batches(self) -> Iterator[list[Sample]]:
        args = self.args
        batches = micro_batches(
            self.inputs.samples,
            args=args,
            dp_rank=self.mesh.replica,
            dp_size=self.mesh.dp,
            consumed_samples=self.facts.consumed_samples,
        )
        made_late = args.lazy_tokenize or args.streaming
        return ahead(batches, args.num_workers) if made_late and args.num_workers else batches

    def _fill_caches(self) -> None:
        def progress(done: int, total: int) -> None:
            if self.log is not None:
                self.log.note(f"hidden states: {done} of {total} parts")

        caches = [c for c in (self.session.cache, self.session.held_out_cache) if c is not None]
        int8, inputs = None, self.inputs
        if self.args.load_in_8bit:
            longest = max(len(sample) for cache in caches for sample in cache.samples)
            int8 = Int8Base(inputs.folder, inputs.device, longest)
        for cache in caches:
            cache.fill(self.session.pipeline, self.mesh, progress, int8)


def _say_nothing(folder: Path) -> None:
    """Only rank 0 tells."""


def _counts(targets: Sequence[Targets], losses: int) -> Tensor:
    """Targets and dropped targets of each loss, float64 [2, losses]."""
    counts = torch.zeros(2, losses, dtype=torch.float64)
    for each in targets:
        counts[0] += torch.tensor(each.counts())
        counts[1] += torch.tensor(each.dropped)
    return counts
