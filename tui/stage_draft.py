"""The stage editor's draft: a split that differs from the live one until it is applied. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class StageDraft:
    """Layers per stage as drafted and as live; every edit gives a new draft.

    No edit changes the number of layers, and every stage keeps at least one. An edit that is not
    possible gives the draft as it was.
    """

    live: tuple[int, ...]
    split: tuple[int, ...]
    chosen: int = 0
    """The stage that keys act on."""

    @classmethod
    def of(cls, live: tuple[int, ...]) -> StageDraft:
        """A draft without changes."""
        return cls(live, live)

    @property
    def changed(self) -> bool:
        """Whether there is something to apply."""
        return self.split != self.live

    @property
    def layers(self) -> int:
        """Of the whole model."""
        return sum(self.split)

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Layers before each boundary; boundary i lies behind stage i."""
        return tuple(sum(self.split[: i + 1]) for i in range(len(self.split) - 1))

    def choose(self, stage: int) -> StageDraft:
        """Act on another stage; beyond either end it is the last one there."""
        return replace(self, chosen=min(max(stage, 0), len(self.split) - 1))

    def move(self, boundary: int, to: int) -> StageDraft:
        """Put a boundary where `to` layers are before it, as far as both neighbours allow."""
        if not 0 <= boundary < len(self.split) - 1:
            return self
        before = sum(self.split[:boundary])
        both = self.split[boundary] + self.split[boundary + 1]
        left = min(max(to - before, 1), both - 1)
        return self._with(
            (*self.split[:boundary], left, both - left, *self.split[boundary + 2 :]), self.chosen
        )

    def grow(self, layers: int) -> StageDraft:
        """So many layers more (or fewer) on the chosen stage, from the one behind it.

        The last stage deals with the one before it.
        """
        if self.chosen < len(self.split) - 1:
            return self.move(self.chosen, self.boundaries[self.chosen] + layers)
        if self.chosen > 0:
            return self.move(self.chosen - 1, self.boundaries[self.chosen - 1] - layers)
        return self

    @property
    def can_add(self) -> bool:
        """The chosen stage has layers to share."""
        return self.split[self.chosen] > 1

    def add(self) -> StageDraft:
        """Cut the chosen stage in two; the new one comes behind it."""
        if not self.can_add:
            return self
        count = self.split[self.chosen]
        halves = (count - count // 2, count // 2)
        split = (*self.split[: self.chosen], *halves, *self.split[self.chosen + 1 :])
        return self._with(split, self.chosen + 1)

    @property
    def can_remove(self) -> bool:
        """There is another stage to take the layers."""
        return len(self.split) > 1

    def remove(self) -> StageDraft:
        """Take the chosen stage away; its neighbours share its layers."""
        if not self.can_remove:
            return self
        before, count = list(self.split[: self.chosen]), self.split[self.chosen]
        behind = list(self.split[self.chosen + 1 :])
        to_left = 0 if not before else count if not behind else count - count // 2
        if before:
            before[-1] += to_left
        if behind:
            behind[0] += count - to_left
        return self._with((*before, *behind), self.chosen)

    def even(self) -> StageDraft:
        """The same number of stages, as equal as can be; the first ones have one layer more."""
        each, more = divmod(self.layers, len(self.split))
        stages = range(len(self.split))
        return self._with(tuple(each + (stage < more) for stage in stages), self.chosen)

    def take(self, split: tuple[int, ...]) -> StageDraft:
        """A split of the same model from elsewhere; another model's gives the draft as it was."""
        return self._with(split, self.chosen) if sum(split) == self.layers else self

    def revert(self) -> StageDraft:
        """Back to the live split."""
        return self._with(self.live, self.chosen)

    def follow(self, live: tuple[int, ...]) -> StageDraft:
        """The engine runs `live` now; a changed draft stays, unless it is of another model."""
        if live == self.live:
            return self
        kept = self.changed and sum(live) == self.layers
        return replace(self, live=live)._with(self.split if kept else live, self.chosen)

    def _with(self, split: tuple[int, ...], chosen: int) -> StageDraft:
        return replace(self, split=split).choose(chosen)
