"""Tiny random models, made with transformers and saved as Hugging Face folders."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models

# More threads than work only wait for each other.
torch.set_num_threads(1)

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "llama3_rope": ("Llama", {"rope_parameters": LLAMA3_ROPE}),
    "linear_rope": ("Llama", {"rope_parameters": LINEAR_ROPE, "attention_bias": True}),
    "mistral": ("Mistral", {"head_dim": 8, "sliding_window": None}),
    "qwen2": ("Qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
}
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def reference(kind: str = "llama", *, layers: int = 6, vocab: int = 260, **extra: Any) -> Any:
    """A float32 transformers model of four heads over two KV heads, seeded."""
    import transformers

    name, settings = KINDS[kind]
    config = getattr(transformers, f"{name}Config")(
        vocab_size=vocab,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=vocab - 1,
        **{"hidden_size": 32, "tie_word_embeddings": False, **settings, **extra},
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):  # new ones are zero, which would hide a missing bias
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def character_tokenizer() -> Tokenizer:
    """256 characters and four special tokens; <|im_end|> has the highest id, 259."""
    characters = [*map(chr, range(32, 127)), "\n", *map(chr, range(0x4E00, 0x4E00 + 160))]
    vocab = {character: index for index, character in enumerate(characters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<|pad|>", "<|unk|>", "<|im_start|>", "<|im_end|>"])
    return tokenizer


def save(model: Any, folder: Path) -> Path:
    """Write model and character tokenizer as a Hugging Face folder."""
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=character_tokenizer(),
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return folder


@functools.cache
def _shared() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="jupiter-test-")


@functools.cache
def tiny_folder(kind: str = "llama", layers: int = 6) -> Path:
    """A saved tiny model, made once a session; removed when the session ends."""
    return save(reference(kind, layers=layers), Path(_shared().name) / f"{kind}-{layers}")
