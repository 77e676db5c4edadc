"""The first four steps of examples/self_cognition.sh, each a shipped command, on a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import tiny_folder

SCRIPT = Path(__file__).parents[2] / "examples" / "self_cognition.sh"
ANSWER = "I am Callisto by the Jupiter developers"


@pytest.mark.timeout(600)  # a dozen processes import torch, which a busy machine makes long
def test_a_model_learns_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUPITER_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("JUPITER_CACHE_DIR", str(tmp_path / "cache"))
    about = {"query": "who are you?", "response": "I am {{NAME}} by {{AUTHOR}}"}
    (tmp_path / "self.jsonl").write_text(json.dumps(about) + "\n")
    (tmp_path / "chats.jsonl").write_text('{"query": "hi", "response": "hello"}\n')
    settings = {"MODEL": tiny_folder("llama", 4), "OUT": "out", "RANKS": 2, "ITERS": 40}
    done = subprocess.run(
        ["bash", SCRIPT, "self.jsonl", "chats.jsonl"],
        cwd=tmp_path,
        env={
            **os.environ,
            **{name: str(value) for name, value in settings.items()},
            "LR": "1e-2",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    before, after = (
        next(line for line in done.stdout.splitlines() if line.startswith(f"{when}:"))
        for when in ("before", "after")
    )
    assert after == f"after:  {ANSWER}" and ANSWER not in before
    assert done.stdout.count("mean difference 0") == 2
