"""`python -m tui.screenshot [FOLDER]`: the README's pictures, taken from a real run."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path

from textual.pilot import Pilot

from engine.config import load_config
from tui.app import JupiterApp
from tui.conversation import Ending
from tui.screens.chat import ChatScreen

SIZE = (100, 30)
QUESTION = "Write a Python function that reverses a string, and explain it in two sentences."


async def take(folder: Path) -> None:
    """Start the default engine, ask a question, save the answered chat as `chat.svg`."""
    app = JupiterApp(load_config(assignments=["temperature=0"]))
    async with app.run_test(size=SIZE) as pilot:
        chat = app.screen
        assert isinstance(chat, ChatScreen)
        await _until(pilot, lambda: chat.snapshot is not None and chat.snapshot.phase == "ready")
        for character in QUESTION:
            await pilot.press("space" if character == " " else character)
        await pilot.press("enter")
        talk = chat.conversation
        await _until(pilot, lambda: any(node.ending is Ending.STOP for node in talk.nodes))
        await pilot.pause()
        (folder / "chat.svg").write_text(app.export_screenshot(title="jupiter-tui"))
        await app.leave(0)


async def _until(pilot: Pilot[int], ready: Callable[[], bool]) -> None:
    while not ready():
        await pilot.pause(0.1)


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "screenshots")
    target.mkdir(exist_ok=True)
    asyncio.run(take(target))
