"""`jupiter export`: to Megatron-Core's layout and back, bit for bit, with the same logits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from engine.checkpoint.heads import write_heads
from engine.checkpoint.mcore import McoreReader, read_common
from engine.checkpoint.mcore_view import as_model
from engine.checkpoint.merge import merge
from engine.checkpoint.preflight import preflight
from engine.checkpoint.reader import open_checkpoint
from engine.checkpoint.weight_files import check_whole
from engine.cli.main import main
from engine.config import parse_config
from tests.engine.training.ranks import train_here
from tests.tiny import reference, save, tiny_folder

HEADS = {
    "medusa_head.0.0.linear.weight": torch.randn(32, 32),
    "medusa_head.0.0.linear.bias": torch.randn(32),
    "token_map": torch.tensor([7, 11, 200]),
}


def export(*words: object) -> int:
    return main(["export", *map(str, words)])


def weights_of(folder: Path) -> dict[str, Tensor]:
    with open_checkpoint(folder) as reader:
        return {name: reader.tensor(name) for name in reader.keys()}  # noqa: SIM118


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model(torch.arange(3, 20)[None]).logits


@pytest.mark.parametrize(
    ("kind", "tied"), [("llama", True), ("mistral", False), ("qwen2", False), ("qwen2", True)]
)
def test_a_model_goes_there_and_back(
    kind: str, tied: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = reference(kind, layers=3, tie_word_embeddings=tied)
    folder = save(model, tmp_path / "model")
    test = ["--test_convert_precision", "true"]
    there, back = tmp_path / "there", tmp_path / "back"
    cut = ["--tensor_model_parallel_size", 2, "--pipeline_model_parallel_size", 2]
    assert export("--model", folder, "--to_mcore", "true", "--output_dir", there, *cut, *test) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(there)
    written = sorted(path.name for path in (there / "iter_0000001").glob("*.distcp"))
    assert written == [f"__{rank}_0.distcp" for rank in range(4)]
    args = read_common(there / "iter_0000001")["args"]
    assert (args.tensor_model_parallel_size, args.pipeline_model_parallel_size) == (2, 2)
    assert ("output_layer.weight" in McoreReader(there).stored) is not tied
    small = ["--max_shard_size", "20KB"]
    assert (
        export("--mcore_model", there, "--to_hf", "true", "--output_dir", back, *small, *test) == 0
    )
    assert len(list(back.glob("*.safetensors"))) > 1
    assert_same(weights_of(back), weights_of(folder))
    torch.testing.assert_close(logits(back), logits(folder), rtol=0, atol=1e-5)
    assert (back / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_a_run_in_one_file_gives_the_model_of_one_in_parts(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"query": "ask", "response": "an answer"}\n')
    # fmt: off
    words = [
        "--model", str(tiny_folder("qwen2", 3)), "--dataset", str(tmp_path / "rows.jsonl"),
        "--split_dataset_ratio", "0", "--global_batch_size", "1", "--train_iters", "1",
        "--add_version", "false", "--logging_level", "warning",
    ]
    # fmt: on
    found = []
    for kind in ("torch", "torch_dist"):
        run = tmp_path / kind
        train_here([*words, "--ckpt_format", kind, "--save", str(run)], "sft")
        source = run / "iter_0000001" if kind == "torch" else run
        output = tmp_path / f"{kind}-hf"
        assert export("--mcore_model", source, "--to_hf", "true", "--output_dir", output) == 0
        with as_model(source) as folder:
            check_whole(folder)
        found.append(weights_of(output))
    assert_same(*found)


def test_one_rank_of_several_in_the_older_format_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in range(2):
        (tmp_path / f"mp_rank_0{rank}").mkdir()
        torch.save({}, tmp_path / f"mp_rank_0{rank}" / "model_optim_rng.pt")
    words = ["--mcore_model", tmp_path, "--to_hf", "true", "--model", tiny_folder("llama", 3)]
    assert export(*words, "--output_dir", tmp_path / "out") == 2
    assert "2 ranks wrote a part each" in capsys.readouterr().err


def test_a_dtype_is_written_and_kept(tmp_path: Path) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    folder = tiny_folder("qwen2", 3)
    words = ["--torch_dtype", "bfloat16", "--test_convert_precision", "true"]
    assert export("--model", folder, "--to_mcore", "true", "--output_dir", there, *words) == 0
    assert (
        export("--mcore_model", there / "iter_0000001", "--to_hf", "true", "--output_dir", back)
        == 0
    )
    wanted = {name: tensor.bfloat16() for name, tensor in weights_of(folder).items()}
    assert_same(weights_of(back), wanted)
    assert json.loads((back / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("merged", [True, False])
def test_heads_travel_along(merged: bool, tmp_path: Path) -> None:
    base, there, back = tiny_folder("llama", 3), tmp_path / "there", tmp_path / "back"
    write_heads(tmp_path / "heads", HEADS, "jupiter")
    merge(base, tmp_path / "heads", tmp_path / "merged")
    words: list[object] = ["--model", tmp_path / "merged"]
    if not merged:
        words = ["--model", base, "--medusa_head_path", tmp_path / "heads"]
    assert export("--to_mcore", "true", "--output_dir", there, *words) == 0
    # The engine takes the checkpoint as it is, heads included.
    config = {"base_model_name_or_path": str(there), "stage_num_hidden_layers_list": [3]}
    assert preflight(parse_config(config, "a test"), there).num_hidden_layers == 3
    assert export("--mcore_model", there, "--to_hf", "true", "--output_dir", back) == 0
    assert_same(weights_of(back), weights_of(tmp_path / "merged"))
    assert (back / "config.json").read_text() == (tmp_path / "merged/config.json").read_text()


def test_another_models_weights_fail_the_comparison(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    there = tmp_path / "there"
    words = ["--model", tiny_folder("qwen2", 3), "--to_mcore", "true", "--output_dir", there]

    def spoilt(self: McoreReader, key: str) -> Tensor:
        return (
            -original(self, key) if key.endswith("1.self_attn.k_proj.bias") else original(self, key)
        )

    original = McoreReader.tensor
    monkeypatch.setattr(McoreReader, "tensor", spoilt)
    assert export(*words, "--test_convert_precision", "true") == 1
    assert "not the same model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--model", "MODEL"], "--to_mcore, --to_hf: give one of them as true"),
        (["--to_mcore", "true"], "--model: name the model"),
        (["--to_hf", "true"], "--mcore_model: name the checkpoint"),
        (["--to_hf", "true", "--mcore_model", "MODEL"], "no checkpoint; expected latest_"),
        (
            ["--to_mcore", "true", "--model", "MODEL", "--tensor_model_parallel_size", "3"],
            "does not divide the model's 4 attention heads",
        ),
        (
            ["--to_mcore", "true", "--model", "MODEL", "--pipeline_model_parallel_size", "9"],
            "the model has only 3 layers",
        ),
        (
            ["--to_mcore", "true", "--model", "MODEL", "--max_shard_size", "big"],
            "write a size such as 500MB",
        ),
        (
            ["--to_hf", "true", "--mcore_model", "M", "--medusa_head_path", "H"],
            "goes with --to_mcore",
        ),
    ],
)
def test_what_does_not_fit_is_told(
    words: list[str], problem: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = str(tiny_folder("qwen2", 3))
    given = [folder if word == "MODEL" else word for word in words]
    assert export(*given, "--output_dir", tmp_path / "out") == 2
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
