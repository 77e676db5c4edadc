"""`jupiter plan` on live workers, and a split of "auto" that an engine comes up with."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.client import EngineClient
from engine.config import config_json, parse_config
from engine.planning.profiles import read_profile
from engine.protocol import Failed, SamplingParams, Tokens
from engine.text import TextCodec
from tests.tiny import reference, tiny_folder

PROMPTS = ("once upon a time " * 10, "short", "a prompt of chunks, and then of steps " * 4)
NEW_TOKENS = 12
JUPITER = [sys.executable, "-m", "engine.cli.main"]


def written(path: Path, **keys: Any) -> Path:
    values = {
        "base_model_name_or_path": str(tiny_folder()),
        "stage_num_hidden_layers_list": "auto",
        "device": "cpu",
        "max_kv_cache_length": 256,
        **keys,
    }
    path.write_text(json.dumps(values))
    return path


@pytest.fixture(autouse=True)
def own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUPITER_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("JUPITER_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def jupiter(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*JUPITER, *words], capture_output=True, text=True, timeout=120)


def unlike(path: Path) -> Path:
    """A slow device before a fast one, each on a machine of its own."""
    link = {"latency_ms": 0.1}
    devices = [
        {"name": name, "rows": [1, 256], "layer_ms": [[ms, 20 * ms]]}
        for name, ms in (("slow", 4.0), ("fast", 1.0))
    ]
    path.write_text(json.dumps({"devices": devices, "links": [link, link]}))
    return path


async def tokens_of(client: EngineClient, text: str) -> list[int]:
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
    found: list[int] = []
    async for event in client.submit(prompt=text, params=params):
        assert not isinstance(event, Failed), event.message
        if isinstance(event, Tokens):
            found += event.token_ids
    return found


def plain_tokens(text: str) -> list[int]:
    """What transformers answers greedily."""
    codec = TextCodec(tiny_folder(), tiny_folder() / "tokenizer.json", [259])
    ids = torch.tensor([codec.encode(text, add_special_tokens=True)])
    seen = torch.ones_like(ids)
    out = reference().generate(ids, attention_mask=seen, max_new_tokens=NEW_TOKENS, do_sample=False)
    found: list[int] = out[0, ids.shape[1] :].tolist()
    return found


def test_live_stages_are_measured_once_and_planned(tmp_path: Path) -> None:
    config, kept = written(tmp_path / "config.json"), tmp_path / "profile.json"
    done = jupiter("plan", "--config", str(config), "--prompt", "100", "--output", str(kept))
    assert done.returncode == 0, done.stderr
    assert "measuring 2 stages" in done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert sum(told["split"]) == 6 and len(told["split"]) == 2
    assert sum(told["chunks"]) == 100
    assert told["ttft_ms"] > 0 and told["ms_per_token"] > 0 and 0 <= told["bubble"] < 1
    assert "link behind it" in done.stdout and "stage 1 " in done.stdout

    profile = read_profile(kept)
    assert [device.name for device in profile.devices] == ["cpu", "cpu"]
    assert len(profile.links) == 2 and all(link.latency_ms > 0 for link in profile.links)
    assert profile.devices[1].judge_ms is not None and profile.devices[0].judge_ms is None
    assert len(set(profile.hosts)) == 1 and profile.devices[0].slowdown >= 1

    again = jupiter("plan", "--config", str(config), "--prompt", "100", "--aim", "ttft")
    assert again.returncode == 0 and "measuring" not in again.stderr


@pytest.mark.asyncio
async def test_an_engine_comes_up_with_the_planned_split(tmp_path: Path) -> None:
    profile = unlike(tmp_path / "boards.json")
    path = written(tmp_path / "config.json", plan_profile=str(profile), plan_aim="ttft")
    client = EngineClient(parse_config(json.loads(path.read_text()), "test"))
    try:
        ready = await client.start()
        answers = await asyncio.gather(*(tokens_of(client, text) for text in PROMPTS))
    finally:
        await client.stop()
    # In planned chunks through planned stages, side by side: the plain model's tokens.
    assert answers == [plain_tokens(text) for text in PROMPTS]
    assert sum(ready.stages) == 6 and ready.stages[0] < ready.stages[1]
    assert tuple(client.config.stage_num_hidden_layers_list) == ready.stages
    assert sum(client.config.prefill_plan["256"]) == 256
    again = parse_config(json.loads(config_json(client.config)), "test")
    assert again == client.config  # as the workers had it


def test_stages_by_hand_need_a_profile_that_all_of_them_have(tmp_path: Path) -> None:
    config = written(tmp_path / "config.json")
    done = jupiter("stage", "--world", "2", "--rank", "0", "--config", str(config))
    assert done.returncode == 2
    assert "'plan_profile'" in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_what_does_not_fit_is_one_line(tmp_path: Path) -> None:
    profile, path = unlike(tmp_path / "boards.json"), str(tmp_path / "config.json")
    written(tmp_path / "config.json")
    values = json.loads(profile.read_text())
    for device in values["devices"]:
        device["memory_bytes"] = 10
    profile.write_text(json.dumps(values))
    cases = {
        "fits into memory": ["--profile", str(profile)],
        "has 2 devices, but there are 3 stages": ["--profile", str(profile), "--stages", "3"],
        "no such profile": ["--profile", str(tmp_path / "no such profile.json")],
        "more than the 6 layers": ["--stages", "7"],
    }
    for words, flags in cases.items():
        done = jupiter("plan", "--config", path, *flags)
        assert done.returncode == 2, done.stderr
        assert words in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
