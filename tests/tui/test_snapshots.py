"""What the screens look like, compared with pictures that a person has looked at.

After a change that is meant: `pytest tests/tui/test_snapshots.py --snapshot-update`, and look.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from textual.pilot import Pilot

from tests.tui.chat import Chat
from tui.themes import ANSI_DARK, LIGHT

SIZES = [(80, 24), (120, 36)]
ANSWER = """A **stage** holds some layers.

1. One has the *embedding*
2. One has the `lm_head`
   - and the heads

```python
def reverse(text: str) -> str:
    return text[::-1]  # by a slice
```

| stage | layers |
|---|---|
| 0 | 15 |
"""


def name(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


@pytest.fixture
def looks_the_same(
    snap_compare: Callable[..., bool], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., bool]:
    """Compares a workbench, after what is done in it, with its picture of the same test."""
    # The only figure on these screens that a clock tells.
    monkeypatch.setattr("tui.widgets.launch.ready_line", lambda snapshot: snapshot.model)

    def compare(size: tuple[int, int], do: Callable[[Chat], Awaitable[None]]) -> bool:
        chat = Chat()

        async def before(pilot: Pilot[int]) -> None:
            chat.pilot = pilot
            await chat.until(lambda: chat.clients)
            chat.prompt.cursor_blink = False
            await chat.ready()
            await do(chat)
            await pilot.pause()

        return snap_compare(chat.app, terminal_size=size, run_before=before)

    return compare


@pytest.mark.parametrize("size", SIZES, ids=name)
def test_chat(looks_the_same: Any, size: tuple[int, int]) -> None:
    async def answer(chat: Chat) -> None:
        await chat.answer("What is a stage?", ANSWER)
        await chat.shows("34 new, 0 cached")

    assert looks_the_same(size, answer)


@pytest.mark.parametrize("theme", [LIGHT.name, ANSI_DARK.name])
def test_chat_in_other_colours(looks_the_same: Any, theme: str) -> None:
    async def answer(chat: Chat) -> None:
        chat.app.theme = theme
        await chat.answer("What is a stage?", ANSWER)
        await chat.shows("34 new, 0 cached")

    assert looks_the_same((80, 24), answer)


@pytest.mark.parametrize("size", SIZES, ids=name)
def test_help(looks_the_same: Any, size: tuple[int, int]) -> None:
    async def ask_for_help(chat: Chat) -> None:
        await chat.pilot.press("f1")
        await chat.shows("Help: Chat")

    assert looks_the_same(size, ask_for_help)


@pytest.mark.parametrize("size", SIZES, ids=name)
def test_training_form(looks_the_same: Any, size: tuple[int, int]) -> None:
    async def open_form(chat: Chat) -> None:
        await chat.pilot.press("f5")
        await chat.shows("dataset")
        chat.app.screen.set_focus(None)

    assert looks_the_same(size, open_form)
