"""A conversation as data: a tree of messages, of which one branch is shown and sent.

Nothing is ever overwritten: an edited prompt and a regenerated answer are new messages beside the
old ones, and `chosen` says which of them the shown branch goes through.
"""

from __future__ import annotations

import secrets
from datetime import UTC, datetime
from enum import Enum
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from engine.protocol import Message, SamplingParams, Transcript

TITLE_CELLS = 60
# Later turns need the exact tokens of the branch's last answers only; older ones would make the
# file grow with the square of the conversation.
KEPT_TRANSCRIPTS = 2


class Ending(Enum):
    """How an answer ended, as the file tells it; `marker` is what people read."""

    STOP = "stop"
    CANCELLED = "cancelled"
    LENGTH = "length"
    CONTEXT_FULL = "context_full"
    ENGINE_LOST = "engine_lost"
    REFUSED = "refused"
    INTERRUPTED = "interrupted"
    """The workbench ended before the answer did."""

    @property
    def marker(self) -> str:
        """The quiet words under the answer; "" for an ordinary end."""
        return MARKERS[self]


MARKERS = {
    Ending.STOP: "",
    Ending.CANCELLED: "stopped",
    Ending.LENGTH: "cut off at the length limit",
    Ending.CONTEXT_FULL: "cut off: the context is full · Ctrl+N starts a new conversation",
    Ending.ENGINE_LOST: "cut off: the engine stopped",
    Ending.REFUSED: "not finished",
    Ending.INTERRUPTED: "cut off when Jupiter was closed",
}
CONTINUABLE = frozenset(
    (Ending.CANCELLED, Ending.LENGTH, Ending.ENGINE_LOST, Ending.REFUSED, Ending.INTERRUPTED)
)


class Node(msgspec.Struct, kw_only=True, omit_defaults=True, eq=False):
    """One message of the tree. `text` is as it was typed or generated, controls and all."""

    id: Annotated[int, Meta(ge=1)]
    parent: Annotated[int, Meta(ge=0)] = 0
    """The message before it; 0 for a first one. Always smaller than `id`."""
    role: Literal["user", "assistant"]
    text: str = ""
    ending: Ending | None = None
    """Of an answer; None while it is waited for or running."""
    model: str = ""
    """Of an answer: the source of the model whose tokens these are."""
    token_ids: list[int] = []
    """Of an answer: its tokens, for going on exactly where it was cut off."""
    asked: Transcript | None = None
    """Of an answer that was cut off: the exact tokens of its prompt, for going on."""
    transcript: Transcript | None = None
    """Of an answer: the exact tokens of prompt and answer, for the next turn's prompt."""

    @property
    def is_answer(self) -> bool:
        """Whether the model wrote it."""
        return self.role == "assistant"


def new_id() -> str:
    """A name for a conversation's file: sorts by time, and two never meet."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"


def now() -> datetime:
    """This moment, in UTC, as files keep it."""
    return datetime.now(UTC).replace(microsecond=0)


class Conversation(msgspec.Struct, kw_only=True, eq=False):
    """A tree of messages with its own settings; the struct is also the file's format."""

    version: Literal[1] = 1
    id: str = msgspec.field(default_factory=new_id)
    name: str = ""
    """The title that the user gave; empty for one made from the first prompt."""
    created_at: datetime = msgspec.field(default_factory=now)
    updated_at: datetime = msgspec.field(default_factory=now)
    system: str = ""
    params: SamplingParams = SamplingParams()
    nodes: list[Node] = []
    chosen: dict[int, int] = {}
    """Of each message with several replies, the one that is shown; the last one otherwise."""

    # --- the tree ----------------------------------------------------------------------------

    @property
    def title(self) -> str:
        """What lists call it."""
        first = next((node.text for node in self.nodes if not node.is_answer), "")
        return self.name or shortened(first) or "New conversation"

    def node(self, node_id: int) -> Node:
        """The message with this id; ids count from 1 in the order of the messages."""
        return self.nodes[node_id - 1]

    def parent(self, node: Node) -> Node | None:
        """The message before it."""
        return self.node(node.parent) if node.parent else None

    def children(self, parent_id: int) -> list[Node]:
        """The replies to a message (0: the first messages), oldest first."""
        return [node for node in self.nodes if node.parent == parent_id]

    def siblings(self, node: Node) -> list[Node]:
        """The alternatives to a message, itself included, oldest first."""
        return self.children(node.parent)

    def path(self) -> list[Node]:
        """The shown branch, from the first message to the last."""
        replies: dict[int, Node] = {}
        for node in self.nodes:
            if self.chosen.get(node.parent, node.id) == node.id:
                replies[node.parent] = node  # without a choice the last one stays
        path: list[Node] = []
        while reply := replies.get(path[-1].id if path else 0):
            path.append(reply)
        return path

    def before(self, node: Node) -> list[Node]:
        """The messages that lead to `node`, which is not among them."""
        found: list[Node] = []
        while parent := self.parent(node):
            found.append(parent)
            node = parent
        return found[::-1]

    def is_last(self, node: Node) -> bool:
        """Whether nothing follows the message on any branch."""
        return not any(other.parent == node.id for other in self.nodes)

    # --- changes -----------------------------------------------------------------------------

    def ask(self, text: str, *, after: int | None = None) -> Node:
        """Add a prompt and its answer to come, which is returned; the shown branch ends there.

        Args:
            text: the prompt.
            after: id of the answer that it follows (0 for none): an edited prompt takes the
                place of the one that followed there. The end of the shown branch without it.
        """
        if after is None:
            path = self.path()
            after = path[-1].id if path else 0
        return self.answer_again(self._add("user", after, text))

    def answer_again(self, prompt: Node) -> Node:
        """Add another answer to a prompt and show it."""
        return self._add("assistant", prompt.id)

    def switch(self, node: Node, step: int) -> Node:
        """Show the alternative `step` places after `node`; the same one beyond either end."""
        siblings = self.siblings(node)
        at = siblings.index(node) + step
        other = siblings[min(max(at, 0), len(siblings) - 1)]
        self.chosen[other.parent] = other.id
        return other

    def _add(self, role: Literal["user", "assistant"], parent: int, text: str = "") -> Node:
        node = Node(id=len(self.nodes) + 1, parent=parent, role=role, text=text)
        self.nodes.append(node)
        self.chosen[parent] = node.id
        return node

    def remember(self, answer: Node, transcript: Transcript) -> None:
        """Keep the exact tokens of an answer, and forget those far before it."""
        answer.transcript = transcript
        answers = [node for node in self.before(answer) if node.transcript is not None]
        for node in answers[: 1 - KEPT_TRANSCRIPTS]:
            node.transcript = None

    def end(self, answer: Node, ending: Ending) -> None:
        """Note how an answer ended; what only its continuation needs goes if there is none."""
        answer.ending = ending
        if ending not in CONTINUABLE:
            answer.asked, answer.token_ids = None, []

    def close(self) -> None:
        """Mark what was running when the conversation was left as interrupted."""
        for node in self.nodes:
            if node.is_answer and node.ending is None:
                node.ending = Ending.INTERRUPTED

    # --- what is sent ------------------------------------------------------------------------

    def messages_for(self, answer: Node) -> tuple[Message, ...]:
        """What the model is sent to write `answer`: system prompt and branch, its prompt last.

        An earlier prompt that got no answer (refused, or stopped before its first token) is left
        out: a prompt that was too long would otherwise spoil every later turn.
        """
        *earlier, prompt = self.before(answer)
        messages = [Message("system", self.system)] if self.system.strip() else []
        for asked, answered in zip(earlier[::2], earlier[1::2], strict=True):
            if answered.text.strip():
                messages.append(Message("user", asked.text))
                messages.append(Message("assistant", answered.text))
        return (*messages, Message("user", prompt.text))

    def transcript_for(self, answer: Node, model: str) -> Transcript | None:
        """The latest exact tokens that `answer`'s prompt goes on from, if they are the model's."""
        for node in reversed(self.before(answer)):
            if node.transcript is not None and node.model == model:
                return node.transcript
        return None

    def can_continue(self, answer: Node, model: str) -> bool:
        """Whether the answer was cut off, nothing follows it, and `model` wrote it."""
        cut = answer.ending in CONTINUABLE and bool(answer.token_ids)
        return cut and answer.model == model and self.is_last(answer)

    def check(self) -> None:
        """Raise ValueError unless the tree is whole; for what comes from a file."""
        for at, node in enumerate(self.nodes, 1):
            if node.id != at or node.parent >= at:
                raise ValueError(f"message {at}: has id {node.id} and parent {node.parent}")
            parent = self.parent(node)
            if node.is_answer != (parent is not None and not parent.is_answer):
                raise ValueError(f"message {at}: a {node.role} message cannot stand there")
        for parent_id, child_id in self.chosen.items():
            if not 1 <= child_id <= len(self.nodes) or self.node(child_id).parent != parent_id:
                raise ValueError(f"chosen: {child_id} does not follow {parent_id}")


def shortened(text: str, length: int = TITLE_CELLS) -> str:
    """The first line of `text` with single spaces, at most `length` characters."""
    line = " ".join((text.strip().splitlines() or [""])[0].split())
    return line if len(line) <= length else line[: length - 1].rstrip() + "…"
