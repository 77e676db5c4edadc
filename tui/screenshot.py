"""`python -m tui.screenshot [FOLDER]`: the README's pictures of every screen, from a real run.

The default engine answers, the answers train Medusa heads for a minute, and each screen is saved as
it is then. Nothing shown is made up; so the figures are those of the machine it runs on.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from textual.pilot import Pilot

from engine.config import JupiterConfig, load_config
from engine.errors import ExitCode
from tui.app import JupiterApp
from tui.conversation import Ending
from tui.screens.training import TrainingScreen
from tui.widgets.timeline import TimelineView
from tui.widgets.training_form import TrainingForm

SIZE = (120, 36)
WAIT_S = 300.0
FIRST = "What is a lookup table? Answer in one paragraph."
SECOND = "Write a Python function that reverses a string, and explain it in two sentences."
LIST = "List six ways to save water at home."
TRAINING = {
    "medusa_num_heads": "3",
    "global_batch_size": "2",
    "max_length": "192",
    "train_iters": "24",
    "log_interval": "1",
    "split_dataset_ratio": "0",
}


class Photographer:
    """Drives the workbench by its keys and saves what it shows."""

    def __init__(self, app: JupiterApp, pilot: Pilot[int], folder: Path) -> None:
        self._app, self._pilot, self._folder = app, pilot, folder

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait for what has to be seen first."""
        async with asyncio.timeout(WAIT_S):
            while not condition():
                await self._pilot.pause(0.1)

    async def press(self, *keys: str) -> None:
        """Press keys, and let the screen follow."""
        await self._pilot.press(*keys)
        await self._pilot.pause(0.5)

    async def ask(self, question: str) -> None:
        """Type a question and wait for the end of its answer."""
        ended = self._answered()
        await self.type(question)
        await self.until(lambda: self._answered() > ended)
        await self._pilot.pause(0.5)

    async def type(self, question: str) -> None:
        """Type a question and send it off."""
        await self.press(*("space" if letter == " " else letter for letter in question), "enter")

    def save(self, name: str) -> None:
        """Write what is shown as `name`.svg."""
        picture = self._app.export_screenshot(title="jupiter-tui")
        (self._folder / f"{name}.svg").write_text(picture, encoding="utf-8")

    def rows(self) -> list[dict[str, str]]:
        """The conversation so far as training data: the model's own answers."""
        path = self._app.chat.conversation.path()
        return [
            {"query": prompt.text, "response": answer.text}
            for prompt, answer in zip(path[::2], path[1::2], strict=False)
        ]

    def _answered(self) -> int:
        nodes = self._app.chat.conversation.nodes
        return sum(node.ending is Ending.STOP for node in nodes)


async def take(config: JupiterConfig, folder: Path, scratch: Path) -> None:
    """Save a picture of every screen in `folder`; what the run leaves behind goes to `scratch`."""
    app = JupiterApp(config)
    async with app.run_test(size=SIZE) as pilot:
        camera = Photographer(app, pilot, folder)
        await camera.until(lambda: app.session.snapshot.phase == "ready")
        await camera.ask(FIRST)
        await camera.ask(SECOND)
        camera.save("chat")
        await camera.press("ctrl+s")
        await camera.ask("Now the same in one line.")
        camera.save("speculation")
        await camera.press("ctrl+s")
        rows = camera.rows()
        await camera.press("ctrl+n")  # behind other turns the model writes no list
        await outline(app, camera)
        await camera.press("f4")
        camera.save("telemetry")
        await camera.press("f3", "right", "up", "up", "up")
        camera.save("stages")
        await camera.press("f1")
        camera.save("help")
        await camera.press("escape", "f5")
        await train(app, camera, rows, scratch)
        camera.save("training")
        await app.leave(ExitCode.OK)


async def outline(app: JupiterApp, camera: Photographer) -> None:
    """Save a list whose points grow side by side, and what the stages did meanwhile."""
    await camera.press("f10")
    await camera.type(LIST)
    await camera.until(lambda: app.screen.query("PointCard.-done"))
    camera.save("outline")
    await camera.press("f4", "t")
    await camera.until(lambda: "points at once" in str(app.screen.query_one(TimelineView).render()))
    camera.save("timeline")
    await camera.press("t", "f2")
    await camera.until(lambda: not app.screen.query("PointCard"))
    await camera.press("f10")


async def train(
    app: JupiterApp, camera: Photographer, rows: list[dict[str, str]], scratch: Path
) -> None:
    """Train heads on what was answered, until the run has ended."""
    screen = app.screen
    assert isinstance(screen, TrainingScreen)
    data = scratch / "answers.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows * 4), encoding="utf-8")
    model = app.session.config.base_model_name_or_path
    folders = {"model": model, "dataset": str(data), "save": str(scratch / "runs")}
    screen.query_one(TrainingForm).load(TRAINING | folders)
    await camera.press("ctrl+s")
    await camera.until(lambda: screen.training is not None and not screen.training.running)


def main() -> None:
    """Take the pictures with a state folder of their own."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "screenshots").absolute()
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="jupiter-") as scratch:
        os.environ |= {
            "JUPITER_STATE_DIR": scratch,
            "TERM": "xterm-256color",
            "COLORTERM": "truecolor",
        }
        config = load_config(assignments=["temperature=0"])
        os.chdir(scratch)  # so that no path of this machine is shown
        asyncio.run(take(config, folder, Path(scratch)))


if __name__ == "__main__":
    main()
