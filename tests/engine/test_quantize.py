"""Quantized linears: near the float ones, each row by itself, and drafts that change no answer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from engine.checkpoint.heads import write_heads
from engine.config import parse_config
from engine.errors import ConfigError
from engine.model.hadamard import block_of, turn
from engine.model.llama import LlamaRMSNorm
from engine.model.quantize import (
    Int4Linear,
    QuantizedLinear,
    int8_linear,
    quantize_linear,
    quantize_linear4,
    quantize_model,
    round_rows,
    weight_limit,
)
from engine.pipeline.batch import Entry, Judge
from engine.pipeline.build import build_stage, make_plan
from engine.pipeline.stage import Stage
from tests.engine.test_scheduler import PROMPTS, SHAPES, Engine, prompt, tokens_of
from tests.tiny import reference, save, tiny_folder

CPU = torch.device("cpu")
MAKERS = {8: quantize_linear, 4: quantize_linear4}


def linear(n_out: int, n_in: int, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(3)
    made = nn.Linear(n_in, n_out, bias=bias).requires_grad_(False)
    made.weight.mul_(3)
    return made


def error(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("shape", [(96, 64), (7, 20), (260, 33)])
@pytest.mark.parametrize("bias", [True, False])
def test_int8_products_are_near_the_float_ones(shape: tuple[int, int], bias: bool) -> None:
    exact = linear(*shape, bias=bias)
    x = torch.randn(5, shape[1])
    assert error(quantize_linear(exact)(x), exact(x)) < 0.01


def test_a_peak_leaves_the_inputs_beside_it_their_precision() -> None:
    exact = linear(96, 64, bias=False)
    x = torch.randn(5, 64)
    x[2, 7] = 100
    exact.weight[:, 7] = 0
    made = quantize_linear(exact)
    assert error(made(x)[2], exact(x)[2]) < 0.08
    weight, scale = round_rows(exact.weight)
    assert error(int8_linear(x, weight, scale[:, 0])[2], exact(x)[2]) > 0.15


@pytest.mark.parametrize("width", [48, 64, 576])
def test_what_is_turned_twice_is_what_it_was(width: int) -> None:
    x, block = torch.randn(3, width), block_of(width)
    assert block == {48: 16, 64: 64, 576: 64}[width]
    torch.testing.assert_close(turn(turn(x, block), block) / block, x, atol=1e-5, rtol=1e-5)
    assert turn(x[:0], block).shape == (0, width)
    matrix = turn(torch.eye(width), block)
    torch.testing.assert_close(x @ matrix, turn(x, block), atol=1e-4, rtol=1e-5)


def test_rows_of_a_quantized_layer_are_its_weights() -> None:
    exact = linear(32, 64)
    tokens = torch.tensor([3, 0, 31])
    assert error(quantize_linear(exact).rows(tokens), exact.weight[tokens]) < 0.01


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_the_rows_beside_it(bits: int, dtype: torch.dtype) -> None:
    made = MAKERS[bits](linear(1152, 576))
    x = (torch.randn(33, 576) * torch.logspace(-3, 3, 33)[:, None]).to(dtype)
    together = made(x)
    assert together.dtype == dtype
    for count in (1, 2, 3, 5, 8, 17):
        for start in range(0, 33 - count, 4):
            assert torch.equal(made(x[start : start + count]), together[start : start + count])


def test_int4_weights_on_the_grid_of_their_group_are_kept() -> None:
    exact = linear(32, 64, bias=False)
    steps = torch.randint(0, 16, (32, 2, 32)).float()
    steps[..., 0], steps[..., 1] = 0, 15
    exact.weight.copy_((steps * 0.25 - 2).view(32, 64))
    x = torch.randn(3, 64).bfloat16().float()
    rounded = exact(x).bfloat16().float()  # as every result of the kernel is
    torch.testing.assert_close(quantize_linear4(exact)(x), rounded, rtol=2**-7, atol=1e-5)


def test_int4_products_are_as_near_as_16_steps_allow() -> None:
    exact = linear(96, 64)
    x = torch.randn(5, 64)
    assert error(quantize_linear4(exact)(x), exact(x)) < 0.08


def test_processors_with_saturating_products_get_weights_of_7_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def saturating(a: Tensor, b: Tensor) -> Tensor:
        """As x86 has it before VNNI: inputs shifted by 128, sums of pairs in 16 bits."""
        products = (a.int() + 128)[:, :, None] * b.int()[None]
        pairs = products.unflatten(1, (-1, 2)).sum(dim=2).clamp(-(2**15), 2**15 - 1)
        return (pairs.sum(dim=1) - 128 * b.int().sum(dim=0)).int()

    weight_limit.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "_int_mm", saturating)
        exact = linear(96, 64)
        assert quantize_linear(exact).weight.abs().max() == 63
        x = torch.randn(5, 64)
        assert error(quantize_linear(exact)(x), exact(x)) < 0.02
    weight_limit.cache_clear()


def build(folder: Path, split: list[int], **values: Any) -> list[Stage]:
    base = {"base_model_name_or_path": str(folder), "stage_num_hidden_layers_list": split}
    plan = make_plan(parse_config({"device": "cpu", **base, **values}, "a test"), folder)
    return [build_stage(plan, r, CPU, lambda *_: None) for r in range(len(split))]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied model whose layers take int4 weights, but for its `down_proj`."""
    return save(reference("llama", layers=3), tmp_path_factory.mktemp("wide"))


def root_heads(folder: Path) -> str:
    tensors = {}
    torch.manual_seed(5)
    for head in range(3):
        for name, shape in {"fc1": (24, 64), "fc2": (32, 24)}.items():
            tensors[f"medusa_head.{head}.0.{name}.weight"] = torch.randn(shape)
            tensors[f"medusa_head.{head}.0.{name}.bias"] = torch.randn(shape[0])
    write_heads(folder, tensors, "jupiter")
    return str(folder)


@pytest.mark.parametrize(("bits", "kind"), [(8, QuantizedLinear), (4, Int4Linear)])
def test_linears_are_quantized_and_embedding_and_norms_are_not(
    wide: Path, tmp_path: Path, bits: int, kind: type[nn.Module]
) -> None:
    values = {f"load_in_{bits}bit": True, "medusa_head_path": root_heads(tmp_path / "heads")}
    (exact,) = build(wide, [3])
    (stage,) = build(wide, [3], **values)
    modules = dict(stage.model.named_modules())
    assert not [name for name, module in modules.items() if isinstance(module, nn.Linear)]
    assert isinstance(modules["model.layers.1.self_attn.qkv_proj"], kind)
    assert isinstance(modules["lm_head"], QuantizedLinear)
    assert isinstance(modules["medusa_head.0.0.fc1"], QuantizedLinear)
    kept = dict(stage.model.named_parameters())
    assert {name.rsplit(".", 2)[-2] for name in kept} == {
        "embed_tokens",
        *("input_layernorm", "post_attention_layernorm", "norm"),
    }
    before = dict(exact.model.named_parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in kept.items())
    assert sum(isinstance(m, LlamaRMSNorm) for m in modules.values()) == 7


def logits(stages: list[Stage], tokens: list[int]) -> Tensor:
    hidden = None
    entry = Entry(0, 0, tokens, list(range(-1, len(tokens) - 1)), Judge.NONE)
    for stage in stages:
        hidden = stage.run([entry], hidden)
    assert hidden is not None
    return stages[-1].forward.logits(hidden)


@pytest.mark.parametrize("kind", ["llama", "linear_rope", "mistral", "qwen2"])
def test_the_whole_model_in_int8_is_near_float32(kind: str) -> None:
    folder, tokens = tiny_folder(kind), list(range(5, 60))
    found = logits(build(folder, [6], load_in_8bit=True), tokens)
    assert error(found, logits(build(folder, [6]), tokens)) < 0.05


@pytest.mark.parametrize("bits", [8, 4])
def test_any_split_gives_the_same_bits(wide: Path, bits: int) -> None:
    values, tokens = {f"load_in_{bits}bit": True}, list(range(9, 40))
    whole = logits(build(wide, [3], **values), tokens)
    assert torch.equal(whole, logits(build(wide, [1, 2], **values), tokens))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", ["random", "echo", "root", "hydra"])
def test_greedy_answers_are_those_of_plain_decoding_on_the_same_weights(
    bits: int, shape: str
) -> None:
    found = []
    for heads in (SHAPES["none"], SHAPES[shape]):
        engine = Engine(heads)
        quantize_model(engine.stage.model, bits, CPU)
        events = engine.ask(*(prompt(str(i), text) for i, text in enumerate(PROMPTS)))
        engine.stop()
        found.append([tokens_of(events[str(i)]) for i in range(len(PROMPTS))])
    assert found[0] == found[1]


def test_a_tied_lm_head_alone_on_its_stage_still_tells_embeddings(
    wide: Path, tmp_path: Path
) -> None:
    values = {"load_in_8bit": True, "medusa_head_path": root_heads(tmp_path / "heads")}
    (whole,), (_, last) = (build(wide, split, **values) for split in ([3], [2, 1]))
    tokens = torch.tensor([3, 250, 17])
    exact, rounded = whole.model.embed_root(tokens), last.model.embed_root(tokens)
    assert rounded.dtype == torch.float32
    assert 0 < error(rounded, exact) < 0.01


def test_a_gpu_without_torchao_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ConfigError, match=r"'load_in_4bit': on cuda .* torchao") as caught:
        quantize_model(nn.Linear(2, 2), 4, torch.device("cuda"))
    assert "\n" not in str(caught.value)
