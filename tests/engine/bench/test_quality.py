"""`jupiter bench quality` on a tiny model, beside transformers' own figures."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.bench.quality import CHUNK, Reading, cut, main, read
from engine.config import parse_config
from engine.errors import ConfigError
from engine.pipeline.build import build_stage, make_plan
from tests.tiny import reference, tiny_folder

TEXT = "It was not the sort of house that one would look at twice. " * 8


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "held.txt"
    path.write_text(TEXT)
    return str(path)


def config(folder: Path, **values: Any) -> str:
    values = {
        "base_model_name_or_path": str(tiny_folder()),
        "stage_num_hidden_layers_list": [3, 3],
        "device": "cpu",
        **values,
    }
    path = folder / "config.json"
    path.write_text(json.dumps(values))
    return str(path)


def test_likelihoods_are_those_of_transformers() -> None:
    folder = tiny_folder()
    values = {"base_model_name_or_path": str(folder), "stage_num_hidden_layers_list": [6]}
    plan = make_plan(parse_config({"device": "cpu", **values}, "a test"), folder)
    stage = build_stage(plan, 0, torch.device("cpu"), lambda *_: None)
    torch.manual_seed(7)
    # Longer than a chunk by one, by none, and a short one: the edges of cutting.
    windows = [torch.randint(0, 250, (n,)).tolist() for n in (CHUNK + 1, CHUNK, 2, CHUNK + 9)]
    found = read(stage, windows)
    nll, likeliest = 0.0, []
    for window in windows:
        with torch.no_grad():
            logits = reference().forward(torch.tensor([window])).logits[0, :-1]
        answers = torch.tensor(window[1:])
        nll += torch.nn.functional.cross_entropy(logits, answers, reduction="sum").item()
        likeliest += logits.argmax(dim=-1).tolist()
    assert found.nll == pytest.approx(nll, rel=1e-5)
    assert found.likeliest == likeliest
    assert found.perplexity == pytest.approx(math.exp(nll / len(likeliest)), rel=1e-4)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_last_line_is_json_with_both_perplexities(
    tmp_path: Path, text: str, capfd: pytest.CaptureFixture[str], bits: int
) -> None:
    name = config(tmp_path, **{f"load_in_{bits}bit": True})
    words = ["--text", text, "--config", name, "--window", "100", "--tokens", "250"]
    assert main([*words, "--threads", "1"]) == 0
    *table, last = capfd.readouterr().out.splitlines()
    line = json.loads(last)
    assert line["bench"] == "quality" and line["bits"] == bits
    assert line["tokens"] == 250 - 3
    change = line["perplexity"] / line["perplexity_float32"] - 1
    assert line["perplexity_change"] == pytest.approx(change, abs=1e-4)
    assert abs(change) < (0.02 if bits == 8 else 0.2)
    # Random weights have near ties everywhere, and by chance they agree on 1 in 260.
    assert (0.9 if bits == 8 else 0.4) < line["greedy_agreement"] <= 1
    assert any(row.startswith(f"| int{bits} |") for row in table)


def test_agreement_is_the_share_of_equal_tokens() -> None:
    assert Reading(1.0, [1, 2, 3, 4]).agreement(Reading(1.0, [1, 0, 3, 4])) == 0.75


def test_no_window_is_too_short_to_predict_anything() -> None:
    assert cut(range(7), 3) == [[0, 1, 2], [3, 4, 5]]
    assert cut([1], 3) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "No such file"), (b"\xff\xfe\xff", "not UTF-8"), (b"a", "at least 2 tokens")],
)
def test_a_text_that_cannot_be_read_is_one_line(
    tmp_path: Path, content: bytes | None, words: str
) -> None:
    path = tmp_path / "held.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=words) as caught:
        main(["--text", str(path), "--config", config(tmp_path)])
    assert str(path) in str(caught.value)
