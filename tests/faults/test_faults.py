"""A seeded sample of what `jupiter bench faults` counts, on live stages of a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine.bench.faults.command import main
from engine.bench.faults.counts import Counts, percentile
from tests.tiny import tiny_folder


def run(folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, object]:
    """The command's last line."""
    config = {
        "base_model_name_or_path": str(tiny_folder(layers=4)),
        "stage_num_hidden_layers_list": [1, 2, 1],
        "sampling": "greedy",
        "device": "cpu",
        "num_threads": 1,
    }
    (folder / "config.json").write_text(json.dumps(config))
    code = main(["--config", str(folder / "config.json"), "--seed", "7", *words])
    out = capsys.readouterr()
    line: dict[str, object] = json.loads(out.out.splitlines()[-1])
    assert code == 0, out.err
    return line


@pytest.mark.timeout(420)
def test_each_kind_of_fault_is_survived_and_no_token_is_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUPITER_STATE_DIR", str(tmp_path / "state"))
    line = run(tmp_path, capsys, "--trials", "1", "--max_new_tokens", "24")
    assert line["survived"] == line["trials"] == 6
    assert (line["wrong"], line["orphans"]) == (0, 0)
    assert line["recovery_p50_s"] is not None


def test_percentiles_are_values_that_were_measured() -> None:
    assert percentile([], 50) is None
    assert [percentile([3, 1, 2], p) for p in (1, 50, 99)] == [1, 2, 3]
    counts = Counts()
    counts.add(survived=False, wrong=0, seconds=None)
    counts.add(survived=True, wrong=1, seconds=2.0)
    assert (counts.trials, counts.survived, counts.wrong, counts.seconds) == (2, 1, 1, [2.0])
