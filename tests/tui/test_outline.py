"""Outline answers in the chat: points that fill in side by side, then one answer."""

from __future__ import annotations

import pytest

from engine.continuity import AnswerStream
from engine.protocol import Finished, Generate, Metrics, Started, Tokens, Transcript
from tests.tui.chat import Chat, open_chat
from tui.outline import Growing, Point
from tui.widgets.outline_board import OutlineBoard, PointCard
from tui.widgets.settings import Settings

TEXT = "Two tips:\n\n1. **Sleep**: Go to bed early.\n\n2. **Eat Well**: Some greens."


async def half_way(chat: Chat) -> None:
    """An outline answer of which one point is done and the other grows."""
    await chat.pilot.press("f10")
    await chat.ask("Give me two tips")
    chat.client.started()
    chat.client.tokens("Two tips:\n\n")
    chat.client.tokens("1. **Sleep**:", 5, point=1)
    chat.client.tokens("\n\n2. **Eat Well**:", 6, point=2)
    chat.client.tokens(" Go to bed", 3, point=1)
    chat.client.tokens(" Some", point=2)
    chat.client.tokens(" early.", 2, point=1)
    chat.client.tokens("", 0, point=1, ended=True)
    await chat.shows("Go to bed early.")


@pytest.mark.parametrize("size", [(80, 24), (120, 36)])
async def test_points_grow_side_by_side_and_become_one_answer(size: tuple[int, int]) -> None:
    async with open_chat(size) as chat:
        await chat.ready()
        await half_way(chat)
        assert chat.client.requests[-1].params.mode == "outline"
        assert not chat.client.requests[-1].trace
        cards = chat.screen.query(PointCard)
        assert [card.has_class("-done") for card in cards] == [True, False]
        beside = cards.first().region.y == cards.last().region.y
        assert beside == (size[0] == 120)
        for text in ("Sleep", "✓ 10 tokens", "Eat Well", "… 7 tokens", "Some", "Two tips:"):
            await chat.shows(text)
        chat.client.tokens(" greens.", 2, point=2)
        chat.client.finish(transcript=Transcript("whole", (1, 2)))
        await chat.answered()
        assert not chat.screen.query(OutlineBoard)
        node = chat.screen.conversation.path()[-1]
        assert (node.text, node.token_ids) == (TEXT, [])
        await chat.shows("Eat Well: Some greens.")
        await chat.ask("And now?")
        assert chat.client.asked[-1][1].content == TEXT
        assert chat.client.requests[-1].transcript == Transcript("whole", (1, 2))


async def test_a_stopped_outline_keeps_what_it_has_and_is_not_gone_on_with() -> None:
    async with open_chat() as chat:
        await chat.ready()
        await half_way(chat)
        await chat.pilot.press("escape")
        assert chat.client.cancelled
        chat.client.finish("cancelled")
        await chat.answered()
        node = chat.screen.conversation.path()[-1]
        assert node.text == TEXT.removesuffix(" greens.")
        assert not chat.screen.conversation.can_continue(node, node.model)
        await chat.shows("2. Eat Well: Some")


async def test_a_branch_that_is_left_and_come_back_to_goes_on_growing() -> None:
    async with open_chat((120, 36)) as chat:
        await chat.ready()
        await half_way(chat)
        turn = chat.screen.view.turns[-1]
        await turn.remove()
        await chat.screen._show_branch()
        await chat.until(lambda: len(chat.screen.query(PointCard)) == 2)
        chat.client.tokens(" greens.", 2, point=2)
        await chat.shows("Some greens.")
        chat.client.finish()
        await chat.answered()
        await chat.shows("2. Eat Well: Some greens.")
        lines = [line for line in chat.shown().splitlines() if "Two tips:" in line]
        assert len(lines) == 1


async def test_the_key_and_the_settings_are_one_choice() -> None:
    async with open_chat((120, 36)) as chat:
        await chat.ready()
        await chat.pilot.press("f10")
        assert chat.prompt.border_subtitle == "outline"
        await chat.pilot.press("ctrl+o")
        box = chat.screen.query_one(Settings).query_one("#set-mode")
        assert box.value  # type: ignore[attr-defined]
        box.value = False  # type: ignore[attr-defined]
        await chat.until(lambda: chat.screen.conversation.params.mode == "plain")
        assert not chat.prompt.border_subtitle


def test_points_are_titles_and_texts() -> None:
    growing = Growing()
    for point, text in ((0, "So:\n\n"), (2, "\n\n- **B b**:"), (1, "- **A**:"), (2, " of **b**:")):
        growing.add(Tokens(request_id="a", token_ids=(1,), text=text, point=point))
    assert growing.opening == "So:\n\n"
    assert growing.points == (Point("- A", "", 1, False), Point("- B b", "of **b**:", 2, False))


def test_another_engine_writes_the_points_again_and_only_what_is_new_is_shown() -> None:
    def tokens(text: str, point: int) -> Tokens:
        return Tokens(request_id="a", token_ids=(len(text),), text=text, point=point)

    stream = AnswerStream(Generate(request_id="a", prompt="x"))
    stream.part(Started(request_id="a", prompt_tokens=1, cached_tokens=0))
    for text, point in (("So:", 0), ("1. **A**:", 1), (" aa", 1)):
        stream.part(tokens(text, point))
    stream.held = True
    stream.part(
        Finished(
            request_id="a", finish_reason="cancelled", context_full=False, prompt_tokens=1,
            cached_tokens=0, completion_tokens=3, metrics=Metrics(),
        )
    )  # fmt: skip
    assert stream.continuation().answered == (3,)
    for text, point in (("1. **A**:", 1), (" a", 1), ("aa", 1), ("2. **B**:", 2)):
        stream.part(tokens(text, point))
    shown = [(e.text, e.point) for e in stream._events if isinstance(e, Tokens)]
    assert shown == [("So:", 0), ("1. **A**:", 1), (" aa", 1), ("a", 1), ("2. **B**:", 2)]
