"""Lines of a batch file to requests; everything that is wrong is found before anything runs."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, cast

import msgspec

from engine.errors import JupiterError, shown
from engine.protocol import Message, SamplingParams

Url = Literal["/v1/chat/completions", "/v1/completions"]
CHAT: Url = "/v1/chat/completions"
COMPLETIONS: Url = "/v1/completions"

SHOWN_PROBLEMS = 10
MAX_STOP_STRINGS = 4
MAX_TEMPERATURE = 2.0

LINE_KEYS = ("custom_id", "method", "url", "body")
ASKED = ("messages", "prompt")
HONOURED = (
    "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop", "mode",
)  # fmt: skip
# They do not change what a model answers, whatever they say.
HARMLESS = (
    "model", "user", "metadata", "store", "service_tier", "safety_identifier",
    "prompt_cache_key", "prompt_cache_retention", "prediction", "parallel_tool_calls",
)  # fmt: skip
# They would change the answer or its shape, except where they say what is so anyway.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "stream": (False,),
    "stream_options": (),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "top_k": (-1, 0),
    "min_p": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}
# An assistant message copied from an answer carries these, empty.
EMPTY_MESSAGE_KEYS = ("name", "refusal", "tool_calls", "function_call", "audio", "annotations")
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}


class BatchInputError(JupiterError):
    """What is wrong with a batch file: one line of text per problem."""


class BatchRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One request of a batch; either `messages` or `prompt` is given."""

    line: int
    """Line of the input it stands on, from 1."""
    custom_id: str
    url: Url
    messages: tuple[Message, ...] | None = None
    prompt: str | None = None
    params: SamplingParams = SamplingParams()

    @property
    def fingerprint(self) -> str:
        """16 hex digits of what is asked, wherever in the file it stands."""
        asked = (self.custom_id, self.url, self.messages, self.prompt, self.params)
        return hashlib.sha256(msgspec.json.encode(asked)).hexdigest()[:16]


class _LineError(Exception):
    """What is wrong with one line."""


def parse_requests(name: str, data: bytes) -> list[BatchRequest]:
    """The requests of a whole JSONL file, in its order.

    Args:
        name: the file's name, for errors.
        data: UTF-8 text, with or without BOM, LF or CRLF; blank lines count but say nothing.

    Raises:
        BatchInputError: naming the lines that are wrong (the first ten, and their number).
    """
    requests: list[BatchRequest] = []
    problems: list[tuple[int, str]] = []
    # Only a line feed ends a line: JSON text may hold other Unicode line ends.
    for number, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not raw.strip():
            continue
        try:
            requests.append(_parse_line(number, raw))
        except _LineError as problem:
            problems.append((number, str(problem)))
    problems += _clashes(requests)
    if problems:
        raise BatchInputError("\n".join(_first(name, sorted(problems))))
    if not requests:
        raise BatchInputError(f"{name}: holds no request; write one JSON object per line")
    return requests


def _first(name: str, problems: Sequence[tuple[int, str]]) -> Iterable[str]:
    for line, text in problems[:SHOWN_PROBLEMS]:
        yield f"{name}: line {line}: {text}"
    if len(problems) > SHOWN_PROBLEMS:
        yield f"{name}: {len(problems)} problems in all, the first {SHOWN_PROBLEMS} shown"


def _clashes(requests: Iterable[BatchRequest]) -> Iterable[tuple[int, str]]:
    first: dict[str, int] = {}
    for request in requests:
        line = first.setdefault(request.custom_id, request.line)
        if line != request.line:
            taken = f"custom_id {shown(request.custom_id)} is already that of line {line}"
            yield request.line, f"{taken}; each needs its own (one without is called line-N)"


def _parse_line(number: int, raw: bytes) -> BatchRequest:
    record = _json_object(raw)
    custom_id = record.get("custom_id")
    if custom_id is None and "body" not in record and isinstance(record.get("id"), str):
        custom_id = record["id"]
    if custom_id is None:
        custom_id = f"line-{number}"
    elif not _text("custom_id", custom_id):
        raise _LineError("key 'custom_id' is empty; write a string of its own for each line")
    method = record.get("method")
    if method not in (None, "POST"):
        raise _LineError(f"key 'method': must be \"POST\", got {shown(method)}")
    url = _url(record.get("url"))
    body = record.get("body")
    short = "body" not in record
    if short:
        body = {key: value for key, value in record.items() if not _own_column(key)}
        if not any(key in body for key in ASKED):
            raise _LineError(
                "needs 'body' (with 'url'), or the short form with 'prompt' or 'messages'"
            )
    else:
        if not isinstance(body, dict):
            raise _LineError(f"key 'body': must be an object, got {shown(body)}")
        for key in record:
            if key not in LINE_KEYS:
                raise _LineError(f"key '{key}': beside 'body' it has no effect; put it into 'body'")
        if url is None:
            raise _LineError(f"key 'url' is missing; {CHAT} or {COMPLETIONS}")
    messages, prompt = _asked(body, url, short)
    return BatchRequest(
        line=number,
        custom_id=custom_id,
        url=url or CHAT,
        messages=messages,
        prompt=prompt,
        params=_params(body),
    )


def _json_object(raw: bytes) -> dict[str, Any]:
    try:
        record = json.loads(
            raw.decode("utf-8"), object_pairs_hook=_no_twice, parse_constant=_no_constant
        )
    except UnicodeDecodeError as error:
        raise _LineError(f"not UTF-8 (byte {error.start + 1})") from None
    except json.JSONDecodeError as error:
        raise _LineError(f"not JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise _LineError("not JSON that can be read: nested too deep") from None
    except ValueError as error:  # a number of thousands of digits
        raise _LineError(f"not JSON that can be read: {error}") from None
    if not isinstance(record, dict):
        raise _LineError(f"must be a JSON object, got {shown(record)}")
    return record


def _no_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _LineError(f"key '{twice}' is given twice")
    return record


def _no_constant(name: str) -> Any:
    raise _LineError(f"not JSON: {name} is no JSON value")


def _url(value: Any) -> Url | None:
    if value in (None, CHAT, COMPLETIONS):
        return cast("Url | None", value)
    raise _LineError(f"key 'url': must be {CHAT} or {COMPLETIONS}, got {shown(value)}")


def _asked(
    body: Mapping[str, Any], url: Url | None, short: bool
) -> tuple[tuple[Message, ...] | None, str | None]:
    """Messages or prompt: the one that goes with the endpoint, and only that one."""
    messages, prompt = body.get("messages"), body.get("prompt")
    if messages is not None and prompt is not None:
        raise _LineError("has both 'prompt' and 'messages'; give one")
    if url == COMPLETIONS:
        if messages is not None:
            raise _LineError(f"key 'messages': {COMPLETIONS} takes 'prompt'")
        if not isinstance(prompt, str):
            raise _LineError(f"key 'prompt': must be a string, got {shown(prompt)}")
        return None, _text("prompt", prompt)
    if short and messages is None:
        # What a person would type in the chat.
        return (Message(role="user", content=_text("prompt", prompt)),), None
    if prompt is not None:
        raise _LineError(f"key 'prompt': {CHAT} takes 'messages'")
    if not isinstance(messages, list) or not messages:
        raise _LineError(f"key 'messages': must be a list of messages, got {shown(messages)}")
    return tuple(_message(f"messages[{at}]", value) for at, value in enumerate(messages)), None


def _message(where: str, value: Any) -> Message:
    if not isinstance(value, dict):
        raise _LineError(f"key '{where}': must be an object, got {shown(value)}")
    role = value.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise _LineError(
            f"key '{where}.role': must be one of {', '.join(ROLES)}, got {shown(role)}"
        )
    for key, extra in value.items():
        if key not in ("role", "content") and not (key in EMPTY_MESSAGE_KEYS and not extra):
            raise _LineError(f"key '{where}.{key}' is not supported")
    content = value.get("content")
    if isinstance(content, list):
        parts = [_part(f"{where}.content[{at}]", part) for at, part in enumerate(content)]
        content = "\n".join(parts)
    role = cast(Literal["system", "user", "assistant"], ROLES[role])
    return Message(role=role, content=_text(f"{where}.content", content))


def _part(where: str, value: Any) -> str:
    if not isinstance(value, dict) or value.get("type") != "text":
        raise _LineError(f"key '{where}': only parts of type \"text\" can be used")
    return _text(f"{where}.text", value.get("text"))


def _params(body: Mapping[str, Any]) -> SamplingParams:
    for key, value in body.items():
        _check_key(key, value)
    max_tokens = _whole(body, "max_tokens", 1, 2**31 - 1)
    newer = _whole(body, "max_completion_tokens", 1, 2**31 - 1)
    if None not in (max_tokens, newer) and max_tokens != newer:
        raise _LineError("'max_tokens' and 'max_completion_tokens' differ; give one")
    top_p = _number(body, "top_p", 1.0)
    if top_p == 0.0:
        raise _LineError("key 'top_p': must be above 0 and at most 1, got 0")
    return SamplingParams(
        max_tokens=max_tokens if newer is None else newer,
        temperature=_number(body, "temperature", MAX_TEMPERATURE),
        top_p=top_p,
        seed=_whole(body, "seed", -(2**63), 2**63 - 1),
        stop=_stop(body.get("stop")),
        mode=_mode(body.get("mode")),
    )


def _own_column(key: str) -> bool:
    """In the short form: a key of the line itself, or data of the user's, such as a source.

    What looks like a mistyped parameter is neither.
    """
    if key in LINE_KEYS:
        return True
    known = key in ASKED or key in HONOURED or key in HARMLESS or key in NEUTRAL
    return not known and not _close_keys(key)


def _close_keys(key: str) -> list[str]:
    known = (*ASKED, *HONOURED, *LINE_KEYS)
    return difflib.get_close_matches(key, known, n=1, cutoff=0.75)


def _check_key(key: str, value: Any) -> None:
    if key in ASKED or key in HONOURED or key in HARMLESS:
        return
    if key not in NEUTRAL:
        close = _close_keys(key)
        hint = f"; did you mean '{close[0]}'?" if close else "; own data may stand in 'metadata'"
        raise _LineError(f"unknown key '{key}'{hint}")
    # True equals 1 in Python, not in JSON.
    allowed = [v for v in NEUTRAL[key] if isinstance(v, bool) == isinstance(value, bool)]
    if value is not None and value not in allowed:
        instead = " or ".join(shown(v) for v in NEUTRAL[key])
        hint = f" (only {instead})" if instead else ""
        raise _LineError(f"key '{key}': {shown(value)} is not supported{hint}")


def _whole(body: Mapping[str, Any], key: str, low: int, high: int) -> int | None:
    value = body.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise _LineError(f"key '{key}': must be a whole number {low} to {high}, got {shown(value)}")
    return value


def _number(body: Mapping[str, Any], key: str, high: float) -> float | None:
    value = body.get(key)
    if value is None:
        return None
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0.0 <= value <= high:
        raise _LineError(f"key '{key}': must be a number 0 to {high:g}, got {shown(value)}")
    return float(value)


def _mode(value: Any) -> Literal["plain", "outline"]:
    if value not in (None, "plain", "outline"):
        raise _LineError(f'key \'mode\': must be "plain" or "outline", got {shown(value)}')
    return "outline" if value == "outline" else "plain"


def _stop(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    strings = [value] if isinstance(value, str) else value
    if (
        not isinstance(strings, list)
        or len(strings) > MAX_STOP_STRINGS
        or not all(isinstance(text, str) and text for text in strings)
    ):
        raise _LineError(
            f"key 'stop': must be a string or up to {MAX_STOP_STRINGS} strings, none empty, "
            f"got {shown(value)}"
        )
    return tuple(_text("stop", text) for text in strings)


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _LineError(f"key '{key}': must be a string, got {shown(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair; no text can hold it
        raise _LineError(f"key '{key}': holds half of a surrogate pair") from None
    return value
