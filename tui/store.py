"""Conversations on disk: one private JSON file each, replaced whole or not at all."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import msgspec

from engine.errors import JupiterError, cut
from engine.paths import make_private, state_dir
from tui.conversation import Conversation, now, shortened

SNIPPET_LEAD = 12
SNIPPET_LENGTH = 60


class StoreError(JupiterError):
    """A conversation that cannot be read, written or deleted; one line with the file's path."""


class ChangedElsewhereError(StoreError):
    """Another Jupiter has written the conversation since this one read or wrote it."""


@dataclass(frozen=True)
class Entry:
    """A conversation as lists show it."""

    id: str
    title: str
    updated_at: datetime
    snippet: str = ""
    """Where a search found its words; empty where the title has them."""


@dataclass(frozen=True)
class Listing:
    """What is in the folder: the conversations, latest first, and what could not be read."""

    folder: Path = Path()
    entries: tuple[Entry, ...] = ()
    problems: tuple[str, ...] = ()
    """One line per file that is no conversation."""


class ConversationStore:
    """The folder of conversations. Every method may block on the disk; none touches the screen."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = state_dir() / "conversations" if folder is None else folder
        self._known: dict[str, object] = {}
        """Of each conversation that was read or written here, which state of its file that was."""

    def path(self, conversation_id: str) -> Path:
        """The file of a conversation."""
        return self.folder / f"{conversation_id}.json"

    def load(self, conversation_id: str) -> Conversation:
        """Read a conversation; answers that were running when it was written count as cut off.

        Raises StoreError when it is missing, unreadable or no conversation.
        """
        path = self.path(conversation_id)
        state = state_of(path)
        conversation = self._read(path)
        conversation.close()
        self._known[conversation_id] = state
        return conversation

    def list(self, query: str = "") -> Listing:
        """The conversations whose title or text has all words of `query`, latest first."""
        try:
            files = sorted(self.folder.glob("*.json"))
        except OSError as error:
            return Listing(
                self.folder, problems=(f"{self.folder}: cannot be read: {reason(error)}",)
            )
        entries: list[Entry] = []
        problems: list[str] = []
        for file in files:
            try:
                conversation = self._read(file)
            except StoreError as error:
                problems.append(str(error))
                continue
            if entry := found(conversation, query.casefold().split()):
                entries.append(entry)
        entries.sort(key=lambda entry: (entry.updated_at, entry.id), reverse=True)
        return Listing(self.folder, tuple(entries), tuple(problems))

    def save(self, conversation: Conversation) -> None:
        """Write a conversation; see `write`."""
        self.write(conversation.id, encode(conversation))

    def write(self, conversation_id: str, data: bytes) -> None:
        """Put `data` in the place of a conversation's file; readable by its owner only.

        A process that is killed meanwhile leaves the file as it was. Raises StoreError; its
        ChangedElsewhereError rather than losing what another process has written.
        """
        path = self.path(conversation_id)
        if state_of(path) not in (None, self._known.get(conversation_id)):
            raise ChangedElsewhereError(f"{path}: another Jupiter has changed it")
        self._put(path, data)
        self._known[conversation_id] = state_of(path)

    def _put(self, path: Path, data: bytes) -> None:
        try:
            make_private(self.folder)
            write_private(path, data)
        except OSError as error:
            raise StoreError(f"{path}: cannot be written: {reason(error)}") from None

    def rename(self, conversation_id: str, name: str) -> None:
        """Give a conversation another title; an empty one is made from its first prompt again."""
        path = self.path(conversation_id)
        conversation = self._read(path)
        conversation.name = shortened(name)
        self._put(path, encode(conversation))

    def delete(self, conversation_id: str) -> None:
        """Remove a conversation for good; it may be gone already. Raises StoreError."""
        path = self.path(conversation_id)
        try:
            path.unlink(missing_ok=True)
        except NotADirectoryError:
            return  # the folder cannot exist, so nothing was ever saved
        except OSError as error:
            raise StoreError(f"{path}: cannot be deleted: {reason(error)}") from None

    def _read(self, path: Path) -> Conversation:
        try:
            conversation = _decoder.decode(path.read_bytes())
            conversation.check()
        except FileNotFoundError:
            raise StoreError(f"{path}: no such conversation") from None
        except OSError as error:
            raise StoreError(f"{path}: cannot be read: {reason(error)}") from None
        except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
            raise StoreError(
                f"{path}: not a conversation of this version: {cut(str(error))}"
            ) from None
        conversation.id = path.stem  # a copied file is a conversation of its own
        return conversation


def state_of(path: Path) -> object:
    """Tells one state of a file from any other; None where there is none."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


_decoder = msgspec.json.Decoder(Conversation)


def encode(conversation: Conversation) -> bytes:
    """The file of a conversation as it is now."""
    return msgspec.json.encode(conversation) + b"\n"


def touch(conversation: Conversation) -> None:
    """Note that the conversation has just changed."""
    conversation.updated_at = now()


def found(conversation: Conversation, words: Iterable[str]) -> Entry | None:
    """The entry of a conversation that has all `words` (casefolded), with a snippet of one."""
    texts = [conversation.title, *(node.text for node in conversation.nodes)]
    snippet = ""
    for word in words:
        text = next((text for text in texts if word in text.casefold()), None)
        if text is None:
            return None
        if not snippet and text is not conversation.title:
            snippet = around(text, word)
    return Entry(conversation.id, conversation.title, conversation.updated_at, snippet)


def around(text: str, word: str) -> str:
    """A line of `text` from a little before `word` (casefolded) on."""
    at = text.casefold().find(word)
    start = max(0, at - SNIPPET_LEAD)
    line = re.sub(r"\s+", " ", text[start : start + SNIPPET_LENGTH]).strip()
    return f"…{line}" if start else line


def write_private(path: Path, data: bytes) -> None:
    """Replace a file atomically; mode 0600, and on the disk when this returns. Raises OSError."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        with suppress(OSError):
            Path(name).unlink()
        raise


def reason(error: OSError) -> str:
    """Why the system refused, in its words."""
    return error.strerror or str(error)
