"""The chat screen under a pilot, with a client that the test plays."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from textual.pilot import Pilot

from engine.client import Update
from engine.config import JupiterConfig
from tests.tui.fake_client import CONFIG, FakeClient
from tui.app import JupiterApp
from tui.screens.chat import ChatScreen
from tui.widgets.prompt import Prompt

DEADLINE_S = 10.0


class Chat:
    """An app that runs, and the clients it has made: one for each launch."""

    def __init__(self) -> None:
        self.clients: list[FakeClient] = []
        self.app = JupiterApp(CONFIG, self._make_client)
        self.pilot: Pilot[int]

    def _make_client(self, config: JupiterConfig, listener: Callable[[Update], None]) -> FakeClient:
        self.clients.append(FakeClient(config, listener))
        return self.clients[-1]

    @property
    def client(self) -> FakeClient:
        return self.clients[-1]

    @property
    def screen(self) -> ChatScreen:
        screen = self.app.screen_stack[0]
        assert isinstance(screen, ChatScreen)
        return screen

    @property
    def prompt(self) -> Prompt:
        return self.screen.query_one(Prompt)

    async def until(self, condition: Callable[[], object]) -> None:
        """Let messages be handled until `condition` holds."""
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                if self.app._exception is not None:
                    raise self.app._exception
                await self.pilot.pause(0)

    async def ready(self) -> None:
        """The engine gets ready."""
        self.client.get_ready()
        await self.until(lambda: self.screen.snapshot.phase == "ready")

    async def ask(self, text: str) -> None:
        """Send a prompt and wait until the engine has it."""
        asked = len(self.client.asked)
        self.prompt.load_text(text)
        await self.pilot.press("enter")
        await self.until(lambda: len(self.client.asked) > asked)

    async def answered(self) -> None:
        """Wait until nothing is being answered."""
        await self.until(lambda: self.screen.running is None)

    async def answer(self, prompt: str, text: str) -> None:
        """A whole exchange."""
        await self.ask(prompt)
        self.client.started()
        self.client.tokens(text)
        self.client.finish()
        await self.answered()

    async def shows(self, text: str) -> None:
        """Wait until `text` is on the screen."""
        await self.until(lambda: text in self.shown())

    def shown(self) -> str:
        """The text on the screen, line by line."""
        screen = self.app.screen
        lines = screen._compositor.render_strips(screen.size)
        return "\n".join(strip.text.rstrip() for strip in lines)

    def notes(self) -> list[str]:
        """The quiet words under the answers that have some."""
        from tui.widgets.turn_bar import TurnBar

        return [bar.note[0] for bar in self.screen.query(TurnBar) if bar.note[0]]


@asynccontextmanager
async def open_chat(size: tuple[int, int] = (80, 24)) -> AsyncIterator[Chat]:
    """A chat whose engine is starting."""
    chat = Chat()
    async with chat.app.run_test(size=size, notifications=True) as pilot:
        chat.pilot = pilot
        await chat.until(lambda: chat.clients)
        yield chat
