"""The chat as its user meets it."""

from __future__ import annotations

import pytest
from textual import events
from textual.containers import VerticalScroll

from engine.errors import CheckpointError, EngineError
from engine.protocol import Message, Notice
from tests.tui.chat import open_chat
from tui.widgets.turn import AnswerMarkdown


async def test_a_prompt_typed_while_the_engine_starts_is_sent_when_it_is_ready() -> None:
    async with open_chat() as chat:
        await chat.pilot.press(*"hi", "enter")
        await chat.until(lambda: chat.notes() == ["waits for the engine"])
        assert chat.client.asked == []
        await chat.ready()
        await chat.until(lambda: chat.client.asked)
        assert chat.client.asked == [(Message("user", "hi"),)]


async def test_keys_that_arrive_in_one_burst_are_sent_whole() -> None:
    async with open_chat() as chat:
        await chat.ready()
        for key in ("h", "i", "ctrl+j", "y", "o", "enter"):
            chat.app.post_message(events.Key(key, key if len(key) == 1 else None))
        await chat.until(lambda: chat.client.asked)
        assert chat.client.asked == [(Message("user", "hi\nyo"),)]


async def test_an_answer_streams_as_markdown_and_the_next_turn_sends_it_along() -> None:
    async with open_chat() as chat:
        await chat.ready()
        await chat.ask("Hello")
        chat.client.started(prompt_tokens=34)
        await chat.until(lambda: chat.notes() == ["reading 34 tokens"])
        chat.client.tokens("This is **bo")
        await chat.shows("This is **bo")
        chat.client.tokens("ld**.")
        await chat.shows("This is bold.")
        chat.client.finish()
        await chat.answered()
        assert chat.notes() == []
        await chat.ask("Again")
        assert [m.content for m in chat.client.asked[1]] == ["Hello", "This is **bold**.", "Again"]


async def test_escape_stops_the_answer_and_keeps_its_text() -> None:
    async with open_chat() as chat:
        await chat.ready()
        await chat.ask("Count")
        chat.client.tokens("one two")
        await chat.shows("one two")
        await chat.pilot.press("escape")
        assert chat.client.cancelled == [chat.client.request.request_id]
        chat.client.finish("cancelled")
        await chat.answered()
        await chat.shows("one two")
        assert chat.notes() == ["stopped"]


@pytest.mark.parametrize(
    ("context_full", "marker"), [(True, "context is full"), (False, "length limit")]
)
async def test_an_answer_that_was_cut_off_says_why(context_full: bool, marker: str) -> None:
    async with open_chat() as chat:
        await chat.ready()
        await chat.ask("Go")
        chat.client.tokens("on and on")
        chat.client.finish("length", context_full=context_full)
        await chat.answered()
        (note,) = chat.notes()
        assert marker in note


async def test_a_refused_prompt_is_explained_in_place_and_the_chat_goes_on() -> None:
    async with open_chat() as chat:
        await chat.ready()
        await chat.ask("far too long")
        chat.client.refuse("the prompt has 3012 tokens, the context holds 2048")
        await chat.answered()
        await chat.shows("the prompt has 3012 tokens")
        await chat.answer("short", "fine")
        assert chat.client.asked[1] == (Message("user", "short"),)
        await chat.shows("fine")


async def test_prompts_sent_during_an_answer_are_answered_in_turn() -> None:
    async with open_chat() as chat:
        await chat.ready()
        await chat.ask("first")
        await chat.pilot.press(*"next", "enter")
        await chat.until(lambda: "waits for the answer above" in chat.notes())
        assert len(chat.client.asked) == 1
        chat.client.tokens("done")
        chat.client.finish()
        await chat.until(lambda: len(chat.client.asked) == 2)
        assert [m.content for m in chat.client.asked[1]] == ["first", "done", "next"]


async def test_a_new_conversation_forgets_the_old_one_and_its_late_tokens() -> None:
    async with open_chat() as chat:
        await chat.ready()
        await chat.ask("old")
        old = chat.client.request
        chat.client.tokens("```\nold words")
        await chat.shows("old words")
        chat.client.tokens("\nmore old words")
        await chat.pilot.press("ctrl+n")
        assert chat.client.cancelled == [old.request_id]
        chat.client.tokens("late words")
        chat.client.finish("cancelled")
        await chat.answer("new", "fresh")
        assert chat.client.asked[-1] == (Message("user", "new"),)
        await chat.shows("fresh")
        assert "late words" not in chat.shown() and "old" not in chat.shown()


async def test_a_dead_engine_is_shown_with_its_last_lines_and_starts_again_by_a_key() -> None:
    async with open_chat() as chat:
        await chat.ready()
        await chat.ask("Hello")
        chat.client.tokens("Hi the")
        chat.client.die("stage 1 was killed by SIGKILL; the end of its log:\n  \x1b[31mlast words")
        await chat.answered()
        await chat.shows("The engine stopped")
        await chat.shows("stage 1 was killed by SIGKILL")
        await chat.shows("  last words")
        assert chat.notes() == ["cut off: the engine stopped"]
        await chat.pilot.press(*"go on", "enter", "ctrl+r")
        await chat.until(lambda: len(chat.clients) == 2)
        assert chat.clients[0].stops == 1
        await chat.ready()
        await chat.until(lambda: chat.client.asked)
        assert [m.content for m in chat.client.asked[0]] == ["Hello", "Hi the", "go on"]


async def test_an_engine_that_does_not_start_is_shown_in_place() -> None:
    async with open_chat() as chat:
        chat.client.fail_start(EngineError("stage 0 ended with exit code 1"))
        await chat.shows("The engine did not start")
        await chat.shows("stage 0 ended with exit code 1")
        await chat.shows("Ctrl+R")
        assert chat.app.is_running


async def test_input_that_no_key_can_mend_ends_the_run_with_its_exit_code() -> None:
    async with open_chat() as chat:
        error = CheckpointError("model.safetensors: truncated")
        chat.client.fail_start(error)
        await chat.until(lambda: chat.app._exit)
        assert chat.app.return_value == 2
        assert chat.app.session.error is error


@pytest.mark.parametrize("key", ["ctrl+q", "ctrl+c"])
async def test_quitting_stops_the_engine_first(key: str) -> None:
    async with open_chat() as chat:
        await chat.ready()
        seen: list[bool] = []
        stop = chat.client.stop

        async def watched_stop() -> None:
            await chat.shows("stopping the engine")
            seen.append(chat.app._exit)
            await stop()

        chat.client.stop = watched_stop  # type: ignore[method-assign]
        await chat.pilot.press(key)
        await chat.until(lambda: chat.app._exit)
        assert seen == [False]
        assert (chat.client.stops, chat.app.return_value) == (1, 0)


async def test_quitting_works_while_the_engine_starts() -> None:
    async with open_chat() as chat:
        await chat.pilot.press("ctrl+q")
        await chat.until(lambda: chat.app._exit)
        assert (chat.client.stops, chat.app.return_value) == (1, 0)


async def test_escape_sequences_of_the_model_are_shown_and_not_obeyed() -> None:
    async with open_chat() as chat:
        await chat.ready()
        await chat.answer("x", "before \x1b[2J\x1b]0;title\x07 after\n\n```\ncode\x1b[31m\n```\n")
        await chat.shows("before ␛[2J␛]0;title␇ after")
        assert "\x1b" not in chat.shown() and "\x07" not in chat.shown()


async def test_the_view_follows_the_answer_unless_the_user_has_scrolled_up() -> None:
    async with open_chat() as chat:
        await chat.ready()
        await chat.ask("Go")
        scroll = chat.screen.query_one("#scroll", VerticalScroll)
        chat.client.tokens("\n\n".join(f"line {n}" for n in range(40)))
        await chat.shows("line 39")
        await chat.pilot.press("pageup")
        await chat.until(lambda: "line 39" not in chat.shown())
        where = scroll.scroll_y
        chat.client.tokens("\n\n" + "\n\n".join(f"line {n}" for n in range(40, 60)))
        await chat.until(lambda: scroll.max_scroll_y > 90)
        assert scroll.scroll_y == where
        await chat.pilot.press("ctrl+end")
        await chat.shows("line 59")
        chat.client.tokens("\n\nline 60")
        await chat.shows("line 60")


async def test_a_streamed_answer_ends_up_like_the_same_text_at_once() -> None:
    text = (
        "# Title\n\nSome *text* here.\n\n1. one\n2. two\n   - deep\n\n"
        "```python\nx = 1\n\ny = 2\n```\n\n> quoted\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\nThe end."
    )
    async with open_chat(size=(80, 60)) as chat:
        await chat.ready()
        await chat.answer("whole", text)
        await chat.ask("in pieces")
        for start in range(0, len(text), 24):
            chat.client.tokens(text[start : start + 24])
            await chat.pilot.pause()
        chat.client.finish()
        await chat.answered()
        whole, streamed = (
            [(type(block), block.source) for block in markdown.children]
            for markdown in chat.screen.query(AnswerMarkdown)
        )
        assert streamed == whole


async def test_a_notice_of_a_stage_is_shown() -> None:
    async with open_chat() as chat:
        await chat.ready()
        chat.client.event(Notice("running without [heads]"), rank=1)
        await chat.shows("stage 1: running without [heads]")
