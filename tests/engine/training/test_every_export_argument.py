"""Each argument of `jupiter export` and `jupiter infer` does what the table says.

A command with the argument is held against one without: what it writes, or what it asks of the
engine, has to differ.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint.heads import write_heads
from engine.cli.main import main
from engine.errors import JupiterError
from engine.training import infer as infer_module
from engine.training.args_export import ExportArguments
from engine.training.args_fields import arguments
from engine.training.args_infer import InferArguments
from engine.training.args_parse import parse
from tests.tiny import tiny_folder

Words = dict[str, object]
THERE: Words = {"model": tiny_folder("llama", 4), "to_mcore": "true", "output_dir": "DIR/out"}
BACK: Words = {"mcore_model": "DIR/mcore", "to_hf": "true", "output_dir": "DIR/out"}
EXPORT: dict[str, tuple[Words, object]] = {
    "to_mcore": (THERE, "false"),
    "to_hf": (BACK, "false"),
    "model": (THERE, tiny_folder("qwen2", 4)),
    "mcore_model": (BACK, "DIR/other"),
    "output_dir": (THERE, "DIR/elsewhere"),
    "torch_dtype": (THERE, "bfloat16"),
    "test_convert_precision": (BACK, "true"),
    "max_shard_size": (BACK, "20KB"),
    "tensor_model_parallel_size": (THERE, 2),
    "pipeline_model_parallel_size": (THERE, 2),
    "medusa_head_path": (THERE, "DIR/heads"),
}
CHAT: Words = {"model": tiny_folder("llama", 4), "config": "DIR/config.json"}
FILE: Words = {**CHAT, "val_dataset": "DIR/rows.jsonl", "result_path": "DIR/answers.jsonl"}
SAMPLED: Words = {**CHAT, "temperature": 0.5}
INFER: dict[str, tuple[Words, object]] = {
    "model": (CHAT, tiny_folder("qwen2", 4)),
    "mcore_model": (CHAT, "DIR/mcore"),
    "medusa_head_path": (CHAT, "DIR/heads"),
    "system": (CHAT, "be"),
    "stream": (CHAT, "false"),
    "temperature": (CHAT, 0.5),
    "top_p": (SAMPLED, 0.5),
    "max_new_tokens": (CHAT, 9),
    "seed": (SAMPLED, 9),
    "val_dataset": (FILE, "DIR/rows.jsonl#1"),
    "result_path": (FILE, "DIR/more.jsonl"),
    "limit": (FILE, 1),
    "max_num_seqs": (FILE, 3),
    "stage_num_hidden_layers_list": (CHAT, "2 2"),
    "torch_dtype": (CHAT, "bfloat16"),
    "load_in_8bit": (CHAT, "true"),
    "config": (CHAT, "DIR/other.json"),
    "progress": (FILE, "json"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints, heads, two configs and two questions."""
    folder = tmp_path_factory.mktemp("arguments")
    for name, kind in (("mcore", "llama"), ("other", "mistral")):
        words: Words = {**THERE, "model": tiny_folder(kind, 4), "output_dir": f"DIR/{name}"}
        assert main(["export", *line(words, folder)]) == 0
    heads = {"medusa_head.0.0.linear.weight": torch.ones(32, 32)}
    heads["medusa_head.0.0.linear.bias"] = torch.ones(32)
    write_heads(folder / "heads", heads, "v2", base_model="", vocab_size=260)
    config = {"base_model_name_or_path": "a", "stage_num_hidden_layers_list": [4]}
    for name, threads in (("config", 1), ("other", 2)):
        (folder / f"{name}.json").write_text(json.dumps(config | {"num_threads": threads}))
    rows = [{"query": "one"}, {"query": "two"}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def line(words: Words, folder: Path) -> list[str]:
    found = []
    for name, value in words.items():
        found += [f"--{name}", *str(value).replace("DIR", str(folder)).split(" ")]
    return found


def test_all_arguments_are_here() -> None:
    assert EXPORT.keys() == arguments(ExportArguments).keys()
    assert INFER.keys() == arguments(InferArguments).keys()


@pytest.mark.parametrize("name", EXPORT)
def test_an_argument_of_export_changes_what_is_written(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str], clean: Callable[[], None]
) -> None:
    words, value = EXPORT[name]

    def run(words: Words) -> tuple[Any, ...]:
        clean()
        code = main(["export", *line(words, folder)])
        out, problem = capsys.readouterr()
        sizes = {
            str(path.relative_to(folder)): path.stat().st_size
            for output in ("out", "elsewhere")
            for path in (folder / output).rglob("*")
        }
        return code, out, problem if code else "", sizes

    before, after = run(words), run(words | {name: value})
    assert before[0] == 0 and before != after
    assert (after[0] == 0) is (name not in ("to_mcore", "to_hf"))


@pytest.fixture
def clean(folder: Path) -> Callable[[], None]:
    """Takes away what a command wrote."""

    def run() -> None:
        for name in ("out", "elsewhere"):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in ("answers.jsonl", "more.jsonl"):
            (folder / name).unlink(missing_ok=True)

    return run


@pytest.mark.parametrize("name", INFER)
def test_an_argument_of_infer_changes_what_the_engine_is_asked(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, clean: Callable[[], None]
) -> None:
    words, value = INFER[name]
    asked: list[Any] = []

    class Chat:
        def __init__(self, *given: Any, **more: Any) -> None:
            asked.append((given, more))

        def run(self) -> int:
            return 0

    class File:
        def __init__(self, sampling: Any, config: Any, todo: Any, file: Any, shown: Any) -> None:
            asked.append((sampling, config, todo, file.path, type(shown)))

        async def serve(self) -> None:
            return None

    monkeypatch.setattr(infer_module, "ChatLoop", Chat)
    monkeypatch.setattr(infer_module, "_FileRun", File)

    def run(words: Words) -> None:
        clean()
        args, _ = parse(line(words, folder), InferArguments)
        try:
            infer_module.infer(args)
        except JupiterError as error:
            asked.append(str(error))

    run(words)
    run(words | {name: value})
    before, after = asked
    assert not isinstance(before, str) and not isinstance(after, str), (before, after)
    assert before != after
