"""Around the conversation: the start, the prompt, the figures, help, palette and themes."""

from __future__ import annotations

import pytest
from textual import events
from textual.widgets import Footer, Markdown

from engine.protocol import Message, StageState
from tests.tui.chat import Chat, open_chat
from tui.modes import MODES
from tui.widgets.bars import StatusLine, TitleBar

SIZES = [(80, 24), (120, 36), (200, 60)]


def commands(chat: Chat) -> set[str]:
    return {command.title for command in chat.app.get_system_commands(chat.app.screen)}


async def test_the_start_shows_each_stage_with_its_progress() -> None:
    async with open_chat(size=(120, 36)) as chat:
        loading = StageState(
            phase="loading", first_layer=0, num_layers=15, done=92, total=137, pid=4242
        )
        chat.client.stage(0, loading)
        await chat.shows("92/137 tensors")
        first, second = (line for line in chat.shown().splitlines() if "layers" in line)
        assert "stage 0  layers 0–14" in first
        assert "loading" in first and "pid 4242" in first and "━" in first
        assert "stage 1  layers 15–29" in second
        assert "waiting" in second and "pid" not in second and "━" not in second


async def test_a_fetch_is_told_line_by_line() -> None:
    async with open_chat() as chat:
        chat.client.fetching("12 of 92 MB")
        await chat.shows("12 of 92 MB")


async def test_the_start_becomes_one_quiet_line_when_the_engine_is_ready() -> None:
    async with open_chat(size=(120, 36)) as chat:
        await chat.ready()
        await chat.shows("ready in")
        assert "tensors" not in chat.shown()
        await chat.shows("SmolLM2-135M-Instruct · float32 · cpu")


async def test_figures_are_unknown_first_and_measured_after_an_answer() -> None:
    async with open_chat() as chat:
        await chat.ready()
        await chat.shows("first token n/a  n/a tok/s  n/a tok/step  15|15")
        await chat.answer("Hello", "Hi!")
        await chat.until(
            lambda: (
                "first token 0.21 s  24.5 tok/s  1.00 tok/step  15|15  34 new, 0 cached"
                in chat.shown()
            )
        )


async def test_ctrl_j_makes_a_new_line_and_the_prompt_grows() -> None:
    async with open_chat() as chat:
        await chat.ready()
        height = chat.prompt.outer_size.height
        await chat.pilot.press("a", "ctrl+j", "b")
        await chat.until(lambda: chat.prompt.outer_size.height == height + 1)
        await chat.pilot.press("enter")
        await chat.until(lambda: chat.client.asked)
        assert chat.client.asked == [(Message("user", "a\nb"),)]
        await chat.until(lambda: chat.prompt.outer_size.height == height)


async def test_a_pasted_text_of_many_lines_stays_one_prompt() -> None:
    async with open_chat() as chat:
        await chat.ready()
        pasted = "\r\n".join(f"line {n} \x1b[31m" for n in range(30))
        chat.app.post_message(events.Paste(pasted))
        await chat.until(lambda: "line 29" in chat.prompt.text)
        assert chat.client.asked == []
        assert chat.prompt.outer_size.height <= 10
        await chat.pilot.press("enter")
        await chat.until(lambda: chat.client.asked)
        sent = chat.client.asked[0][0].content
        assert sent == "\n".join(f"line {n} ␛[31m" for n in range(30))


async def test_a_blank_prompt_is_not_sent() -> None:
    async with open_chat() as chat:
        await chat.ready()
        await chat.pilot.press("space", "ctrl+j", "enter")
        await chat.answer("real", "yes")
        assert chat.client.asked == [(Message("user", "real"),)]


@pytest.mark.parametrize("key", ["question_mark", "f1"])
async def test_help_tells_keys_ids_and_what_the_screen_shows_and_closes_again(key: str) -> None:
    async with open_chat() as chat:
        await chat.pilot.press(key)
        await chat.shows("Help: Chat")
        assert "chat.new" in chat.shown() and "^n" in chat.shown()
        help_screen = chat.app.screen
        assert "tok/step" in help_screen.query_one(Markdown).source
        await chat.pilot.press("escape")
        await chat.until(lambda: chat.app.screen is chat.screen)
        assert chat.prompt.text == ""


async def test_help_is_that_of_the_screen_it_is_opened_on() -> None:
    async with open_chat(size=(120, 36)) as chat:
        await chat.pilot.press("f4", "f1")
        await chat.shows("Help: Telemetry")
        assert "telemetry." in chat.shown() and "chat.new" not in chat.shown()


async def test_a_question_mark_in_a_prompt_is_a_letter() -> None:
    async with open_chat() as chat:
        await chat.pilot.press("w", "h", "y", "question_mark")
        await chat.until(lambda: chat.prompt.text == "why?")
        assert chat.app.screen is chat.screen


async def test_the_palette_offers_only_what_the_state_allows() -> None:
    async with open_chat() as chat:
        assert not {"Stop", "Restart engine"} & commands(chat)
        await chat.ready()
        await chat.ask("Hello")
        assert "Stop" in commands(chat)
        chat.client.die("gone")
        await chat.until(lambda: chat.screen.snapshot.phase == "failed")
        await chat.answered()
        assert "Stop" not in commands(chat)
        assert "Restart engine" in commands(chat)


async def test_each_main_screen_is_one_key_away_and_knows_the_engine() -> None:
    async with open_chat(size=(120, 36)) as chat:
        await chat.ready()
        for mode in reversed(MODES):
            await chat.pilot.press(mode.key)
            await chat.until(lambda name=mode.name: chat.app.current_mode == name)
            screen = chat.app.screen
            assert screen.id == mode.name
            await chat.until(lambda screen=screen: "● ready" in chat.shown())
            assert screen.query_one(TitleBar).region.y == 0
            assert screen.query_one(Footer).region.bottom == 36


async def test_a_screen_that_is_not_shown_hears_of_the_engine_too() -> None:
    async with open_chat() as chat:
        await chat.pilot.press("f4")
        await chat.pilot.press("f2")
        chat.client.get_ready()
        await chat.shows("● ready")
        await chat.pilot.press("f4")
        await chat.shows("● ready")


async def test_every_screen_tells_that_an_answer_runs() -> None:
    async with open_chat() as chat:
        await chat.ready()
        await chat.ask("Hello")
        await chat.pilot.press("f3")
        await chat.shows("● answering")
        chat.client.started()
        chat.client.finish()
        await chat.shows("● ready")


async def test_a_click_on_a_name_in_the_title_opens_the_screen() -> None:
    async with open_chat() as chat:
        column = chat.shown().splitlines()[0].index("Telemetry")
        await chat.pilot.click(TitleBar, offset=(column, 0))
        await chat.until(lambda: chat.app.current_mode == "telemetry")
        column = chat.shown().splitlines()[0].index("Help")
        await chat.pilot.click(TitleBar, offset=(column, 0))
        await chat.shows("Help: Telemetry")


async def test_the_palette_opens_another_screen() -> None:
    async with open_chat() as chat:
        await chat.pilot.press("ctrl+p", *"tele")
        await chat.shows("What every stage does right now")
        await chat.pilot.press("enter")
        await chat.until(lambda: chat.app.current_mode == "telemetry")


async def test_light_and_dark_are_one_key_apart() -> None:
    async with open_chat() as chat:
        assert chat.app.current_theme.dark
        await chat.pilot.press("ctrl+t")
        assert not chat.app.current_theme.dark
        await chat.pilot.press("ctrl+t")
        assert chat.app.current_theme.dark


@pytest.mark.parametrize("size", SIZES)
async def test_every_size_shows_all_parts_and_nothing_overlaps(size: tuple[int, int]) -> None:
    async with open_chat(size=size) as chat:
        await chat.ready()
        await chat.answer("Hello", "word " * 400)
        parts = [
            chat.screen.query_one(TitleBar),
            chat.screen.query_one("#scroll"),
            chat.prompt,
            chat.screen.query_one(StatusLine),
            chat.screen.query_one("Footer"),
        ]
        top = 0
        for part in parts:
            assert part.region.y >= top
            assert part.region in chat.screen.region
            top = part.region.bottom
        assert top == size[1]
        assert max(map(len, chat.shown().splitlines())) <= size[0]
        await chat.shows("34 new, 0 cached")
