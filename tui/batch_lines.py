"""The lines of a batch's output, both ways: written for an answer, read again by `--resume`."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from engine.errors import JupiterError
from engine.protocol import EngineReady, Finished
from tui.batch_input import CHAT, BatchRequest

ID_PREFIX = "batch_req_j"
# Readers that split at any Unicode line end would tear a line at these.
LINE_ENDS = {"\u0085": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"}


class BatchOutputError(JupiterError):
    """The output cannot be used as asked; nothing ran and nothing was changed."""


class OldLine(msgspec.Struct, frozen=True, kw_only=True):
    """A line that an earlier run wrote."""

    raw: bytes
    """The line with its line feed."""
    number: int
    custom_id: str
    answered: bool
    fingerprint: str | None
    """Of the request it answers; None when another program wrote the line."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What a resumed run keeps of the old output and what it still has to ask."""

    keep: list[OldLine]
    todo: list[BatchRequest]
    strangers: list[OldLine]
    """Kept lines whose custom_id is not in the input."""


def answer_line(
    request: BatchRequest, text: str, finished: Finished, *, ready: EngineReady, request_id: str
) -> bytes:
    """The output line of an answered request, as in an OpenAI batch output file."""
    chat = request.url == CHAT
    answer = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    metrics = finished.metrics
    heads = zip(metrics.accepted_per_head, metrics.proposed_per_head, strict=False)
    body = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{request.fingerprint}",
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": ready.model,
        "choices": [
            {"index": 0, **answer, "logprobs": None, "finish_reason": finished.finish_reason}
        ],
        "usage": {
            "prompt_tokens": finished.prompt_tokens,
            "completion_tokens": finished.completion_tokens,
            "total_tokens": finished.prompt_tokens + finished.completion_tokens,
        },
        "jupiter": {
            "ttft_s": metrics.ttft_s,
            "tokens_per_s": metrics.tokens_per_s,
            "mean_accepted_len": metrics.mean_accepted_len,
            "acceptance_per_head": [hits / tries if tries else None for hits, tries in heads],
            "stages": list(ready.stages),
        },
    }
    response = {"status_code": 200, "request_id": request_id, "body": body}
    return _line(request, response=response, error=None)


def failure_line(request: BatchRequest, code: str, message: str) -> bytes:
    """The output line of a request that could not be answered."""
    return _line(request, response=None, error={"code": code, "message": message})


def _line(request: BatchRequest, **fields: Any) -> bytes:
    head = {"id": ID_PREFIX + request.fingerprint, "custom_id": request.custom_id}
    text = msgspec.json.encode({**head, **fields}).decode()
    for end, escape in LINE_ENDS.items():
        text = text.replace(end, escape)
    return text.encode() + b"\n"


def read_old_lines(name: str, data: bytes) -> list[OldLine]:
    """The lines of an output file; a torn last line is left out.

    Raises BatchOutputError, with the line, where the file is not a batch's output.
    """
    lines = data.split(b"\n")
    torn = lines.pop()
    old = [_old_line(name, at, raw) for at, raw in enumerate(lines, start=1) if raw.strip()]
    if torn.strip():
        try:
            old.append(_old_line(name, len(lines) + 1, torn))
        except BatchOutputError:
            # Half of an answer begins like a whole one; after a power cut it may be zeros.
            if not torn.startswith(b"{") and torn.strip(b"\0"):
                raise
    return old


def _old_line(name: str, number: int, raw: bytes) -> OldLine:
    try:
        record = json.loads(raw)
        custom_id, error, response = record["custom_id"], record["error"], record["response"]
        identity = str(record.get("id"))
        answered = error is None and response["status_code"] == 200
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        custom_id = None
    if not isinstance(custom_id, str):
        raise BatchOutputError(
            f"{name}: line {number}: not an output line of --batch; name another file"
        )
    ours = identity.startswith(ID_PREFIX)
    return OldLine(
        raw=raw + b"\n",
        number=number,
        custom_id=custom_id,
        answered=answered,
        fingerprint=identity.removeprefix(ID_PREFIX) if ours else None,
    )


def plan_resume(name: str, old: Sequence[OldLine], requests: Sequence[BatchRequest]) -> Plan:
    """What is kept and what is left to do; each custom_id once, failures to be tried again.

    Raises:
        BatchOutputError: an answer belongs to another request than the input now has under its
            custom_id (as when lines without one moved): resuming would mix them up.
    """
    by_id = {request.custom_id: request for request in requests}
    kept: dict[str, OldLine] = {}
    changed: list[tuple[OldLine, BatchRequest]] = []
    for line in old:
        request = by_id.get(line.custom_id)
        if request is not None and not line.answered:
            continue
        before = kept.get(line.custom_id)
        if before is None or (line.answered and not before.answered):
            kept[line.custom_id] = line
        if request is not None and line.fingerprint not in (None, request.fingerprint):
            changed.append((line, request))
    if changed:
        line, request = changed[0]
        more = f" ({len(changed)} such lines)" if len(changed) > 1 else ""
        raise BatchOutputError(
            f"{name}: line {line.number}: {json.dumps(line.custom_id)} was asked something else "
            f"than input line {request.line} says now{more}; name a new output file"
        )
    return Plan(
        keep=list(kept.values()),
        todo=[request for request in requests if request.custom_id not in kept],
        strangers=[line for line in kept.values() if line.custom_id not in by_id],
    )
