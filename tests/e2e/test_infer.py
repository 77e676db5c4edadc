"""`jupiter infer` as it is shipped: live stages on a model folder and on a checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.checkpoint.tokenizer import ensure_tokenizer
from engine.cli.main import main
from engine.protocol import Message
from engine.text import TextCodec
from tests.tiny import tiny_folder

COMMAND = str(Path(sys.executable).with_name("jupiter"))
TOKENS = 12


def answer(folder: Path, *messages: Message) -> str:
    """The answer of the plain model, greedy."""
    codec = TextCodec(folder, ensure_tokenizer(folder), [])
    prompt = codec.encode(codec.render(messages), add_special_tokens=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=TOKENS)
    return codec.tokenizer.decode(ids[0, len(prompt) :].tolist())


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a config whose own model is another."""
    monkeypatch.setenv("JUPITER_STATE_DIR", str(tmp_path / "state"))
    config = {
        "base_model_name_or_path": str(tiny_folder("mistral", 3)),
        "stage_num_hidden_layers_list": [3],
        "num_threads": 1,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def infer(run: Path, *words: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    limit = ["--max_new_tokens", TOKENS]
    return subprocess.run(
        [COMMAND, "infer", *map(str, [*words, *limit])],
        cwd=run,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_conversation_with_a_checkpoint_over_two_stages(run: Path) -> None:
    folder = tiny_folder("llama", 4)
    words = ["--model", str(folder), "--to_mcore", "true", "--output_dir", str(run / "mcore")]
    assert main(["export", *words]) == 0
    checkpoint = run / "mcore" / "iter_0000001"
    asked = "one\ntwo\nclear\ntwo\nexit\nnot asked"
    (run / "mcore" / "args.json").write_text('{"system": "be"}')  # as a training run leaves it
    stages = ["--stage_num_hidden_layers_list", 2, 2]
    done = infer(run, "--mcore_model", checkpoint, *stages, stdin=asked)
    assert done.returncode == 0, done.stderr
    system, one, two = Message("system", "be"), Message("user", "one"), Message("user", "two")
    first = answer(folder, system, one)
    second = answer(folder, system, one, Message("assistant", first), two)
    expected = "".join(f"{text}\n" for text in (first, second, answer(folder, system, two)))
    assert done.stdout == expected
    assert done.stderr.count("tokens per step") == 3


def test_the_questions_of_a_file(run: Path) -> None:
    folder = tiny_folder("llama", 4)
    rows = [
        {"id": "a", "query": "one", "response": "label"},
        {"id": "b", "messages": [
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "given"},
            {"role": "user", "content": "two"},
        ]},
        {"id": "long", "query": "x" * 600},
    ]  # fmt: skip
    (run / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model", folder, "--val_dataset", "in.jsonl", "--result_path", "out/a.jsonl"]
    done = infer(run, *words)
    assert done.returncode == 1 and "long: not answered" in done.stderr  # more than the context
    output = run / "out" / "a.jsonl"
    assert done.stdout == f"{output}\n"
    found = {row["id"]: row for row in map(json.loads, output.read_text().splitlines())}
    one, two = Message("user", "one"), Message("user", "two")
    assert found["a"]["response"] == answer(folder, one) and found["a"]["labels"] == "label"
    given = Message("assistant", "given")
    assert found["b"]["response"] == answer(folder, one, given, two)
    assert found["b"]["labels"] is None
    assert [m["role"] for m in found["b"]["messages"]] == ["user", "assistant", "user", "assistant"]
    before = output.read_text()
    again = infer(run, *words, "--limit", 2)  # all are there: no engine is started
    assert again.returncode == 0 and output.read_text() == before


def test_what_does_not_fit_is_told(run: Path) -> None:
    for words, problem in (
        (["--result_path", "x.jsonl"], "--result_path: goes with --val_dataset"),
        (["--mcore_model", "nowhere"], "nowhere: no checkpoint"),
        (["--val_dataset", "no.jsonl"], "no.jsonl: No such file"),
    ):
        done = infer(run, *words)
        assert done.returncode == 2 and problem in done.stderr
        assert "Traceback" not in done.stderr
