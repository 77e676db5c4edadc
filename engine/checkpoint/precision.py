"""Whether a converted model is the same model: both in float32 on one prompt."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.checkpoint.load import EMBEDDING, LM_HEAD
from engine.checkpoint.mcore import McoreReader
from engine.checkpoint.tokenizer import ensure_tokenizer
from engine.model.config import ModelConfig
from engine.model.llama import Rows, Segment
from engine.model.medusa import MedusaLlamaForCausalLM
from engine.text import TextCodec

PROMPT = "The capital of France is Paris, and that of Japan is Tokyo. Who are you?"
LIMIT = 0.1
"""Mean difference of logits from which two models are not the same."""


@dataclass(frozen=True)
class Comparison:
    """What both models made of the prompt."""

    mean: float
    """Mean absolute difference of their logits."""
    max: float
    tokens: tuple[tuple[int, ...], tuple[int, ...]]
    """The likeliest next token at each position, of each model."""

    @property
    def passed(self) -> bool:
        """Whether they are the same model."""
        return self.mean < LIMIT and self.tokens[0] == self.tokens[1]


def compare(folder: Path, checkpoint: Path, dtype: torch.dtype | None) -> Comparison:
    """Compare the Hugging Face model in `folder`, as transformers runs it, with `checkpoint`.

    Args:
        checkpoint: a run or iteration folder of Megatron-Core's layout.
        dtype: what both are rounded to before they are made float32, as the conversion rounds.

    Raises:
        CheckpointError: one of them cannot be loaded.
    """
    config = ModelConfig.from_folder(folder)
    codec = TextCodec(folder, ensure_tokenizer(folder), config.eos_token_id)
    tokens = torch.tensor(codec.encode(PROMPT, add_special_tokens=True))
    tokens = tokens[: config.context_limit]
    with torch.no_grad():
        ours = _logits(checkpoint, config, tokens, dtype)
        theirs = _transformers_logits(folder, tokens, dtype)
    difference = (ours - theirs).abs()
    likeliest = [tuple(logits.argmax(-1).tolist()) for logits in (theirs, ours)]
    return Comparison(
        difference.mean().item(), difference.max().item(), (likeliest[0], likeliest[1])
    )


def _logits(
    checkpoint: Path, config: ModelConfig, tokens: Tensor, dtype: torch.dtype | None
) -> Tensor:
    with torch.device("meta"):
        model = MedusaLlamaForCausalLM(config)
    names = list(model.state_dict())
    with McoreReader(checkpoint, config) as reader:
        for name in names:
            source = EMBEDDING if config.tie_word_embeddings and name == LM_HEAD else name
            weight = reader.tensor(source).to(dtype or torch.float32).float()
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, torch.nn.Parameter(weight))
    count = len(tokens)
    return model.lm_head(model(tokens, Rows(torch.arange(count), [Segment(slice(0, count))])))


def _transformers_logits(folder: Path, tokens: Tensor, dtype: torch.dtype | None) -> Tensor:
    import transformers

    transformers.logging.set_verbosity_error()  # heads in the same file are none of its business
    transformers.logging.disable_progress_bar()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype or torch.float32, local_files_only=True
    )
    logits: Tensor = model.float().eval()(tokens[None]).logits[0]
    return logits
