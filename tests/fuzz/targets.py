"""What reads bytes that somebody else may have written, and valid examples of each kind.

A target either takes its input or refuses it with a JupiterError, whose lines a user can read.
Anything else that it raises is a finding.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from engine.checkpoint.gguf_file import GGUFCheckpoint
from engine.checkpoint.head_layouts import inspect_heads
from engine.checkpoint.heads import read_heads
from engine.checkpoint.reader import open_checkpoint
from engine.config import load_config
from engine.errors import JupiterError
from engine.model.config import ModelConfig
from engine.protocol import (
    PROTOCOL_VERSION,
    Cancel,
    CommandEnvelope,
    EngineReady,
    EventEnvelope,
    Finished,
    Generate,
    Message,
    Metrics,
    StageState,
    StageTelemetry,
    Tokens,
    TreeChosen,
    TreeOption,
    decode_command,
    decode_event,
    encode,
)
from engine.training.rows import read_rows
from tests.gguf_files import write_gguf
from tests.tiny import KINDS, reference
from tui.batch_input import parse_requests
from tui.batch_lines import answer_line, read_old_lines
from tui.conversation import Conversation, Ending
from tui.snapshot import Snapshot, fold
from tui.store import ConversationStore
from tui.store import encode as encode_conversation
from tui.telemetry import TelemetryStore

ROOT = Path(__file__).parents[2]
MAX_LINE = 2000
"""Characters that a line of a message may have: more hides what it says."""


@dataclass(frozen=True)
class Target:
    """One reader: `seeds` makes valid inputs in a folder, `read` takes an input there."""

    seeds: Callable[[Path], Sequence[bytes]]
    read: Callable[[bytes, Path], object]
    text: bool = False
    """Inputs are JSON text, whose values may be exchanged as well as its bytes."""


def check(target: Target, data: bytes, folder: Path) -> bool:
    """Whether `data` was taken; False where it was refused as it should be.

    Raises whatever the target raises beside JupiterError, and AssertionError for a refusal that is
    no readable line.
    """
    try:
        target.read(data, folder)
    except JupiterError as error:
        text = str(error)
        assert text.strip(), "a refusal without a word"
        assert "Traceback" not in text
        assert max(map(len, text.splitlines())) < MAX_LINE, "a refusal too long to read"
        return False
    return True


def _config_seeds(_: Path) -> list[bytes]:
    return [(ROOT / "config.json").read_bytes(), b'{"base_model_name_or_path": "x"}']


def _read_config(data: bytes, folder: Path) -> object:
    return load_config(str(_put(folder / "config.json", data)), stages="1,1")


def _batch_seeds(_: Path) -> list[bytes]:
    chat = {
        "custom_id": "a",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "messages": [
                {"role": "system", "content": "short"},
                {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            ],
            "temperature": 0.5,
            "top_p": 0.9,
            "seed": 3,
            "max_tokens": 12,
            "stop": ["x", "y"],
        },
    }
    short = {"prompt": "Once", "id": "b", "max_completion_tokens": 4}
    return [_lines(chat, short), _lines(short)]


def _resume_seeds(_: Path) -> list[bytes]:
    data = _batch_seeds(_)[0]
    requests = parse_requests("in.jsonl", data)
    lines = b"".join(
        answer_line(request, "Yes.", _finished(), ready=_ready(), request_id="r1")
        for request in requests
    )
    return [lines]


def _ready() -> EngineReady:
    return EngineReady(
        model="m",
        stages=(1, 1),
        device="cpu",
        dtype="float32",
        medusa_num_heads=1,
        tree_size=2,
        context_length=64,
        has_chat_template=True,
    )


def _finished() -> Finished:
    return Finished(
        request_id="r1",
        finish_reason="stop",
        context_full=False,
        prompt_tokens=3,
        cached_tokens=0,
        completion_tokens=2,
        metrics=Metrics(),
    )


def _conversation_seeds(_: Path) -> list[bytes]:
    talk = Conversation()
    for n in range(2):
        node = talk.ask(f"question {n}")
        node.text = f"answer {n}"
        talk.end(node, Ending.STOP)
    return [encode_conversation(talk)]


def _read_conversation(data: bytes, folder: Path) -> object:
    store = ConversationStore(folder)
    _put(folder / "x.json", data)
    listing = store.list("answer")
    conversation = store.load("x")
    for node in conversation.path():
        conversation.siblings(node)
        conversation.before(node)
        if node.is_answer:
            conversation.messages_for(node)
            conversation.transcript_for(node, "m")
    store.save(conversation)
    return listing


def _event_seeds(_: Path) -> list[bytes]:
    telemetry = StageTelemetry(
        layers=1, memory_bytes=2, memory_kind="process", busy_s=0.5, wait_s=0.25, steps=3, rows=4
    )
    option = TreeOption(2, 1.5, 8.0)
    tree = TreeChosen(nodes=2, depth=1, sequences=1, chosen=option, options=(option,))
    bodies: list[Any] = [
        StageState(phase="loading", first_layer=0, num_layers=1, done=1, total=2, pid=0),
        Tokens(request_id="r1", token_ids=(1, 2), text="hi"),
        _finished(),
        _ready(),
        telemetry,
        tree,
    ]
    return [encode(EventEnvelope(PROTOCOL_VERSION, 7, 0, body)) for body in bodies]


def _read_event(data: bytes, _: Path) -> object:
    envelope = decode_event(data)
    if envelope is None:
        return None
    snapshot = Snapshot("m", (1, 1), "float32")
    store = TelemetryStore()
    if isinstance(envelope.body, TreeChosen | StageState | EngineReady):
        snapshot = fold(snapshot, envelope, 1.0)
    store.on_update(envelope)
    return snapshot, store.view()


def _command_seeds(_: Path) -> list[bytes]:
    bodies = [
        Generate(request_id="r1", messages=(Message("user", "hi"),)),
        Generate(request_id="r2", prompt="Once", answered=(1, 2)),
        Cancel("r1"),
    ]
    return [encode(CommandEnvelope(PROTOCOL_VERSION, 7, body)) for body in bodies]


def _tensors() -> dict[str, torch.Tensor]:
    return {
        "medusa_head.0.0.linear.weight": torch.zeros(4, 4),
        "medusa_head.0.0.linear.bias": torch.zeros(4, dtype=torch.float16),
        "medusa_head.0.1.weight": torch.zeros(6, 4, dtype=torch.bfloat16),
    }


def _safetensors_seeds(folder: Path) -> list[bytes]:
    path = folder / "seed.safetensors"
    save_file(_tensors(), path, metadata={"format": "pt"})
    return [path.read_bytes()]


def _read_weights(name: str) -> Callable[[bytes, Path], object]:
    def read(data: bytes, folder: Path) -> object:
        with open_checkpoint(_put(folder / name, data)) as reader:
            return [reader.tensor(key) for key in reader.keys()]  # noqa: SIM118 (not a dict)

    return read


def _torch_seeds(folder: Path) -> list[bytes]:
    torch.save(_tensors(), folder / "seed.pt")
    return [(folder / "seed.pt").read_bytes()]


def _read_heads(name: str) -> Callable[[bytes, Path], object]:
    def read(data: bytes, folder: Path) -> object:
        path = _put(folder / name, data)
        return inspect_heads(path), read_heads(path)

    return read


def _gguf_seeds(folder: Path) -> list[bytes]:
    model = reference("llama", layers=1, vocab=265)
    return [write_gguf(model, folder / "seed.gguf").read_bytes()]


def _read_gguf(data: bytes, folder: Path) -> object:
    out = folder / "out"
    out.mkdir(exist_ok=True)
    checkpoint = GGUFCheckpoint(_put(folder / "model.gguf", data))
    checkpoint.write(out, lambda done, total: None)
    return ModelConfig.from_folder(out)


def _model_config_seeds(folder: Path) -> list[bytes]:
    seeds = []
    for kind in ("llama3_rope", "linear_rope", "mistral", "qwen2"):
        config = reference(kind, layers=1).config
        config.architectures = [f"{KINDS[kind][0]}ForCausalLM"]
        config.save_pretrained(folder)
        seeds.append((folder / "config.json").read_bytes())
    return seeds


def _read_model_config(data: bytes, folder: Path) -> object:
    _put(folder / "config.json", data)
    return ModelConfig.from_folder(folder)


def _row_seeds(_: Path) -> list[bytes]:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    rows = [{"messages": turns}, {"query": "a", "response": "b"}, {"text": "plain"}]
    return [_lines(*rows), _lines({"instruction": "a", "input": "b", "output": "c"})]


def _put(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _lines(*records: object) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


TARGETS = {
    "config": Target(_config_seeds, _read_config, text=True),
    "batch": Target(_batch_seeds, lambda data, _: parse_requests("in.jsonl", data), text=True),
    "resume": Target(_resume_seeds, lambda data, _: read_old_lines("out.jsonl", data), text=True),
    "conversation": Target(_conversation_seeds, _read_conversation, text=True),
    "event": Target(_event_seeds, _read_event),
    "command": Target(_command_seeds, lambda data, _: decode_command(data)),
    "safetensors": Target(_safetensors_seeds, _read_weights("model.safetensors")),
    "torch": Target(_torch_seeds, _read_weights("pytorch_model.bin")),
    "heads": Target(_safetensors_seeds, _read_heads("medusa_lm_head.safetensors")),
    "gguf": Target(_gguf_seeds, _read_gguf),
    "model_config": Target(_model_config_seeds, _read_model_config, text=True),
    "rows": Target(
        _row_seeds, lambda data, folder: read_rows(_put(folder / "rows.jsonl", data)), text=True
    ),
}
