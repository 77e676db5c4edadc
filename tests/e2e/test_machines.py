"""`jupiter-tui --nnodes` and `jupiter join`, on two machines that are network namespaces."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from engine.bench.network.rig import missing, unshare
from tests.tiny import reference, save

REQUESTS = 32


def test_a_machine_that_is_cut_off_is_waited_for_and_no_token_is_another(tmp_path: Path) -> None:
    if reason := missing():
        pytest.skip(reason)
    save(reference(layers=4), tmp_path / "model")
    config = {
        "base_model_name_or_path": str(tmp_path / "model"),
        "stage_num_hidden_layers_list": [2, 2],
        "sampling": "greedy",
        "device": "cpu",
        "num_threads": 1,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 300}
    request = {"method": "POST", "url": "/v1/chat/completions", "body": body}
    lines = [json.dumps({"custom_id": str(n), **request}) + "\n" for n in range(REQUESTS)]
    (tmp_path / "in.jsonl").write_text("".join(lines))
    words = [*unshare(), sys.executable, "-m", "tests.e2e.two_machines", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=170)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
