"""Saves conversations in the background: one write at a time, the latest state wins."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from tui.conversation import Conversation, new_id
from tui.store import ChangedElsewhereError, ConversationStore, StoreError, encode, touch

STREAMING_INTERVAL_S = 2.0


class Autosave:
    """Keeps the files of conversations as they are now.

    What is to be written is fixed when `save` is called; the disk is waited for in a thread.
    `done` is called after each write, with the error of one that failed.
    """

    def __init__(self, store: ConversationStore, done: Callable[[StoreError | None], None]) -> None:
        self._store = store
        self._done = done
        self._pending: dict[str, tuple[Conversation, bytes]] = {}
        self._writing: asyncio.Task[None] | None = None
        self._saved_at = 0.0

    def save(self, conversation: Conversation) -> None:
        """Write a conversation soon; an empty one is not worth a file."""
        if not conversation.nodes:
            return
        touch(conversation)
        self._saved_at = time.monotonic()
        self._pending[conversation.id] = conversation, encode(conversation)
        if self._writing is None:
            self._writing = asyncio.create_task(self._write())

    def save_growing(self, conversation: Conversation) -> None:
        """As `save`, at most every STREAMING_INTERVAL_S; for each piece of an answer."""
        if time.monotonic() - self._saved_at >= STREAMING_INTERVAL_S:
            self.save(conversation)

    async def flush(self) -> None:
        """Wait until all is written."""
        while self._writing is not None:
            await asyncio.wait([self._writing])

    async def _write(self) -> None:
        try:
            while self._pending:
                name = next(iter(self._pending))
                conversation, data = self._pending.pop(name)
                try:
                    await asyncio.to_thread(self._store.write, name, data)
                except ChangedElsewhereError as error:
                    self._go_on_as_copy(conversation)
                    self._done(StoreError(f"{error}; this window goes on with a copy"))
                except StoreError as error:
                    self._done(error)
                else:
                    self._done(None)
        finally:
            self._writing = None

    def _go_on_as_copy(self, conversation: Conversation) -> None:
        """Leave the file to the other process, which may have a branch that is not here."""
        self._pending.pop(conversation.id, None)
        conversation.name = f"{conversation.title} (copy)"
        conversation.id = new_id()
        self.save(conversation)
