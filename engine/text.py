"""Text to tokens and back: tokenizer.json, the chat template, streamed decoding, stop strings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from engine.errors import CheckpointError, PromptError
from engine.protocol import Message

# For models without a chat template: the form in which Vicuna v1.1 and later were trained.
VICUNA_TEMPLATE = (
    "{{ bos_token }}A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
    "{% for message in messages %}"
    "{% if message.role == 'user' %} USER: {{ message.content }}"
    "{% elif message.role == 'assistant' %} ASSISTANT: {{ message.content }}{{ eos_token }}"
    "{% else %} {{ message.content }}{% endif %}"
    "{% endfor %} ASSISTANT:"
)


class TextCodec:
    """The tokenizer and chat template of a model folder."""

    def __init__(self, folder: Path, tokenizer_file: Path, eos_token_ids: Sequence[int]) -> None:
        """Read tokenizer.json and the template.

        `eos_token_ids` are those of the model's config; generation_config.json adds to them.
        """
        self.made_of = (folder, tokenizer_file, tuple(eos_token_ids))
        """What it was made of, for making it again in another process."""
        try:
            self.tokenizer = Tokenizer.from_file(str(tokenizer_file))
        except Exception as error:  # the library raises plain Exception
            raise CheckpointError(f"{tokenizer_file}: not a tokenizer: {error}") from None
        settings = _read_json(folder / "tokenizer_config.json")
        self.special = {
            name: _token_text(settings[name])
            for name in ("bos_token", "eos_token", "unk_token", "pad_token")
            if settings.get(name)
        }
        source = _template_source(folder, settings)
        self.has_chat_template = source is not None
        self.template_source = source or VICUNA_TEMPLATE
        self.template = _environment().from_string(self.template_source)
        self._anchor = self.encode("a", add_special_tokens=False)
        self._token_texts: dict[int, str] = {}
        self.stop_ids = frozenset(
            [*eos_token_ids, *self._generation_stops(folder), *self._turn_ends()]
        )

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt text of a conversation, ready for the assistant's answer.

        Raises PromptError when the template refuses the conversation.
        """
        turns = [{"role": m.role, "content": m.content} for m in messages]
        try:
            return self.template.render(
                messages=turns, add_generation_prompt=True, tools=None, **self.special
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise PromptError(
                f"the model's chat template refuses these messages: {error}"
            ) from None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of `text`; special tokens written in it are recognised."""
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def token_text(self, token: int) -> str:
        """One token as text: its leading space kept, a special token by name, "\ufffd" for part of
        a character."""
        text = self._token_texts.get(token)
        if text is None:
            # Alone a token would lose the space in front of it, as the first word of a text does.
            before = self.tokenizer.decode(self._anchor, skip_special_tokens=False)
            both = self.tokenizer.decode([*self._anchor, token], skip_special_tokens=False)
            text = self._token_texts[token] = both.removeprefix(before)
        return text

    def says(self, tokens: Sequence[int], text: str) -> bool:
        """Whether `tokens` can stand for `text` here: not where another tokenizer made them.

        White space does not count, as decoding may add or drop some.
        """
        size = self.tokenizer.get_vocab_size()
        if not all(0 <= token < size for token in tokens):
            return False
        decoded = self.tokenizer.decode(list(tokens), skip_special_tokens=False)
        return "".join(decoded.split()) == "".join(text.split())

    def _generation_stops(self, folder: Path) -> list[int]:
        eos = _read_json(folder / "generation_config.json").get("eos_token_id")
        return eos if isinstance(eos, list) else [] if eos is None else [eos]

    def _turn_ends(self) -> list[int]:
        """Special tokens that end a turn: the eos token, and what the template puts there."""
        ends = []
        eos = self.tokenizer.token_to_id(self.special.get("eos_token", ""))
        if eos is not None:
            ends.append(eos)
        try:
            text = self.template.render(
                messages=[
                    {"role": "user", "content": "question"},
                    {"role": "assistant", "content": "answer"},
                ],
                add_generation_prompt=False,
                tools=None,
                **self.special,
            )
        except (jinja2.TemplateError, TypeError, ValueError):
            return ends
        _, found, after = text.rpartition("answer")
        first = self.encode(after.lstrip(), add_special_tokens=False)[:1] if found else []
        special = self.tokenizer.get_added_tokens_decoder()
        return ends + [t for t in first if t in special and special[t].special]


@dataclass
class Piece:
    """What a stream may show after some tokens."""

    text: str
    stopped: bool


class TextStream:
    """Turns one answer's tokens into text as they come.

    Text that may still become a stop string is held back; a stop string ends the text before it.
    """

    def __init__(self, codec: TextCodec, prompt_ids: Sequence[int], stop: Sequence[str]) -> None:
        self.codec = codec
        # A few tokens before the answer tell the decoder whether a leading space is a space.
        self._decoder = DecodeStream(ids=list(prompt_ids[-4:]), skip_special_tokens=True)
        self._stop = [text for text in stop if text]
        self._held = ""
        self.text = ""

    def push(self, token: int) -> Piece:
        """The text that `token` adds; after `stopped` nothing more may be pushed."""
        self._held += self._decoder.step(self.codec.tokenizer, token) or ""
        ends = [at for at in (self._held.find(text) for text in self._stop) if at >= 0]
        if ends:
            return self._show(min(ends), stopped=True)
        return self._show(len(self._held) - self._maybe_stop(), stopped=False)

    def is_text_of(self, tokens: Sequence[int]) -> bool:
        """Whether `text` is all that `tokens` say: no special token, cut or half a character."""
        special = self.codec.tokenizer.get_added_tokens_decoder()
        if any(token in special for token in tokens):
            return False
        whole = self.codec.tokenizer.decode(list(tokens))
        return whole.strip() == self.text.strip() and not whole.endswith("\ufffd")

    def flush(self) -> str:
        """What was held back, once nothing more comes."""
        return self._show(len(self._held), stopped=False).text

    def _show(self, end: int, *, stopped: bool) -> Piece:
        shown, self._held = self._held[:end], "" if stopped else self._held[end:]
        self.text += shown
        return Piece(shown, stopped)

    def _maybe_stop(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = 0
        for text in self._stop:
            for size in range(min(len(text) - 1, len(self._held)), longest, -1):
                if self._held.endswith(text[:size]):
                    longest = size
                    break
        return longest


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as chat templates expect it (transformers' `apply_chat_template`), in a sandbox."""

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _template_source(folder: Path, settings: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template


def _token_text(value: Any) -> str:
    return str(value["content"]) if isinstance(value, dict) else str(value)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must hold one JSON object")
    return values
