"""The chat: a conversation with the model, the list of all of them, and this one's settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from msgspec.structs import replace
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.widget import Widget
from textual.widgets import Footer

from tui.conversation import Ending, Node
from tui.copying import copy
from tui.export import code_blocks
from tui.screens.conversations import ConversationsScreen
from tui.screens.dialogs import Pick
from tui.snapshot import Snapshot
from tui.text import harmless
from tui.themes import DIM
from tui.widgets.bars import StatusLine, TitleBar
from tui.widgets.conversation_view import ConversationView, Latest
from tui.widgets.launch import LaunchCard
from tui.widgets.prompt import Prompt
from tui.widgets.settings import Settings
from tui.widgets.sidebar import Sidebar
from tui.widgets.speculation import SpeculationColumn, SpeculationPanel
from tui.widgets.token_text import TokenText

if TYPE_CHECKING:
    from textual.widgets import Markdown

    from tui.session import EngineSession
    from tui.widgets.turn import ErrorPanel, Turn

ASK = "Ask something · Enter sends · Ctrl+J new line · ? help"
ASK_EARLY = "Type ahead: Enter sends as soon as the engine is ready"
PANELS_BESIDE = 110
"""Below so many columns a panel covers the conversation."""
TWO_PANELS = 150
"""Below so many columns one panel closes the other."""


class ChatScreen(ConversationsScreen):
    """Lays out the chat, and does what keys, clicks and the two panels ask for."""

    HELP = """
## Conversations

Each is saved as it grows, and found again under **Conversations**. In the list, Enter opens,
*r* renames, *d* deletes, */* searches titles and texts.

## Messages

Shift+Tab goes from the prompt to the messages; the keys of the one in focus are below. The words
under a message do the same by mouse. An edited prompt and a regenerated answer are new versions:
‹ 1/2 › and the arrow keys lead from one to the other. With temperature 0 or a fixed seed the same
prompt gets the same answer.

An answer that was cut off can be continued where it ends, by the model that began it.

## Speculation

**Ctrl+S** colours each token of the answers from now on by how it came: from the model itself
(root) or from the Medusa head of that number. ◦ is a token without text, ↵ a line end. Shift+Tab,
or a click on a token, moves the cursor: ← → by tokens, Ctrl+← → by steps, End follows the answer,
PgUp and PgDn scroll the tree.

The panel tells for each head how many of its proposals were accepted, over the last steps and over
the conversation, and shows the draft tree of the step: ✓ accepted, ✗ rejected.

## Outline answers

**F10** has the next answers of the conversation written by outline: where an answer becomes a list,
the model first writes its points in a few words each, then fills them in side by side. The prompt's
frame says so. What is no list is answered as ever. Telemetry shows which stage computed which point
when.

## Figures below the prompt

| | |
|---|---|
| first token | time from sending to the first token |
| tok/s | tokens per second after the first |
| tok/step | tokens of one decode step; Medusa heads raise it above 1 |
| 15\\|15 | decoder layers on each stage |
| new, cached | prompt tokens computed now, and kept from earlier turns |
| n/a | not measured yet |
"""
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "back", "Back", id="chat.back"),
        Binding("escape", "stop_answer", "Stop", id="chat.stop"),
        Binding("ctrl+r", "restart_engine", "Restart engine", id="chat.restart"),
        Binding("ctrl+n", "new_conversation", "New", id="chat.new", tooltip="New conversation"),
        Binding("ctrl+b", "toggle_sidebar", "Chats", id="chat.conversations"),
        Binding("ctrl+o", "toggle_settings", "Settings", id="chat.settings"),
        Binding("ctrl+g", "latest('regenerate')", "Again", id="chat.again", tooltip="Answer anew"),
        Binding("ctrl+l", "latest('continue')", "Continue", id="chat.continue"),
        Binding(
            "ctrl+s",
            "toggle_speculation",
            "Speculation",
            id="chat.speculation",
            tooltip="How each token came, and what the heads are worth",
        ),
        Binding(
            "f10",
            "toggle_outline",
            "Outline answers",
            id="chat.outline",
            show=False,
            tooltip="Write the points of a list side by side",
        ),
        Binding("f8", "latest('copy')", "Copy the answer", id="chat.copy", show=False),
        Binding("f9", "export", "Export", id="chat.export", show=False, tooltip="Markdown, JSON"),
    ]
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (PANELS_BESIDE, "-beside")]  # noqa: RUF012
    DEFAULT_CSS = """
    ChatScreen {
        #body { height: 1fr; layers: base panels; }
        #column { width: 1fr; height: 1fr; }
        Sidebar.-open, Settings.-open { display: block; }
        &.-narrow Sidebar { layer: panels; dock: left; }
        &.-narrow Settings { layer: panels; dock: right; }
    }
    """
    AUTO_FOCUS = "#prompt"

    def __init__(self, session: EngineSession) -> None:
        super().__init__(session)
        self._failure: ErrorPanel | None = None

    def compose(self) -> ComposeResult:
        """Title; panels around conversation and prompt; figures and keys."""
        yield TitleBar()
        with Horizontal(id="body"):
            yield Sidebar()
            with SpeculationColumn(id="column"):
                yield ConversationView(self._launch, self._facts)
                yield SpeculationPanel()
                yield Latest()
                with Vertical(id="prompt-row"):
                    yield Prompt(id="prompt")
            yield Settings(self._session.config)
        yield StatusLine()
        yield Footer()

    def on_mount(self) -> None:
        """Show what the configuration tells, before there is an engine."""
        self.snapshot = self._session.snapshot
        self.speculation.open(self.conversation.id)

    async def on_unmount(self) -> None:
        """Nothing that was said is lost, the beginning of a running answer included."""
        if self.running is not None:
            self.conversation.end(self.running.node, Ending.INTERRUPTED)
            self.autosave.save(self.conversation)
        await self.autosave.flush()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Offer only what the state allows."""
        match action:
            case "stop_answer":
                return self.running is not None
            case "restart_engine":
                return self.snapshot is not None and self.snapshot.phase == "failed"
            case "back":
                return self.is_mounted and self._what_to_leave() is not None
            case "latest":
                node = self._latest_answer()
                return node is not None and parameters[0] in self._facts(node).actions
            case "export":
                return bool(self.conversation.nodes)
        return True

    # --- the engine ------------------------------------------------------------------------

    async def watch_snapshot(self, old: Snapshot | None, new: Snapshot) -> None:
        """Show the engine's state; an engine that got ready gets the first queued prompt."""
        self.query_one(TitleBar).snapshot = new
        self.query_one(StatusLine).split = new.split
        self.speculation.heads = new.ready.medusa_num_heads if new.ready else None
        self.speculation.tuned = new.tree
        self.prompt.placeholder = ASK if new.phase == "ready" else ASK_EARLY
        if old is not None and old.launch not in (0, new.launch):
            self._launch, self._failure = LaunchCard(new), None
            await self.view.column.mount(self._launch)
        self._launch.show(new)
        if new.phase == "failed" and self.view.column.is_attached:  # not so when the run is ending
            await self._show_failure(new)
        self.refresh_bindings()
        self._send_next()

    async def _show_failure(self, snapshot: Snapshot) -> None:
        from tui.widgets.turn import ErrorPanel

        if self._failure is not None:
            self._failure.show_text(snapshot.detail)
            return
        title = "The engine stopped" if snapshot.ready else "The engine did not start"
        self._failure = ErrorPanel(title, snapshot.detail, "Ctrl+R starts it again")
        await self.view.column.mount(self._failure)

    def action_restart_engine(self) -> None:
        """Start the engine anew; queued prompts are sent when it is ready."""
        self.run_worker(self._session.start(), group="engine")

    # --- messages --------------------------------------------------------------------------

    def on_turn_picked(self, message: Turn.Picked) -> None:
        """Do something with a message."""
        self._act(message.node, message.action)

    def action_latest(self, action: str) -> None:
        """Do something with the last answer of the branch."""
        if node := self._latest_answer():
            self._act(node, action)

    def _latest_answer(self) -> Node | None:
        path = self.conversation.path()
        return path[-1] if path else None

    def _act(self, node: Node, action: str) -> None:
        if action not in self._facts(node).actions:
            return
        match action:
            case "copy":
                copy(self.app, node.text, "Answer" if node.is_answer else "Prompt")
            case "code":
                self._copy_code(node)
            case "edit":
                self.prompt.change(node)
                self.refresh_bindings()
            case "regenerate":
                prompt = self.conversation.parent(node)
                assert prompt is not None
                self.run_worker(self._answer(self.conversation.answer_again(prompt)))
            case "continue":
                self.run_worker(self._answer(node))
            case "older" | "newer":
                self.run_worker(self._switch(node, -1 if action == "older" else 1))

    async def _switch(self, node: Node, step: int) -> None:
        other = self.conversation.switch(node, step)
        self.autosave.save(self.conversation)
        focused = isinstance(self.focused, Widget) and getattr(self.focused, "node", None) is node
        await self._show_branch()
        if focused:
            turn = next(turn for turn in self.view.turns if turn.node is other)
            turn.focus()

    def _copy_code(self, node: Node) -> None:
        blocks = code_blocks(node.text)
        if len(blocks) == 1:
            copy(self.app, blocks[0].text, "Code block")
        elif blocks:
            self.run_worker(self._pick_code([block.text for block in blocks]))

    async def _pick_code(self, blocks: list[str]) -> None:
        choices = []
        for block in blocks:
            lines = block.splitlines() or [""]
            first = harmless(next((line for line in lines if line.strip()), ""))
            choices.append(Content.assemble(first[:44], (f"  {len(lines)} lines", DIM)))
        at = await self.app.push_screen_wait(Pick("Copy which code block?", choices))
        if at is not None:
            copy(self.app, blocks[at], "Code block")

    def on_turn_stepped(self, message: Turn.Stepped) -> None:
        """Move the focus along the messages, and after the last to the prompt."""
        if not self.view.focus_step(message.turn, message.step) and message.step > 0:
            self.prompt.focus()

    # --- panels ----------------------------------------------------------------------------

    def action_toggle_sidebar(self) -> None:
        """Show the list of conversations, or close it."""
        if self._toggle(self.sidebar, self.settings):
            self._enter_list()

    def action_toggle_settings(self) -> None:
        """Show the settings of the conversation, or close them."""
        if self._toggle(self.settings, self.sidebar):
            self.settings.show(self.conversation)
            self.settings.focus_first()

    def _toggle(self, panel: Widget, other: Widget) -> bool:
        """Open or close `panel`; where there is room for one only, `other` closes."""
        opened = not panel.has_class("-open")
        panel.set_class(opened, "-open")
        if opened and self.size.width < TWO_PANELS:
            other.remove_class("-open")
        if not opened:
            self.prompt.focus()
        return opened

    async def action_toggle_speculation(self) -> None:
        """Show how each token came, and the panel that explains it; or the answers as text."""
        if self.speculation.on and isinstance(self.focused, TokenText):
            self.prompt.focus()
        self.speculation.on = not self.speculation.on
        await self.speculation.attach(self.view.turns)

    def on_token_text_moved(self, message: TokenText.Moved) -> None:
        """Explain the token under the cursor."""
        self.speculation.look_at(message.trace, message.token)

    def on_token_text_tree_scrolled(self, message: TokenText.TreeScrolled) -> None:
        """Show more of the tree."""
        self.speculation.scroll_tree(message.by)

    @on(Settings.Changed)
    def _settings_changed(self, message: Settings.Changed) -> None:
        self.conversation.system, self.conversation.params = message.system, message.params
        self._show_mode()
        self.autosave.save(self.conversation)

    def action_toggle_outline(self) -> None:
        """Have the next answers written by outline, or as ever."""
        talk = self.conversation
        mode: Literal["plain", "outline"] = "plain" if talk.params.mode == "outline" else "outline"
        talk.params = replace(talk.params, mode=mode)
        self.settings.show(talk)
        self.autosave.save(talk)
        self._show_mode()

    def _what_to_leave(self) -> str | None:
        focused = self.focused
        if focused is not None and focused is not self.prompt:
            return "focus"
        return "editing" if self.prompt.editing else None

    def action_back(self) -> None:
        """Go back to the prompt from wherever the focus is; then leave an edited prompt."""
        if self._what_to_leave() == "editing":
            self.prompt.stop_editing()
            self.refresh_bindings()
        elif self.has_class("-narrow"):
            self._close_panels()
        self.prompt.focus()

    # --- around the conversation -----------------------------------------------------------

    @on(Prompt.ScrollWanted)
    def _scroll_wanted(self, message: Prompt.ScrollWanted) -> None:
        view = self.view
        match message.how:
            case "page_up":
                view.scroll_page_up(animate=False)
            case "page_down":
                view.scroll_page_down(animate=False)
            case "home":
                view.scroll_home(animate=False)
            case "end":
                view.to_latest()

    @on(ConversationView.Below)
    def _tell_below(self, message: ConversationView.Below) -> None:
        self.query_one(Latest).below = message.lines

    @on(Latest.Wanted)
    def _latest_wanted(self) -> None:
        self.view.to_latest()

    @on(Prompt.HelpWanted)
    async def _help(self) -> None:
        await self.run_action("app.help")

    def on_markdown_link_clicked(self, message: Markdown.LinkClicked) -> None:
        """Copy a link of the model; where it leads is the user's to see and to decide."""
        self.app.copy_to_clipboard(message.href)
        self.notify(message.href, title="Link copied", markup=False)
