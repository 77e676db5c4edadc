"""How the tokens of a conversation came: their origins, draft trees and acceptance. Plain data."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from engine.protocol import Metrics, StepTrace

RECENT_STEPS = 50
"""Decode steps that the rolling figures are over."""

ROOT = 0
UNTRACED = -1

Fate = Literal["root", "accepted", "next", "rejected"]


@dataclass(frozen=True)
class TracedToken:
    """One token of an answer."""

    text: str
    """What it added to the answer; "" inside a character, or for a token that is not shown."""
    own: str
    """The token by itself."""
    head: int
    """ROOT: chosen by the base model; k: drafted by head k; UNTRACED: not known."""
    step: int
    """Which of the answer's steps made it; -1 where that is not known."""


@dataclass(frozen=True)
class Acceptance:
    """Figures over some decode steps; `proposed[h]` and `accepted[h]` are those of head h + 1."""

    steps: int = 0
    tokens: int = 0
    proposed: tuple[int, ...] = ()
    """Steps whose tree reached the head's depth."""
    accepted: tuple[int, ...] = ()
    """Steps whose accepted path reached it."""

    @property
    def tokens_per_step(self) -> float | None:
        """Tokens that a decode step yields; None before the first."""
        return self.tokens / self.steps if self.steps else None

    def rate(self, head: int) -> float | None:
        """Share of its proposals of head number `head` (from 1) that stood; None without any."""
        if head > len(self.proposed) or not self.proposed[head - 1]:
            return None
        return self.accepted[head - 1] / self.proposed[head - 1]

    def __add__(self, other: Acceptance) -> Acceptance:
        return Acceptance(
            self.steps + other.steps,
            self.tokens + other.tokens,
            _sums(self.proposed, other.proposed),
            _sums(self.accepted, other.accepted),
        )


def of_step(step: StepTrace) -> Acceptance:
    """The figures of one step; none of a prompt's, which drafts nothing."""
    if not step.parents:
        return Acceptance()
    depth = max(depths(step.parents))
    reached = len(step.path) - 1
    return Acceptance(
        1,
        len(step.pieces),
        (1,) * depth,
        tuple(int(head <= reached) for head in range(1, depth + 1)),
    )


def of_metrics(metrics: Metrics) -> Acceptance:
    """The figures that the engine gives of a whole answer."""
    return Acceptance(
        metrics.decode_steps,
        round((metrics.mean_accepted_len or 0) * metrics.decode_steps),
        metrics.proposed_per_head,
        metrics.accepted_per_head,
    )


class AnswerTrace:
    """The steps of one answer, and its tokens in their order."""

    def __init__(self) -> None:
        self.steps: list[StepTrace] = []
        self.tokens: list[TracedToken] = []
        self.acceptance = Acceptance()
        self._length = 0

    def add(self, step: StepTrace) -> None:
        """Take in the next step."""
        number = len(self.steps)
        self.steps.append(step)
        self.acceptance += of_step(step)
        drafted = step.path[1:]
        for place, piece in enumerate(step.pieces):
            if place < len(drafted):
                own, head = step.texts[drafted[place]], place + 1
            else:
                own, head = step.next_text, ROOT
            self._add(TracedToken(piece, own, head, number))

    def catch_up(self, text: str) -> None:
        """Take in what the answer `text` has more, of which it is not known how it came."""
        rest = text[self._length :]
        if rest:
            self._add(TracedToken(rest, rest, UNTRACED, -1))

    def _add(self, token: TracedToken) -> None:
        self.tokens.append(token)
        self._length += len(token.text)


class Speculation:
    """Of one conversation: the traces of its answers by the ids of these, and its figures."""

    def __init__(self) -> None:
        self.traces: dict[int, AnswerTrace] = {}
        self.latest: AnswerTrace | None = None
        """That of the answer that was begun last."""
        self._untraced = Acceptance()
        self._recent: deque[Acceptance] = deque(maxlen=RECENT_STEPS)

    def begin(self, answer: int, text: str) -> None:
        """A traced answer begins, or goes on behind its `text`."""
        self.latest = self.traces.setdefault(answer, AnswerTrace())
        self.latest.catch_up(text)

    def grew(self, answer: int, steps: Iterable[StepTrace], text: str) -> None:
        """A traced answer made more steps, and is `text` now."""
        trace = self.traces[answer]
        for step in steps:
            trace.add(step)
            if step.parents:
                self._recent.append(of_step(step))
        trace.catch_up(text)

    def ended_untraced(self, metrics: Metrics) -> None:
        """An answer that was not traced has ended: the engine's figures count."""
        self._untraced += of_metrics(metrics)

    @property
    def recent(self) -> Acceptance:
        """Over the last RECENT_STEPS traced steps."""
        return sum(self._recent, Acceptance())

    @property
    def whole(self) -> Acceptance:
        """Over all answers, a traced one that still runs included."""
        return sum((trace.acceptance for trace in self.traces.values()), self._untraced)


@dataclass(frozen=True)
class TreeLine:
    """One node of a draft tree, as a line: guides, the token, who drafted it, what became of it."""

    guide: str
    text: str
    head: int
    """Its depth, which is its head's number; 0 for the root and for the base model's next token."""
    fate: Fate


def tree_lines(step: StepTrace) -> list[TreeLine]:
    """The tree of a step, accepted branch first; the base model's token follows its end."""
    if not step.parents:
        return [TreeLine("", step.next_text, 0, "next")]
    accepted = set(step.path)
    children: list[list[int]] = [[] for _ in step.parents]
    for node, parent in enumerate(step.parents):
        if parent >= 0:
            children[parent].append(node)
    for siblings in children:
        siblings.sort(key=lambda node: node not in accepted)
    lines = [TreeLine("", step.texts[0], 0, "root")]

    def grow(node: int, guide: str, depth: int) -> None:
        ends = node == step.path[-1]
        if ends:
            last = not children[node]
            lines.append(TreeLine(guide + _branch(last), step.next_text, 0, "next"))
        for child in children[node]:
            last = child == children[node][-1]
            fate: Fate = "accepted" if child in accepted else "rejected"
            lines.append(TreeLine(guide + _branch(last), step.texts[child], depth, fate))
            grow(child, guide + ("   " if last else "│  "), depth + 1)

    grow(0, "", 1)
    return lines


def depths(parents: Sequence[int]) -> list[int]:
    """Depth of each node of a tree; parents come first."""
    found: list[int] = []
    for parent in parents:
        found.append(0 if parent < 0 else found[parent] + 1)
    return found


def _branch(last: bool) -> str:
    return "└─ " if last else "├─ "


def _sums(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    size = max(len(a), len(b))
    return tuple(
        sum(counts[index] for counts in (a, b) if index < len(counts)) for index in range(size)
    )
