"""The log viewer under a pilot: it follows, lets go, searches, and goes over to the next file."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from textual.app import App
from textual.pilot import Pilot
from textual.widgets import Input

from tui.screens.log import LogScreen
from tui.widgets.log_view import LogView


class Viewer:
    """A log of fifty lines, and the screen that shows it."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "stderr.log"
        self.path.write_text("".join(f"line {n}\n" for n in range(50)))
        self.files = [self.path]
        self.app: App[None] = App()
        self.screen = LogScreen(lambda: self.files[-1], "stage 1")
        self.pilot: Pilot[None]

    @property
    def view(self) -> LogView:
        return self.screen.query_one(LogView)

    def write(self, text: str) -> None:
        with self.files[-1].open("a") as file:
            file.write(text)

    def shown(self) -> str:
        strips = self.app.screen._compositor.render_strips(self.app.screen.size)
        return "\n".join(strip.text.rstrip() for strip in strips)

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                await self.pilot.pause(0)

    async def shows(self, text: str) -> None:
        await self.until(lambda: text in self.shown())


@asynccontextmanager
async def open_log(folder: Path) -> AsyncIterator[Viewer]:
    viewer = Viewer(folder)
    async with viewer.app.run_test(size=(80, 24)) as pilot:
        viewer.app.animation_level = "none"
        viewer.pilot = pilot
        await viewer.app.push_screen(viewer.screen)
        await viewer.shows("line 49")
        yield viewer


async def test_the_end_is_shown_and_followed(tmp_path: Path) -> None:
    async with open_log(tmp_path) as viewer:
        assert "line 5\n" not in viewer.shown()
        assert "Log of stage 1" in viewer.shown() and "● following" in viewer.shown()
        viewer.write("".join(f"more {n}\n" for n in range(40)))
        await viewer.shows("more 39")
        await viewer.shows("90 lines")


async def test_scrolling_up_is_not_fought_and_the_end_is_one_key_away(tmp_path: Path) -> None:
    async with open_log(tmp_path) as viewer:
        await viewer.pilot.press("pageup")
        await viewer.shows("○ not following")
        top = viewer.view.scroll_offset.y
        viewer.write("more\n" * 30)
        await viewer.shows("80 lines")
        assert viewer.view.scroll_offset.y == top
        await viewer.pilot.press("f")
        await viewer.shows("● following")
        await viewer.until(lambda: viewer.view.is_vertical_scroll_end)
        await viewer.pilot.press("g")
        await viewer.shows("line 0")
        await viewer.pilot.press("G")
        await viewer.shows("● following")


async def test_search_finds_counts_and_goes_round(tmp_path: Path) -> None:
    async with open_log(tmp_path) as viewer:
        await viewer.pilot.press("g", "slash", *"Line", "enter")
        await viewer.shows("0 of 0 matches")
        await viewer.pilot.press("slash", *["backspace"] * 4, *"line", "space", "4", "enter")
        await viewer.shows("1 of 11 matches")  # 4, and 40 to 49
        assert viewer.view.current == 4
        await viewer.pilot.press("n")
        await viewer.shows("2 of 11 matches")
        await viewer.shows("line 40")
        await viewer.pilot.press("N", "N")
        await viewer.shows("11 of 11 matches")
        viewer.write("line 4000\n")
        await viewer.shows("11 of 12 matches")


async def test_escape_leaves_the_search_first_and_then_the_log(tmp_path: Path) -> None:
    async with open_log(tmp_path) as viewer:
        await viewer.pilot.press("slash", *"line")
        await viewer.shows("of 50 matches")
        await viewer.pilot.press("escape")
        await viewer.until(lambda: not viewer.screen.query_one(Input).display)
        assert viewer.view.found == [] and viewer.app.screen is viewer.screen
        await viewer.pilot.press("escape")
        await viewer.until(lambda: viewer.app.screen is not viewer.screen)


async def test_the_log_of_a_new_launch_is_gone_over_to(tmp_path: Path) -> None:
    async with open_log(tmp_path) as viewer:
        viewer.files.append(tmp_path / "next.log")
        viewer.write("a new beginning\n")
        await viewer.shows("a new beginning")
        assert "line 49" not in viewer.shown()


async def test_what_is_empty_or_missing_is_said(tmp_path: Path) -> None:
    async with open_log(tmp_path) as viewer:
        viewer.path.write_text("")
        await viewer.shows("The log is empty")
        viewer.files.append(Path("none.log"))
        await viewer.shows("none.log: No such file")


async def test_control_sequences_and_markup_are_only_text(tmp_path: Path) -> None:
    async with open_log(tmp_path) as viewer:
        viewer.write("[bold red]not bold[/] \x1b[31mnot red\x1b[0m \x1b]52;c;eA==\x07\ttab\n")
        await viewer.shows("[bold red]not bold[/] not red")
        assert "\x1b" not in viewer.shown() and "\t" not in viewer.shown()


async def test_older_lines_are_let_go_and_matches_move_along(tmp_path: Path) -> None:
    async with open_log(tmp_path) as viewer:
        view = viewer.view
        view.search("line 49")
        view.add([f"x{n}" for n in range(100_000 - 10)])
        assert len(view.lines) == 100_000
        assert [view.lines[n] for n in view.found] == ["line 49"]


async def test_a_long_line_is_scrolled_sideways(tmp_path: Path) -> None:
    async with open_log(tmp_path) as viewer:
        viewer.write("a" * 100 + "the end\n")
        await viewer.shows("aaa")
        await viewer.pilot.press(*["right"] * 40)
        await viewer.shows("the end")
