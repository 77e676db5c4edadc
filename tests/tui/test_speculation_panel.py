"""Speculation in the chat: answers as coloured tokens, the cursor over them, the panel."""

from __future__ import annotations

import msgspec
import pytest
from textual.widgets import Static

from engine.protocol import Metrics, StepTrace, Tokens
from tests.tui.chat import Chat, open_chat
from tests.tui.fake_client import CHOSEN, OPTIONS, READY
from tests.tui.test_speculation import FIRST, NOTHING_ACCEPTED, STEP
from tui.widgets.speculation import SpeculationPanel
from tui.widgets.token_text import TokenText
from tui.widgets.turn import AnswerMarkdown

WIDE = (150, 40)
SENTENCE = "The cat ran away."
WITH_HEADS = msgspec.structs.replace(READY, medusa_num_heads=5, tree_size=6)


def send(chat: Chat, *steps: StepTrace) -> None:
    for step in steps:
        text = "".join(step.pieces)
        ids = tuple(range(len(step.pieces)))
        name = chat.client.request.request_id
        chat.client.request.put(Tokens(request_id=name, token_ids=ids, text=text, trace=(step,)))


def tokens_of(chat: Chat) -> TokenText:
    return chat.screen.query_one(TokenText)


def panel_of(chat: Chat) -> SpeculationPanel:
    return chat.screen.query_one(SpeculationPanel)


def panel_text(chat: Chat) -> str:
    return str(panel_of(chat).query_one("#acceptance", Static).content)


async def watch_an_answer(chat: Chat) -> None:
    """Switch speculation on and have a traced answer given."""
    chat.client.get_ready(WITH_HEADS)
    await chat.until(lambda: chat.screen.snapshot.phase == "ready")
    await chat.pilot.press("ctrl+s")
    await chat.ask("Go")
    send(chat, FIRST, STEP, NOTHING_ACCEPTED)
    await chat.shows(SENTENCE)
    chat.client.finish()
    await chat.answered()


async def test_a_trace_is_asked_for_only_while_speculation_is_shown() -> None:
    async with open_chat() as chat:
        await chat.ready()
        await chat.answer("one", "text")
        await chat.pilot.press("ctrl+s")
        await chat.answer("two", "text")
        await chat.pilot.press("ctrl+s")
        await chat.answer("three", "text")
        assert [request.trace for request in chat.client.requests] == [False, True, False]


@pytest.mark.parametrize("size", [WIDE, (80, 24)])
async def test_tokens_are_coloured_by_their_heads_and_the_latest_tree_is_shown(
    size: tuple[int, int],
) -> None:
    async with open_chat(size=size) as chat:
        await watch_an_answer(chat)
        colours = {}
        for segment in tokens_of(chat).render_line(0):
            assert segment.style is not None
            colours[segment.text] = (segment.style.color, segment.style.bgcolor)
        assert colours["The"] == colours[" away"] == colours["."]
        assert len({colours["The"], colours[" cat"], colours[" ran"]}) == 3
        await chat.shows("step 3/3: 1 token, 1 drafted")
        await chat.shows("└─ ·x")
        # Head 1: accepted in one of two steps; head 3 once proposed, never accepted; no head 4.
        lines = chat.shown().splitlines()
        rows = {n: next(line for line in lines if f"head {n}  " in line) for n in (1, 3, 4)}
        assert "50% 1/2" in rows[1]
        assert "0% 0/1" in rows[3]
        assert "n/a" in rows[4]
        assert "last 2 steps" in chat.shown()
        assert "2.00 tokens" in chat.shown()


async def test_the_cursor_shows_the_tree_of_its_token_by_keys() -> None:
    async with open_chat(size=WIDE) as chat:
        await watch_an_answer(chat)
        await chat.pilot.press("shift+tab")
        await chat.until(lambda: isinstance(chat.screen.focused, TokenText))
        await chat.pilot.press("left", "left")
        assert tokens_of(chat).cursor == 2
        await chat.shows("token 3/5 ·ran")
        await chat.shows("step 2/3: 3 tokens, 5 drafted")
        await chat.shows("│  │  └─ ·off")
        await chat.pilot.press("ctrl+left")
        await chat.shows("step 1/3: the first token")
        await chat.pilot.press("ctrl+right", "ctrl+right", "ctrl+right")
        assert tokens_of(chat).cursor == 4
        await chat.pilot.press("home", "left")
        assert tokens_of(chat).cursor == 0
        await chat.pilot.press("end")
        assert tokens_of(chat).cursor is None
        await chat.shows("latest step")
        await chat.pilot.press("left", "escape")
        assert chat.screen.focused is chat.prompt


async def test_a_click_moves_the_cursor_to_its_token() -> None:
    async with open_chat(size=WIDE) as chat:
        await watch_an_answer(chat)
        text = tokens_of(chat)
        left = text.gutter.left
        await chat.pilot.click(text, offset=(left + SENTENCE.index("away"), 0))
        await chat.shows("token 4/5 ·away")
        await chat.pilot.click(text, offset=(left + SENTENCE.index("cat"), 0))
        await chat.shows("token 2/5 ·cat")


async def test_switching_back_shows_the_markdown_and_again_the_same_tokens() -> None:
    async with open_chat(size=WIDE) as chat:
        await watch_an_answer(chat)
        markdown = chat.screen.query_one(AnswerMarkdown)
        assert not markdown.display
        await chat.pilot.press("shift+tab", "left", "ctrl+s")
        await chat.until(lambda: not chat.screen.query(TokenText))
        assert markdown.display
        assert markdown.source == SENTENCE
        assert not panel_of(chat).display
        assert chat.screen.focused is chat.prompt
        await chat.answer("plain", "Unknown.")
        await chat.pilot.press("ctrl+s")
        await chat.until(lambda: chat.screen.query(TokenText))
        assert len(chat.screen.query(TokenText)) == 1
        assert [m.display for m in chat.screen.query(AnswerMarkdown)] == [False, True]


async def test_untraced_answers_count_for_the_conversation_and_another_one_starts_at_nothing() -> (
    None
):
    metrics = Metrics(
        decode_steps=8,
        mean_accepted_len=1.5,
        proposed_per_head=(8, 8),
        accepted_per_head=(4, 0),
    )
    async with open_chat(size=WIDE) as chat:
        await chat.ready()
        await chat.ask("plain")
        chat.client.tokens("text")
        chat.client.finish(metrics=metrics)
        await chat.answered()
        await chat.pilot.press("ctrl+s")
        await chat.shows("50% 4/8")
        await chat.shows("1.50 tokens")
        await chat.shows("No step was traced yet")
        await chat.pilot.press("ctrl+n")
        await chat.until(lambda: "4/8" not in chat.shown())
        await chat.shows("n/a")


async def test_an_engine_without_heads_is_said_to_have_none() -> None:
    async with open_chat(size=WIDE) as chat:
        await chat.ready()
        await chat.pilot.press("ctrl+s")
        await chat.shows("the model: no heads")
        await chat.ask("Go")
        send(chat, FIRST)
        await chat.shows("step 1/1: the first token")
        assert "head 1" not in chat.shown()


async def test_a_tuned_tree_is_told_with_the_speeds_it_was_weighed_by() -> None:
    tuned = msgspec.structs.replace(WITH_HEADS, tree_tuned=True)
    async with open_chat(size=WIDE) as chat:
        chat.client.get_ready(tuned)
        await chat.shows("5 heads, tuned tree")
        await chat.pilot.press("ctrl+s")
        await chat.until(lambda: panel_of(chat).display)
        assert "tok/s" not in panel_text(chat)
        chat.client.event(CHOSEN)
        await chat.shows("8 nodes, 1.83 tokens in 30 ms")
        await chat.shows("1:50 8:61 64:21")
        plain = msgspec.structs.replace(CHOSEN, nodes=1, depth=0, chosen=OPTIONS[0])
        chat.client.event(plain)
        await chat.shows("no drafts, 1.00 tokens in 20 ms")


async def test_a_long_answer_is_followed_until_the_cursor_is_moved_up() -> None:
    lines = [StepTrace(next_text="x", pieces=(f"line {n}\n",)) for n in range(60)]
    async with open_chat(size=WIDE) as chat:
        await chat.ready()
        await chat.pilot.press("ctrl+s")
        await chat.ask("Go")
        send(chat, *lines[:40])
        await chat.shows("line 39")
        tokens_of(chat).focus()
        await chat.pilot.press("home")
        await chat.shows("line 0")
        send(chat, *lines[40:])
        await chat.until(lambda: len(tokens_of(chat).trace.tokens) == 60)
        await chat.pilot.pause()
        assert "line 0" in chat.shown()
        assert "line 59" not in chat.shown()
        await chat.pilot.press("end", "ctrl+end")
        await chat.pilot.press("escape", "ctrl+end")
        await chat.shows("line 59")
