"""A conversation for other programs: Markdown to read, JSON as OpenAI's chat API takes it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from tui.conversation import Conversation
from tui.store import StoreError, reason, write_private

Form = Literal["md", "json"]
HEADINGS = {"user": "You", "assistant": "Answer"}


@dataclass(frozen=True)
class CodeBlock:
    """A fenced or indented code block of an answer."""

    language: str
    text: str


def to_markdown(conversation: Conversation) -> str:
    """The shown branch as Markdown, with title, system prompt and how answers ended."""
    parts = [f"# {conversation.title}"]
    if conversation.system.strip():
        quoted = "\n".join(f"> {line}".rstrip() for line in conversation.system.splitlines())
        parts += ["## System prompt", quoted]
    for node in conversation.path():
        parts.append(f"## {HEADINGS[node.role]}")
        text = node.text.strip("\n")
        if text:
            parts.append(closed(text) if node.is_answer else text)
        if node.ending is not None and node.ending.marker:
            parts.append(f"*({node.ending.marker})*")
    return "\n\n".join(parts) + "\n"


def to_openai(conversation: Conversation, model: str) -> str:
    """The shown branch as the JSON body of a chat completion request: model, messages, settings."""
    body: dict[str, Any] = {"model": model, "messages": openai_messages(conversation)}
    params = msgspec.to_builtins(conversation.params)  # defaults are left out
    body.update({key: value for key, value in params.items() if value is not None})
    return msgspec.json.format(msgspec.json.encode(body), indent=2).decode() + "\n"


def openai_messages(conversation: Conversation) -> list[dict[str, str]]:
    """The shown branch as OpenAI's messages; answers without text are left out."""
    messages: list[dict[str, str]] = []
    if conversation.system.strip():
        messages.append({"role": "system", "content": conversation.system})
    for node in conversation.path():
        if node.text.strip():
            messages.append({"role": node.role, "content": node.text})
    return messages


def export(conversation: Conversation, model: str, path: Path) -> None:
    """Write the shown branch to a new file; its ending (.md or .json) says in which form.

    Raises StoreError when the ending is another one, the file exists or cannot be written.
    """
    if path.suffix not in (".md", ".json"):
        raise StoreError(f"{path}: name a file that ends in .md or .json")
    if path.exists():
        raise StoreError(f"{path}: exists already; choose another name")
    as_json = path.suffix == ".json"
    text = to_openai(conversation, model) if as_json else to_markdown(conversation)
    try:
        write_private(path, text.encode())
    except OSError as error:
        raise StoreError(f"{path}: cannot be written: {reason(error)}") from None


def file_name(conversation: Conversation, form: Form, folder: Path) -> Path:
    """A name for an export that no file in `folder` has yet."""
    stem = re.sub(r"[^\w]+", "-", conversation.title.casefold()).strip("-")[:40] or "conversation"
    path = folder / f"{stem}.{form}"
    number = 2
    while path.exists():
        path = folder / f"{stem}-{number}.{form}"
        number += 1
    return path


def closed(text: str) -> str:
    """`text` with a code fence that was cut off closed, so that what follows is not in it."""
    fence = ""
    for line in text.splitlines():
        found = re.match(r" {0,3}(`{3,}|~{3,})(.*)", line)
        if found is None:
            continue
        if not fence:
            fence = found[1]
        elif found[1].startswith(fence) and not found[2].strip():
            fence = ""
    return f"{text}\n{fence}" if fence else text


def code_blocks(text: str) -> list[CodeBlock]:
    """The code blocks of a Markdown text, in their order, also of lists and quotes."""
    from markdown_it import MarkdownIt  # slow to import; the first paint does without

    return [
        CodeBlock(token.info.split()[0] if token.info.split() else "", token.content)
        for token in MarkdownIt("gfm-like").parse(text)
        if token.type in ("fence", "code_block")
    ]
