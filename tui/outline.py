"""An outline answer that is being given: its points as people see them. Free of Textual."""

from __future__ import annotations

from dataclasses import dataclass

from engine.decoding.outline import Parts
from engine.protocol import Tokens


@dataclass(frozen=True)
class Point:
    """One point at one moment."""

    title: str
    text: str
    tokens: int
    """Those of the title included."""
    done: bool

    @property
    def growing(self) -> bool:
        """Some of its text is there, and not all."""
        return bool(self.text) and not self.done


class Growing:
    """An answer as it grows, in the order in which it is read."""

    def __init__(self) -> None:
        self._parts = Parts()
        self._tokens: dict[int, int] = {}
        self._done: set[int] = set()

    def add(self, event: Tokens) -> None:
        """Take in what came."""
        point = event.point
        self._parts.add(point, event.text)
        self._tokens[point] = self._tokens.get(point, 0) + len(event.token_ids)
        if event.point_ended:
            self._done.add(point)

    @property
    def text(self) -> str:
        """All of the answer so far."""
        return self._parts.text

    @property
    def opening(self) -> str:
        """What comes before the points: all of an answer that has none."""
        return self._parts.texts.get(0, "")

    @property
    def points(self) -> tuple[Point, ...]:
        """The points in their order."""
        return tuple(self._point(number) for number in sorted(self._parts.texts) if number)

    def _point(self, number: int) -> Point:
        # "1. **a title**: text"; see engine.decoding.outline.
        title, _, text = self._parts.texts[number].strip().partition("**:")
        return Point(
            title=title.replace("**", ""),
            text=text.strip(),
            tokens=self._tokens[number],
            done=number in self._done,
        )
