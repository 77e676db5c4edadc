"""The command line of `jupiter-tui`."""

from __future__ import annotations

import argparse
from importlib.metadata import version

import pytest

from engine.config import JupiterConfig
from tui import batch, cli


def parse(*words: str) -> argparse.Namespace:
    parser = cli.build_parser()
    args = parser.parse_args(words)
    cli.check_usage(parser, args)
    return args


def test_a_batch_is_handed_its_flags_and_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    handed: list[tuple[argparse.Namespace, JupiterConfig]] = []

    def take(args: argparse.Namespace, config: JupiterConfig, hub: object) -> int:
        assert hub is None
        handed.append((args, config))
        return 1

    monkeypatch.setattr(batch, "main", take)
    words = ["--batch", "in.jsonl", "-o", "out.jsonl", "--resume", "--max-failures", "3"]
    assert cli.main([*words, "--stages", "10,10,10", "--no-heads", "--max-num-seqs", "4"]) == 1
    ((args, config),) = handed
    assert (args.batch, args.output, args.resume, args.max_failures) == (
        "in.jsonl",
        "out.jsonl",
        True,
        3,
    )
    assert args.progress == "auto"
    assert config.stage_num_hidden_layers_list == [10, 10, 10]
    assert config.max_num_seqs == 4


def test_a_batch_writes_to_standard_output_unless_told_otherwise() -> None:
    assert parse("--batch", "-").output == "-"


def test_the_originals_name_of_the_config_flag_means_the_same() -> None:
    assert parse("--config_file", "a.json").config == parse("--config", "a.json").config == "a.json"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--resume"], "--resume needs --batch"),
        (["--nnodes", "2"], "--nnodes needs --listen HOST:PORT"),
        (["--listen", "127.0.0.1:1"], "--listen needs --nnodes N"),
        (["-o", "x"], "--output needs --batch"),
        (["--progress", "none"], "--progress needs --batch"),
        (["--max-num-seqs", "2"], "--max-num-seqs needs --batch"),
        (["--batch", "-", "--max-failures", "0"], "a whole number from 1, not '0'"),
        (["--batch", "-", "--progress", "loud"], "'auto', 'json', 'none'"),
        (["--stage", "15,15"], "--stage"),
    ],
)
def test_bad_usage_ends_with_one_line(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_a_config_that_cannot_be_used_ends_with_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["--stages", "15;15"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("jupiter-tui: --stages 15;15") and error.count("\n") == 1


def test_without_a_terminal_the_way_to_a_batch_is_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main([]) == 2
    error = capsys.readouterr().err
    assert "not a terminal" in error and "--batch" in error and error.count("\n") == 1


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"jupiter-tui {version('jupiter-workbench')}\n"
