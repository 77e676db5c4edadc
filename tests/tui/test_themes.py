"""Colours: the terminal's abilities, the user's choice, and a state folder that cannot keep it."""

from __future__ import annotations

from pathlib import Path

import pytest
from textual.command import CommandList

from tests.tui.chat import Chat, open_chat
from tui import preferences
from tui.themes import ANSI_DARK, ANSI_LIGHT, DARK, LIGHT, THEMES, colours, default_theme, partner


@pytest.mark.parametrize(
    ("environ", "theme"),
    [
        ({"TERM": "xterm-256color", "COLORTERM": "truecolor"}, DARK),
        ({"TERM": "xterm-256color"}, DARK),
        ({"TERM": "xterm-kitty"}, DARK),
        ({"TERM": "linux"}, ANSI_DARK),
        ({"TERM": "vt100"}, ANSI_DARK),
        ({}, ANSI_DARK),
    ],
)
def test_a_terminal_of_few_colours_gets_its_own(environ: dict[str, str], theme: object) -> None:
    assert default_theme(environ) == theme.name  # type: ignore[attr-defined]


@pytest.mark.parametrize("term", ["dumb", "vt100", "vt220", "xterm-m", ""])
def test_a_terminal_without_colours_is_known(term: str) -> None:
    assert colours({"TERM": term}) == 0


def test_light_and_dark_are_partners_among_their_own_kind() -> None:
    assert partner(DARK) == LIGHT.name and partner(LIGHT) == DARK.name
    assert partner(ANSI_DARK) == ANSI_LIGHT.name and partner(ANSI_LIGHT) == ANSI_DARK.name


async def test_a_chosen_theme_is_there_in_the_next_run() -> None:
    async with open_chat() as chat:
        await chat.pilot.press("ctrl+t")
        assert chat.app.theme == LIGHT.name
    async with open_chat() as chat:
        await chat.until(lambda: chat.app.theme == LIGHT.name)


def best_offer(chat: Chat) -> str:
    """The first command that the palette shows."""
    offers = chat.app.screen.query(CommandList)
    options = offers.first().options if offers else []
    return str(options[0].prompt) if options else ""


async def test_every_theme_is_offered_and_can_be_chosen() -> None:
    async with open_chat() as chat:
        for theme in THEMES:
            await chat.pilot.press("f12", *theme.name)
            await chat.until(lambda name=theme.name: best_offer(chat) == name)
            await chat.pilot.press("enter")
            await chat.until(lambda name=theme.name: chat.app.theme == name)
            await chat.until(lambda: chat.app.screen is chat.screen)


async def test_a_choice_that_cannot_be_kept_is_a_notice_and_holds_for_the_run(
    tmp_path: Path,
) -> None:
    async with open_chat() as chat:
        (preferences.preferences_file()).mkdir(parents=True)
        chat.app.choose_theme(LIGHT.name)
        assert chat.app.theme == LIGHT.name
        await chat.shows("The theme holds for this run")
        assert not list(preferences.preferences_file().parent.glob("*.new"))


@pytest.mark.parametrize("text", ["{", '{"theme": 3}', "\xff\x00"])
async def test_choices_that_cannot_be_read_are_a_notice(text: str) -> None:
    file = preferences.preferences_file()
    file.parent.mkdir(parents=True)
    file.write_text(text, encoding="latin-1")
    async with open_chat() as chat:
        await chat.shows("Your choices cannot be read")
        assert chat.app.theme == DARK.name


async def test_a_theme_that_is_not_known_any_more_is_passed_over() -> None:
    preferences.save(preferences.Preferences(theme="of-a-later-version"))
    async with open_chat() as chat:
        await chat.ready()
        assert chat.app.theme == DARK.name


async def test_no_color_leaves_no_colour_on_the_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    async with open_chat() as chat:
        await chat.ready()
        await chat.answer("Hello", "Some `code` and a list\n\n- a\n- b")
        for line in chat.app.screen._compositor.render_strips(chat.app.screen.size):
            for segment in line.apply_filter(chat.app._filters[-1], None):  # type: ignore[arg-type]
                style = segment.style
                assert style is None or (
                    (style.color is None or style.color.is_default)
                    and (style.bgcolor is None or style.bgcolor.is_default)
                )


async def test_a_terminal_without_colours_is_told_and_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "vt100")
    async with open_chat() as chat:
        await chat.shows("This terminal has no colours")
        await chat.ready()
        await chat.shows("● ready")
