"""`jupiter export`: Hugging Face folders to Megatron-Core checkpoints and back."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from engine.checkpoint.mcore_files import ITERATION, iteration_folder, model_folder
from engine.checkpoint.sources import fetch
from engine.cli.fetch import report, reporting
from engine.errors import ConfigError, ExitCode
from engine.training.args_export import ExportArguments
from engine.training.args_parse import parse
from engine.training.args_resolve import model_suffix
from engine.training.args_table import help_text

PROG = "jupiter export"
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def main(words: Sequence[str]) -> int:
    """Run the command; the last line of stdout is the new folder."""
    if not words or "--help" in words or "-h" in words:
        usage = f"{PROG} --to_mcore true --model DIR | --to_hf true --mcore_model RUN [...]"
        summary = "Convert between Hugging Face folders and Megatron-Core checkpoints."
        print(help_text(usage, summary, [("arguments", ExportArguments)]))
        return ExitCode.OK if words else ExitCode.BAD_INPUT
    args, given = parse(words, ExportArguments)
    check(args, given)
    with reporting():
        return _to_mcore(args) if args.to_mcore else _to_hf(args)


def check(args: ExportArguments, given: frozenset[str]) -> None:
    """Check the arguments against each other; raises ConfigError."""
    if args.to_mcore == args.to_hf:
        raise ConfigError("--to_mcore, --to_hf: give one of them as true")
    if args.to_mcore and args.model is None:
        raise ConfigError("--model: name the model to convert")
    if args.to_hf and args.mcore_model is None:
        raise ConfigError("--mcore_model: name the checkpoint to convert")
    wrong = (
        ["mcore_model"]
        if args.to_mcore
        else [
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "medusa_head_path",
        ]
    )
    for name in wrong:
        if name in given:
            raise ConfigError(f"--{name}: goes with --to_{'hf' if args.to_mcore else 'mcore'} true")
    shard_bytes(args.max_shard_size)


def shard_bytes(text: str) -> int:
    """Bytes of a size such as 500MB or 4GiB; raises ConfigError."""
    found = re.fullmatch(r"(\d+)\s*(|[KMG]I?)B?", text.upper(), re.ASCII)
    if found is None or int(found[1]) == 0:
        raise ConfigError(f"--max_shard_size {text}: write a size such as 500MB, 5GB or 4GiB")
    return int(found[1]) * UNITS[found[2]]


def _to_mcore(args: ExportArguments) -> int:
    assert args.model is not None
    folder = fetch(args.model, report)
    heads = None if args.medusa_head_path is None else fetch(args.medusa_head_path, report)
    output = Path(args.output_dir or f"{model_suffix(args.model)}-mcore").expanduser()
    import torch  # takes a second; what is wrong is told before

    from engine.checkpoint.mcore_convert import to_mcore
    from engine.model.config import ModelConfig
    from engine.training.parallelize import stage_layers

    dtype = None if args.torch_dtype is None else getattr(torch, args.torch_dtype)
    layers = ModelConfig.from_folder(folder).num_hidden_layers
    to_mcore(
        folder,
        output,
        heads=heads,
        dtype=dtype,
        tp=args.tensor_model_parallel_size,
        stages=stage_layers(layers, args.pipeline_model_parallel_size, None),
        shard_bytes=shard_bytes(args.max_shard_size),
        progress=_report_tensors,
    )
    return _finish(args, folder, output, output)


def _to_hf(args: ExportArguments) -> int:
    assert args.mcore_model is not None
    source = Path(args.mcore_model).expanduser()
    iteration_folder(source)
    model = model_folder(source) if args.model is None else fetch(args.model, report)
    run = source.parent if ITERATION.fullmatch(source.name) else source
    output = Path(args.output_dir or f"{run.name}-hf").expanduser()
    import torch

    from engine.checkpoint.mcore_convert import to_hf

    to_hf(
        source,
        model,
        output,
        dtype=None if args.torch_dtype is None else getattr(torch, args.torch_dtype),
        shard_bytes=shard_bytes(args.max_shard_size),
        progress=_report_tensors,
    )
    return _finish(args, output, source, output)


def _finish(args: ExportArguments, folder: Path, checkpoint: Path, output: Path) -> int:
    code = ExitCode.OK
    if args.test_convert_precision and not _same(folder, checkpoint, args):
        code = ExitCode.SOME_FAILED
    print(output.absolute(), flush=True)
    return code


def _same(folder: Path, checkpoint: Path, args: ExportArguments) -> bool:
    import torch

    from engine.checkpoint.precision import LIMIT, compare

    report("comparing both models in float32")
    dtype = None if args.torch_dtype is None else getattr(torch, args.torch_dtype)
    found = compare(folder, checkpoint, dtype)
    if sys.stderr.isatty():
        report("")
    print(f"mean difference {found.mean:.3g}, maximum difference {found.max:.3g}")
    for name, tokens in zip(("Hugging Face", "Megatron-Core"), found.tokens, strict=True):
        print(f"likeliest tokens, {name}: {' '.join(map(str, tokens))}")
    if not found.passed:
        wrong = f"mean difference from {LIMIT}" if found.mean >= LIMIT else "a token differs"
        print(f"{PROG}: the two are not the same model: {wrong}", file=sys.stderr)
    return found.passed


def _report_tensors(done: int, total: int) -> None:
    if done * 5 // total != (done - 1) * 5 // total:
        report(f"writing tensor {done} of {total}")
