"""`jupiter run` and `jupiter stage`, as a user starts them by hand."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import tiny_folder

JUPITER = [sys.executable, "-m", "engine.cli.main"]
PROMPT = "tell me a story"
GREEDY = ["--temperature", "0", "--max_new_tokens", "12"]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """The original's kind of config: model keys, split and init_method in one file."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    path = tmp_path / "config.json"
    path.write_text(
        json.dumps(
            {
                "base_model_name_or_path": str(tiny_folder()),
                "hidden_size": 32,
                "stage_num_hidden_layers_list": [1, 3, 2],
                "init_method": f"tcp://127.0.0.1:{port}",
                "distributed_backend": "gloo",
                "device": "cpu",
                "torch_dtype": "float32",
                "num_sub_sequences": 2,
                "sub_sequence_length": 8,
            }
        )
    )
    return path


def run(*words: str, text: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*JUPITER, *words], input=text, capture_output=True, text=True, timeout=90
    )


def one_process(config: Path) -> str:
    done = run("run", "--config_file", str(config), "--prompt", PROMPT, *GREEDY)
    assert done.returncode == 0, done.stderr
    assert "12 tokens" in done.stderr
    return done.stdout


def start_rank(config: Path, rank: int) -> subprocess.Popen[str]:
    words = ["stage", "--world", "3", "--rank", str(rank), "--config_file", str(config), *GREEDY]
    return subprocess.Popen(
        [*JUPITER, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_three_stages_by_hand_answer_like_one_process(config: Path) -> None:
    ranks = [start_rank(config, rank) for rank in range(3)]
    outputs = [ranks[0].communicate(f"{PROMPT}\n\n{PROMPT}\n", timeout=90)]
    outputs += [rank.communicate(timeout=30) for rank in ranks[1:]]
    assert [rank.returncode for rank in ranks] == [0, 0, 0], outputs
    assert "rank 1: layers 1-3 on cpu" in outputs[1][1]
    assert outputs[0][0] == 2 * one_process(config)


def test_a_stage_that_loses_its_neighbour_says_so_and_ends(config: Path) -> None:
    ranks = [start_rank(config, rank) for rank in range(3)]
    assert ranks[0].stdin is not None
    assert ranks[0].stdout is not None
    ranks[0].stdin.write(f"{PROMPT}\n")
    ranks[0].stdin.flush()
    assert ranks[0].stdout.readline()  # all three work
    ranks[1].kill()
    for rank in (ranks[0], ranks[2]):
        rank.wait(timeout=30)  # rank 0's input stays open: this is no end that it was asked for
        _, stderr = rank.communicate()
        assert rank.returncode == 4
        assert "lost a neighbour" in stderr
        assert "Traceback" not in stderr
    ranks[1].communicate()


def test_bad_input_is_one_line_and_exit_code_2(config: Path) -> None:
    file = str(config)
    port = json.loads(config.read_text())["init_method"].rsplit(":", 1)[1]
    cases = {
        "the two must agree": ["stage", "--world", "2", "--rank", "0"],
        "--rank 3": ["stage", "--world", "3", "--rank", "3"],
        "adds up to 5 layers": [
            "run",
            "--prompt",
            "x",
            "--set",
            "stage_num_hidden_layers_list=[5]",
        ],
        "unknown key 'sampel'": ["run", "--prompt", "x", "--set", "sampel=1"],
        "cannot listen there": ["stage", "--world", "3", "--rank", "0"],
    }
    with socket.create_server(("127.0.0.1", int(port))):
        for expected, words in cases.items():
            done = run(*words, "--config", file)
            assert done.returncode == 2, done
            lines = done.stderr.strip().splitlines()
            assert len(lines) == 1, done.stderr
            assert expected in lines[0]


def test_a_prompt_longer_than_the_context_fails_alone(config: Path) -> None:
    text = "x" * 3000 + "\n" + PROMPT + "\n"
    done = run("run", "--config", str(config), *GREEDY, text=text)
    assert done.returncode == 1
    assert "tokens; with room for an answer at most 511 fit" in done.stderr
    assert done.stdout == one_process(config)
