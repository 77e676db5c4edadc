"""megatron-core reads what is written here, and what it writes is read here."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.checkpoint.load import load_weights
from engine.checkpoint.mcore_convert import to_mcore
from engine.checkpoint.mcore_files import write_tracker
from engine.model.config import ModelConfig
from engine.model.llama import Rows, Segment
from engine.model.medusa import MedusaLlamaForCausalLM
from tests.engine import megatron_peer
from tests.tiny import tiny_folder

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None,
    reason="megatron-core is not installed: pip install 'jupiter-workbench[interop-megatron]'",
)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_both_read_the_other(kind: str, tmp_path: Path) -> None:
    folder = tiny_folder(kind)
    config = ModelConfig.from_folder(folder)
    to_mcore(folder, tmp_path / "ours", tp=2)
    ours = tmp_path / "ours" / "iter_0000001"
    theirs = tmp_path / "theirs" / "iter_0000001"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [megatron_peer.__file__, folder, ours, theirs, port]
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])["difference"] < 1e-5
    for name in ("config.json", "tokenizer.json"):
        (theirs.parent / name).write_bytes((folder / name).read_bytes())
    write_tracker(theirs.parent, 1)
    with torch.device("meta"):
        model = MedusaLlamaForCausalLM(config)
    load_weights(model, theirs.parent, None, dtype=torch.float32, device=torch.device("cpu"))
    count = len(megatron_peer.PROMPT)
    rows = Rows(torch.arange(count), [Segment(slice(0, count))])
    with torch.no_grad():
        logits = model.lm_head(model(torch.tensor(megatron_peer.PROMPT), rows))
    wanted = torch.load(tmp_path / "theirs" / "logits.pt")
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)
