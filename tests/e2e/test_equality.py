"""Greedy answers of live torchrun stages against transformers' `generate`, token for token.

A seeded sample of the prompts runs with each setting; `pytest --full` runs all of them.
"""

from __future__ import annotations

import asyncio
import functools
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint.heads import write_heads
from engine.client import EngineClient
from engine.config import JupiterConfig, load_config
from engine.pipeline.batch import Entry, Judge
from engine.pipeline.build import build_stage, make_plan
from engine.protocol import Failed, Finished, Message, SamplingParams, Tokens

PROMPTS = (
    "What is the capital of France?",
    "Name three primary colors.",
    "Write a haiku about the sea.",
    "Explain in one sentence why the sky is blue.",
    "List five animals that live in Africa.",
    "Translate 'good morning' into Spanish.",
    "What is 17 plus 25?",
    "Write a Python function that reverses a string.",
    "Who wrote Romeo and Juliet?",
    "Give me a recipe for pancakes.",
    "hi",
    "Summarize: The quick brown fox jumps over the lazy dog. The dog does not mind at all.",
    "Continue the story: Once upon a time, in a small village by the river,",
    "What are the pros and cons of remote work?",
    "Fix the grammar: she dont likes apples",
    "Write a SQL query that counts the users per country.",
    "Erkläre mir kurz, was ein Vulkan ist.",
    "1, 1, 2, 3, 5, 8, what comes next?",
    "Make a table of the planets with their diameters.",
    "Repeat the word 'banana' ten times.",
    "Why do cats purr? 🐱",
    "Describe the taste of water to someone who has never had it, in a formal tone, and mention "
    "at least three different senses while doing so. " * 6,
)
NEW_TOKENS = 24
NEAR_TIE = 1e-4


@pytest.fixture(scope="module")
def reference(default_model: Path) -> Reference:
    return Reference(default_model)


@pytest.fixture(scope="module")
def random_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five random ResBlock heads that share the base model's lm_head."""
    torch.manual_seed(0)
    tensors = {}
    for head in range(5):
        tensors[f"medusa_head.{head}.0.linear.weight"] = torch.randn(576, 576) * 0.02
        tensors[f"medusa_head.{head}.0.linear.bias"] = torch.randn(576) * 0.02
    folder = tmp_path_factory.mktemp("heads")
    write_heads(folder, tensors, layout="v2")
    return folder


class Reference:
    """transformers' own answers, computed once."""

    def __init__(self, folder: Path) -> None:
        import transformers

        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def prompt_ids(self, text: str) -> list[int]:
        turns = [{"role": "user", "content": text}]
        rendered = self.tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=False
        )
        return self.tokenizer(rendered, add_special_tokens=False).input_ids

    @functools.cache  # noqa: B019 - one object for the whole run
    def answer(self, text: str) -> list[int]:
        ids = torch.tensor([self.prompt_ids(text)])
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            repetition_penalty=None,
        )
        return out[0, ids.shape[1] :].tolist()

    def gap(self, text: str, prefix: list[int]) -> float:
        """Difference of the two best logits after the prompt and `prefix`."""
        with torch.inference_mode():
            ids = torch.tensor([self.prompt_ids(text) + prefix])
            best = self.model(ids).logits[0, -1].topk(2).values
        return float(best[0] - best[1])


def check(reference: Reference, text: str, got: list[int]) -> None:
    """`got` equals the reference, or differs first where its two best logits nearly tie."""
    expected = reference.answer(text)
    if got == expected:
        return
    at = next((i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), None)
    assert at is not None, f"{text!r}: {len(got)} tokens instead of {len(expected)}"
    gap = reference.gap(text, expected[:at])
    print(f"{text!r}: differs at token {at}, where the two best logits are {gap:.2e} apart")
    assert gap < NEAR_TIE, f"{text!r}: token {at} is {got[at]}, expected {expected[at]}"


def test_logits_of_the_default_model_equal_transformers(
    reference: Reference, default_model: Path
) -> None:
    """Whole and in chunks over three stages, float32."""
    config = load_config(
        str(Path(__file__).parents[2] / "config.json"),
        stages="7,15,8",
        assignments=["device=cpu", "load_in_8bit=false"],
    )
    plan = make_plan(config, default_model)
    device = torch.device("cpu")
    stages = [build_stage(plan, rank, device, lambda done, total: None) for rank in range(3)]
    ids = reference.prompt_ids(PROMPTS[-1])
    with torch.inference_mode():
        expected = reference.model(torch.tensor([ids])).logits[0]
        got = []
        for start in range(0, len(ids), 50):
            tokens = ids[start : start + 50]
            entry = Entry(0, start, tokens, list(range(-1, len(tokens) - 1)), Judge.LAST)
            hidden = None
            for stage in stages:
                hidden = stage.run([entry], hidden)
            got.append(stages[-1].model.lm_head(hidden))
    torch.testing.assert_close(torch.cat(got), expected, atol=1e-4, rtol=0)


async def ask(client: EngineClient, text: str) -> list[int]:
    tokens: list[int] = []
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
    async for event in client.submit(messages=[Message("user", text)], params=params):
        assert not isinstance(event, Failed), event
        if isinstance(event, Tokens):
            tokens += event.token_ids
        if isinstance(event, Finished):
            assert event.completion_tokens == len(tokens)
    return tokens


async def answers(config: JupiterConfig, alone: list[str], together: list[str]) -> dict[str, Any]:
    client = EngineClient(config)
    try:
        await client.start()
        found: dict[str, Any] = {"alone": [await ask(client, text) for text in alone]}
        found["together"] = await asyncio.gather(*(ask(client, text) for text in together))
        return found
    finally:
        await client.stop()


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("heads", [False, True], ids=["plain", "random heads, mc_63"])
@pytest.mark.parametrize("split", ["30", "15,15", "7,15,8"])
async def test_greedy_tokens_equal_transformers(
    reference: Reference, random_heads: Path, split: str, heads: bool, full: bool
) -> None:
    options = ["max_num_seqs=8", "load_in_8bit=false"]
    if heads:
        options += [f"medusa_head_path={random_heads}", "medusa_choices=mc_63"]
    config = load_config(
        str(Path(__file__).parents[2] / "config.json"), stages=split, assignments=options
    )
    # Without heads and together many are cheap; each sample is another one.
    sample = random.Random(f"{split} {heads}").sample(PROMPTS, 4 if heads else 12)
    alone = list(PROMPTS) if full else sample[:1]
    together = list(PROMPTS) if full else sample[1:]
    found = await answers(config, alone, together)
    for text, got in zip(alone + together, found["alone"] + found["together"], strict=True):
        check(reference, text, got)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("split", ["30", "15,15", "7,15,8"])
async def test_int8_answers_are_those_of_plain_decoding_on_one_stage(
    plain_int8: dict[str, list[int]], split: str, full: bool
) -> None:
    """The default config: kernels where there are any, tuned trees, several sequences at a time."""
    prompts = list(plain_int8) if full else list(plain_int8)[:4]
    found = await answers(int8(split), prompts[:2], prompts)
    expected = [plain_int8[text] for text in prompts]
    assert found["alone"] == expected[:2]
    assert found["together"] == expected


@pytest.fixture(scope="module")
async def plain_int8(default_model: Path, full: bool) -> dict[str, list[int]]:
    """Answers of one stage without heads."""
    prompts = list(PROMPTS) if full else list(PROMPTS)[:4]
    found = await answers(int8("30", "medusa_num_heads=0"), prompts, [])
    return dict(zip(prompts, found["alone"], strict=True))


def int8(split: str, *options: str) -> JupiterConfig:
    path = Path(__file__).parents[2] / "config.json"
    return load_config(
        str(path), stages=split, assignments=["max_num_seqs=8", "load_in_8bit=true", *options]
    )
