"""The part of the chat that keeps conversations: list, open, rename, delete, save, export."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from textual import on

from tui.conversation import Conversation
from tui.export import export, file_name
from tui.screens.answering import AnsweringScreen
from tui.screens.dialogs import AskLine, Confirm
from tui.store import Entry, StoreError, reason
from tui.text import harmless
from tui.widgets.prompt import Prompt
from tui.widgets.settings import Settings
from tui.widgets.sidebar import Sidebar

if TYPE_CHECKING:
    from tui.session import EngineSession


class ConversationsScreen(AnsweringScreen):
    """Fills the list of conversations, and does what is asked for there."""

    def __init__(self, session: EngineSession) -> None:
        super().__init__(session)
        self._told_problem = ""
        self._entering = False

    @property
    def prompt(self) -> Prompt:
        """Where prompts are typed."""
        return self.query_one(Prompt)

    @property
    def sidebar(self) -> Sidebar:
        """The list of conversations."""
        return self.query_one(Sidebar)

    @property
    def settings(self) -> Settings:
        """The settings of the conversation."""
        return self.query_one(Settings)

    async def action_new_conversation(self) -> None:
        """Leave this conversation, a running answer and queued prompts included."""
        await self._open(Conversation())

    async def _open(self, conversation: Conversation) -> None:
        if self.prompt.editing:
            self.prompt.stop_editing()
        await self._leave(conversation)
        self.settings.show(conversation)
        self._show_mode()
        if self.has_class("-narrow"):
            self._close_panels()
        self._refresh_list()
        self.prompt.focus()

    def _show_mode(self) -> None:
        """Say at the prompt how the next answer will be written."""
        outline = self.conversation.params.mode == "outline"
        self.prompt.show_note("outline" if outline else None)

    def _saved(self, error: StoreError | None) -> None:
        self._tell_problem(str(error) if error else "")
        self._refresh_list()

    def _tell_problem(self, problem: str) -> None:
        """Say once that something cannot be kept, and again only when it is something else."""
        if problem and problem != self._told_problem:
            self.notify(
                harmless(problem), title="Not saved", severity="warning", timeout=15, markup=False
            )
        self._told_problem = problem

    @on(Prompt.HistoryLost)
    def _history_lost(self, message: Prompt.HistoryLost) -> None:
        folder = self.store.folder.parent
        self._tell_problem(f"{folder}: cannot be written: {reason(message.error)}")

    def _refresh_list(self) -> None:
        # A save may end after the screen's widgets have gone, when the workbench closes.
        if self.is_mounted and self.query("Sidebar.-open"):
            self.run_worker(self._list(), group="list", exclusive=True)

    async def _list(self) -> None:
        listing = await asyncio.to_thread(self.store.list, self.sidebar.query_text)
        self.sidebar.show(listing, self.conversation.id)
        if self._entering:
            self._entering = False
            self.sidebar.focus_list()

    def _enter_list(self) -> None:
        """Go to the list as soon as it is filled, whichever of several listings that does."""
        self._entering = True
        self._refresh_list()

    @on(Sidebar.Wanted)
    def _list_wanted(self) -> None:
        self._refresh_list()

    @on(Sidebar.Picked)
    def _conversation_picked(self, message: Sidebar.Picked) -> None:
        act = {"open": self._resume, "rename": self._rename, "delete": self._delete}
        self.run_worker(act[message.action](message.entry), group="conversations")

    async def _resume(self, entry: Entry) -> None:
        if entry.id == self.conversation.id:
            self.prompt.focus()
            return
        try:
            await self.autosave.flush()
            conversation = await asyncio.to_thread(self.store.load, entry.id)
        except StoreError as error:
            self.notify(harmless(str(error)), severity="error", markup=False)
            self._refresh_list()
            return
        await self._open(conversation)

    async def _rename(self, entry: Entry) -> None:
        def rename(name: str) -> None:
            if entry.id == self.conversation.id:
                self.conversation.name = name.strip()
                self.autosave.save(self.conversation)
            else:
                self.store.rename(entry.id, name)

        await self.app.push_screen_wait(AskLine("Title", entry.title, rename))
        self._refresh_list()

    async def _delete(self, entry: Entry) -> None:
        question = f"Delete “{entry.title}” for good?"
        if not await self.app.push_screen_wait(Confirm(question, "Delete")):
            return
        if entry.id == self.conversation.id:
            await self._open(Conversation())
        try:
            await self.autosave.flush()
            await asyncio.to_thread(self.store.delete, entry.id)
        except StoreError as error:
            self.notify(harmless(str(error)), severity="error", markup=False)
        self._refresh_list()

    def action_export(self) -> None:
        """Write the shown branch to a file; its name says in which form."""
        self.run_worker(self._export(), group="conversations")

    async def _export(self) -> None:
        talk, model = self.conversation, self.model

        def write(name: str) -> None:
            export(talk, model, Path(name.strip()).expanduser())

        suggestion = str(file_name(talk, "md", Path.cwd()))
        title = "Export to a file: .md for Markdown, .json for OpenAI's messages"
        name = await self.app.push_screen_wait(AskLine(title, suggestion, write))
        if name:
            self.notify(harmless(name.strip()), title="Exported", markup=False)

    def _close_panels(self) -> None:
        self.sidebar.remove_class("-open")
        self.settings.remove_class("-open")
