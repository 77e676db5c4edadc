"""The one schema of `config.json`, for every rank, every world size and every command."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from engine.errors import ConfigError, shown

PositiveInt = Annotated[int, Meta(ge=1)]
Share = Annotated[float, Meta(ge=0.0, le=1.0)]
Sampling = Literal["greedy", "typical", "nucleus"]
TreePath = Annotated[list[Annotated[int, Meta(ge=0)]], Meta(min_length=1)]
MedusaChoices = Literal["auto", "mc_16", "mc_63"] | Annotated[list[TreePath], Meta(min_length=1)]


class JupiterConfig(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """One run of Jupiter; see docs/config.md for each key.

    Lengths count tokens. Paths are as the user wrote them: `load_config` makes relative ones
    absolute when they exist beside the config file but not in the current folder.
    """

    base_model_name_or_path: str
    medusa_head_path: str | None = None
    medusa_num_heads: Annotated[int, Meta(ge=0)] | None = None
    medusa_num_layers: Annotated[int, Meta(ge=0)] | None = None
    medusa_choices: MedusaChoices = "auto"

    stage_num_hidden_layers_list: Annotated[list[PositiveInt], Meta(min_length=1)]
    num_stages: PositiveInt | None = None
    """Where the split is "auto": the number of stages. Until it is planned, each has one layer."""
    plan_aim: Literal["ttft", "latency", "throughput"] = "latency"
    plan_profile: str | None = None
    init_method: Annotated[str, Meta(pattern=r"^(tcp|file|env)://")] = "tcp://127.0.0.1:23000"
    distributed_backend: Literal["gloo", "nccl"] = "gloo"
    distributed_timeout_minutes: Annotated[float, Meta(gt=0)] = 60.0
    link_dtype: Literal["exact", "auto", "bfloat16", "int8"] = "exact"
    device: Annotated[str, Meta(pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$")] = "auto"
    num_threads: PositiveInt | None = None
    torch_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    load_in_8bit: bool = False
    load_in_4bit: bool = False

    sampling: Sampling = "typical"
    temperature: Annotated[float, Meta(ge=0.0)] = 0.7
    posterior_threshold: Share = 0.09
    posterior_alpha: Annotated[float, Meta(ge=0.0)] = 0.3
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 0.8
    max_steps: PositiveInt | None = None
    max_new_tokens: PositiveInt | None = None

    num_sub_sequences: PositiveInt = 5
    max_sub_sequence_len: PositiveInt = 128
    prefill_plan: dict[str, Annotated[list[PositiveInt], Meta(min_length=1)]] = {}
    """Planned chunks by the length of a prompt; they go before the two keys above."""
    max_kv_cache_length: PositiveInt = 2048
    max_num_seqs: PositiveInt = 16
    max_batch_total_tokens: PositiveInt | None = None

    keymap: dict[str, str] = {}
    """Other keys for actions of the workbench: binding id to keys; `tui/keys.py` checks them."""

    model_keys: dict[str, Any] = {}
    """Keys of the model's own config.json that the original kept in the same file.

    They are checked against the checkpoint, never used in its place.
    """

    @property
    def world_size(self) -> int:
        """Number of stages, each a process of its own."""
        return len(self.stage_num_hidden_layers_list)

    @property
    def auto_split(self) -> bool:
        """The split is still to be planned."""
        return self.stage_num_hidden_layers_list == [1] * (self.num_stages or 0)

    @property
    def weight_bits(self) -> Literal[8, 4] | None:
        """Bits of a quantized weight; None where the weights stay as `torch_dtype` says."""
        return 8 if self.load_in_8bit else 4 if self.load_in_4bit else None


SPLIT, AUTO = "stage_num_hidden_layers_list", "auto"
DEFAULT_STAGES, MAX_STAGES = 2, 1024
# The original's one file also repeated the model's config.json; these keys are taken aside.
# fmt: off
MODEL_KEYS = frozenset((
    "_name_or_path", "architectures", "attention_bias", "bos_token_id", "eos_token_id",
    "head_dim", "hidden_act", "hidden_size", "initializer_range", "intermediate_size",
    "max_position_embeddings", "model_type", "num_attention_heads", "num_hidden_layers",
    "num_key_value_heads", "pad_token_id", "rms_norm_eps", "rope_scaling", "rope_theta",
    "tie_word_embeddings", "transformers_version", "use_cache", "vocab_size",
))
# fmt: on
# Other names for the same key: the original read one name and wrote the other.
ALIASES = {"sub_sequence_length": "max_sub_sequence_len", "dtype": "torch_dtype"}


def find_config(given: str | None) -> Path:
    """Path of the config file: the flag's, the current folder's, the one in the package.

    Raises ConfigError when the named file does not exist.
    """
    if given is not None:
        path = Path(given).expanduser()
        if not path.is_file():
            raise ConfigError(f"{given}: no such config file")
        return path
    package = Path(__file__).parent
    # An installed wheel carries its copy in the package; a checkout has it one level up.
    candidates = [Path("config.json"), package / "config.json", package.parent / "config.json"]
    for path in candidates:
        if path.is_file():
            return path
    raise ConfigError("no config.json in the current folder; name one with --config FILE")


def load_config(
    given: str | None = None,
    *,
    stages: str | None = None,
    assignments: Iterable[str] = (),
    no_heads: bool = False,
) -> JupiterConfig:
    """Read the config file and lay the command line over it.

    Args:
        given: the path of `--config`, or None to look it up.
        stages: the text of `--stages`, such as "10,10,10"; sets split and world size. "auto" has
            as many stages as the file says, "auto:3" has three.
        assignments: texts of `--set`, each `key=value`; the value is JSON or else a string.
        no_heads: run without Medusa heads, whatever the file says.

    Raises:
        ConfigError: naming the file, the key, and what would be right.
    """
    path = find_config(given)
    values = _read_json_object(path)
    where = str(path)
    for text in assignments:
        key, sep, value = text.partition("=")
        if not sep or not key:
            raise ConfigError(f"--set {text}: write it as key=value")
        values[key.strip()] = _json_or_text(value.strip())
        where = f"{path} with --set"
    if stages is not None:
        _lay_stages(values, stages)
    if no_heads:
        values["medusa_head_path"] = None
        values["medusa_num_heads"] = 0  # a merged model has heads of its own
    config = parse_config(values, where)
    return msgspec.structs.replace(
        config,
        base_model_name_or_path=_beside(config.base_model_name_or_path, path),
        medusa_head_path=config.medusa_head_path and _beside(config.medusa_head_path, path),
        plan_profile=config.plan_profile and _beside(config.plan_profile, path),
    )


def _lay_stages(values: dict[str, Any], stages: str) -> None:
    """Put what `--stages` says over a config's values."""
    if found := re.fullmatch(r"auto(?::(\d+))?", stages):
        before = values.get(SPLIT)
        if found[1]:
            values["num_stages"] = int(found[1])
        elif isinstance(before, list):
            values["num_stages"] = len(before)
        values[SPLIT] = AUTO
        return
    if not re.fullmatch(r"\d+(,\d+)*", stages):
        raise ConfigError(f"--stages {stages}: write layer counts such as 15,15, or auto")
    values[SPLIT] = [int(n) for n in stages.split(",")]
    values.pop("num_stages", None)


def parse_config(values: Mapping[str, Any], where: str) -> JupiterConfig:
    """Check `values` against the schema; `where` names their origin in errors."""
    if "architectures" in values and "base_model_name_or_path" not in values:
        raise ConfigError(
            f"{where}: this is a model's own config.json, not Jupiter's; "
            "name Jupiter's with --config FILE"
        )
    plain: dict[str, Any] = {}
    model_keys: dict[str, Any] = {}
    for key, value in values.items():
        key = ALIASES.get(key, key)
        if key == "torch_dtype" and isinstance(value, str):
            value = value.removeprefix("torch.")
        if key in MODEL_KEYS:
            model_keys[key] = value
        elif key == "fast":
            pass  # the original's switch for batched candidate scoring; here it is always so
        elif key != "do_sample":
            plain[key] = value
    if values.get("do_sample") is False:
        plain["sampling"] = "greedy"
    _read_auto(plain, where)
    known = JupiterConfig.__struct_fields__
    for key in plain:
        if key not in known or key == "model_keys":
            raise ConfigError(f"{where}: unknown key '{key}'{_suggest(key, known)}")
    try:
        config = msgspec.convert({**plain, "model_keys": model_keys}, JupiterConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {_explain(str(error), plain)}") from None
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair; no text can hold it
        raise ConfigError(f"{where}: a value holds half of a surrogate pair") from None
    for key, sizes in config.prefill_plan.items():
        if not key.isdecimal() or int(key) != sum(sizes):
            raise ConfigError(
                f"{where}: key 'prefill_plan': {json.dumps(key)} must be a length, the sum of "
                f"its chunks {sizes}"
            )
    if config.load_in_8bit and config.load_in_4bit:
        raise ConfigError(f"{where}: keys 'load_in_8bit' and 'load_in_4bit': only one can be true")
    return config


def _read_auto(values: dict[str, Any], where: str) -> None:
    """Take a split of "auto" for stages of one layer each, until it is planned."""
    split, count = values.get(SPLIT), values.get("num_stages")
    if split == AUTO:
        values["num_stages"] = count = DEFAULT_STAGES if count is None else count
        whole = isinstance(count, int) and not isinstance(count, bool)
        if not whole or not 0 < count <= MAX_STAGES:
            raise ConfigError(
                f"{where}: key 'num_stages': expected a whole number from 1 to {MAX_STAGES}, "
                f"got {json.dumps(count)}"
            )
        values[SPLIT] = [1] * count
    elif isinstance(split, list) and count is not None:
        if count != len(split):
            raise ConfigError(
                f"{where}: key 'num_stages': {json.dumps(count)}, but '{SPLIT}' has "
                f'{len(split)} entries; leave one out, or make the list "auto"'
            )
        del values["num_stages"]


def config_json(config: JupiterConfig) -> str:
    """The config as JSON text that `load_config` reads back to an equal config."""
    values = msgspec.to_builtins(config)
    if config.auto_split:
        values[SPLIT] = AUTO
    else:
        del values["num_stages"]
    values.update(values.pop("model_keys"))
    return json.dumps(values, indent=2)


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: line {error.lineno}: not JSON: {error.msg}") from None
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold one JSON object")
    return values


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _beside(name: str, config_path: Path) -> str:
    """An existing relative path: the current folder's first, else the config file's."""
    try:
        path = Path(name).expanduser()
        if path.exists():
            return str(path.absolute())
        beside = config_path.parent / path
        return str(beside.absolute()) if beside.exists() else name
    except (OSError, RuntimeError, ValueError):  # no file has such a name
        return name


def _suggest(key: str, known: Iterable[str]) -> str:
    import difflib  # only needed on this error path

    close = difflib.get_close_matches(key, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else "; see docs/config.md for the keys"


def _explain(message: str, values: Mapping[str, Any]) -> str:
    """Turn msgspec's error into a line that names the key, its value and what is allowed."""
    missing = re.search(r"missing required field `(\w+)`", message)
    if missing:
        return f"key '{missing[1]}' is missing"
    at = re.search(r"`\$\.(\w+)", message)
    if not at:
        return message
    key = at[1]
    # The value itself comes last, where it can be cut.
    problem = re.sub(r"(Invalid enum value) .*", r"\1", message.split(" - at ")[0], flags=re.S)
    allowed = _literals(get_type_hints(JupiterConfig, include_extras=True).get(key))
    hint = f" (one of {', '.join(allowed)})" if allowed else ""
    return f"key '{key}': {problem}{hint}, got {shown(values.get(key))}"


def _literals(hint: Any) -> list[str]:
    if get_origin(hint) is Literal:
        return [str(value) for value in get_args(hint)]
    return [name for part in get_args(hint) for name in _literals(part)]
