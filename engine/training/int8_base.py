"""The frozen base as the engine runs it in int8: its hidden states, for heads that draft for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from engine.config import JupiterConfig
from engine.model.config import ModelConfig
from engine.pipeline.batch import Entry, Judge
from engine.pipeline.build import build_stage, make_plan
from engine.pipeline.stage import Stage
from engine.training.template import Sample

ROWS = 256
"""Rows of a sample passed through the model at a time."""


class Int8Base:
    """The whole model on this rank, in int8; made at the first call, which may take seconds.

    Hidden states are those that the engine's heads draft from with `load_in_8bit`, and on a CPU
    its kernels are faster than float32 or bfloat16 products.

    Args:
        longest: tokens of the longest sample.
    """

    def __init__(self, folder: Path, device: torch.device, longest: int) -> None:
        self._folder, self._device, self._longest = folder, device, longest
        self._stage: Stage | None = None

    def forward(
        self, parts: Sequence[Sequence[Sample]], keep: Callable[[int, Tensor], None]
    ) -> None:
        """Call `keep` with each part's number and its normed hidden states [rows, hidden_size]."""
        threads = torch.get_num_threads()
        try:
            self._stage = self._stage or self._build()
            for index, samples in enumerate(parts):
                keep(index, torch.cat([_hidden(self._stage, sample) for sample in samples]))
        finally:
            torch.set_num_threads(threads)  # the kernels have threads of their own

    def _build(self) -> Stage:
        layers = ModelConfig.from_folder(self._folder).num_hidden_layers
        config = JupiterConfig(
            base_model_name_or_path=str(self._folder),
            stage_num_hidden_layers_list=[layers],
            medusa_num_heads=0,
            load_in_8bit=True,
            max_kv_cache_length=self._longest,
        )
        return build_stage(make_plan(config, self._folder), 0, self._device, lambda *_: None)


def _hidden(stage: Stage, sample: Sample) -> Tensor:
    tokens, chunks = sample.tokens.tolist(), []
    for start in range(0, len(tokens), ROWS):
        chunk = tokens[start : start + ROWS]
        parents = list(range(-1, len(chunk) - 1))
        chunks.append(stage.run([Entry(0, start, chunk, parents, Judge.NONE)], None))
    return torch.cat(chunks)
