"""Conversations as their user keeps them: saved, found, opened, renamed, deleted, exported."""

from __future__ import annotations

from pathlib import Path

import pytest
from textual.widgets import Button, Input

from engine.protocol import Message
from tests.tui.chat import Chat, open_chat
from tui.conversation import Conversation, Ending
from tui.screens.dialogs import AskLine, Confirm
from tui.store import ConversationStore

SIZES = [(80, 24), (120, 36)]


def stored(prompt: str, answer: str = "yes") -> Conversation:
    """A conversation of an earlier run."""
    talk = Conversation()
    node = talk.ask(prompt)
    node.text = answer
    talk.end(node, Ending.STOP)
    ConversationStore().save(talk)
    return talk


def titles() -> list[str]:
    return [entry.title for entry in ConversationStore().list().entries]


async def open_list(chat: Chat, count: int) -> None:
    """Open the list and wait until it has `count` conversations."""
    await chat.pilot.press("ctrl+b")
    await chat.until(lambda: chat.screen.sidebar.options.option_count == count)
    await chat.until(lambda: chat.screen.sidebar.options.has_focus or not count)


async def test_each_turn_is_saved_and_another_run_goes_on_with_it() -> None:
    async with open_chat() as chat:
        await chat.ready()
        await chat.answer("Hello", "Hi!")
    async with open_chat() as chat:
        await chat.ready()
        await open_list(chat, 1)
        await chat.pilot.press("enter")
        await chat.shows("Hi!")
        await chat.until(lambda: chat.prompt.has_focus)
        await chat.ask("And?")
        assert [m.content for m in chat.client.asked[0]] == ["Hello", "Hi!", "And?"]


async def test_a_prompt_is_saved_before_its_answer_begins() -> None:
    async with open_chat() as chat:
        await chat.pilot.press(*"hi", "enter")
        await chat.until(lambda: titles() == ["hi"])


async def test_an_answer_is_saved_while_it_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tui.autosave.STREAMING_INTERVAL_S", 0.0)
    async with open_chat() as chat:
        await chat.ready()
        await chat.ask("Count")
        chat.client.tokens("one two")
        store = ConversationStore()
        name = chat.screen.conversation.id
        await chat.until(lambda: store.load(name).path()[-1].text == "one two")
        assert store.load(name).path()[-1].ending is Ending.INTERRUPTED


@pytest.mark.parametrize("size", SIZES)
async def test_the_list_is_searched_as_one_types(size: tuple[int, int]) -> None:
    stored("Why is the sky blue?", "Rayleigh scattering")
    stored("Name a city")
    async with open_chat(size) as chat:
        await open_list(chat, 2)
        await chat.pilot.press("slash", *"rayl")
        await chat.until(lambda: chat.screen.sidebar.options.option_count == 1)
        await chat.shows("Rayleigh")
        await chat.pilot.press("enter", "enter")
        await chat.until(lambda: chat.screen.conversation.title == "Why is the sky blue?")
        await chat.shows("Rayleigh scattering")


async def test_a_conversation_gets_another_title() -> None:
    stored("Hello")
    async with open_chat() as chat:
        await open_list(chat, 1)
        await chat.pilot.press("r")
        await chat.until(lambda: isinstance(chat.app.screen, AskLine))
        chat.app.screen.query_one(Input).value = "Greetings"
        await chat.pilot.press("enter")
        await chat.until(lambda: titles() == ["Greetings"])
        await chat.shows("Greetings")


async def test_the_open_conversation_gets_another_title() -> None:
    async with open_chat() as chat:
        await chat.ready()
        await chat.answer("Hello", "Hi!")
        await open_list(chat, 1)
        await chat.pilot.press("r")
        await chat.until(lambda: isinstance(chat.app.screen, AskLine))
        chat.app.screen.query_one(Input).value = "Greetings"
        await chat.pilot.press("enter")
        await chat.until(lambda: titles() == ["Greetings"])
        assert chat.screen.conversation.title == "Greetings"


async def test_a_conversation_is_deleted_only_when_that_is_confirmed() -> None:
    stored("Keep me")
    async with open_chat() as chat:
        await chat.ready()
        await chat.answer("Delete me", "No!")
        await open_list(chat, 2)
        for answer in ("#no", "#yes"):
            await chat.pilot.press("d")
            await chat.until(lambda: isinstance(chat.app.screen, Confirm))
            assert len(titles()) == 2
            chat.app.screen.query_one(answer, Button).press()
            await chat.until(lambda: chat.app.screen is chat.screen)
        await chat.until(lambda: titles() == ["Keep me"])
        assert chat.screen.conversation.nodes == []
        await chat.until(lambda: "No!" not in chat.shown())


async def test_leaving_a_running_answer_stops_and_keeps_it() -> None:
    stored("Other")
    async with open_chat() as chat:
        await chat.ready()
        await chat.ask("Count")
        chat.client.tokens("one two")
        await chat.shows("one two")
        left = chat.screen.conversation
        await open_list(chat, 2)
        await chat.pilot.press("down", "enter")
        await chat.until(lambda: chat.screen.conversation.title == "Other")
        assert chat.client.cancelled == [chat.client.request.request_id]
        await chat.screen.autosave.flush()
        node = ConversationStore().load(left.id).path()[-1]
        assert (node.text, node.ending) == ("one two", Ending.CANCELLED)


async def test_a_broken_file_is_named_and_the_rest_works() -> None:
    stored("Fine")
    ConversationStore().path("broken").write_text("{")
    async with open_chat() as chat:
        await open_list(chat, 1)
        await chat.shows("1 file cannot be read")
        await chat.shows("broken.json")
        await chat.pilot.press("enter")
        await chat.until(lambda: chat.screen.conversation.title == "Fine")


async def test_a_conversation_that_broke_meanwhile_is_not_opened() -> None:
    talk = stored("Fine")
    async with open_chat() as chat:
        await open_list(chat, 1)
        ConversationStore().path(talk.id).write_text("{")
        await chat.pilot.press("enter")
        await chat.shows("not a conversation of this")
        assert chat.screen.conversation.nodes == []


async def test_a_state_folder_that_cannot_be_written_is_told_once_and_the_chat_works(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JUPITER_STATE_DIR", str(tmp_path / "file"))
    async with open_chat((120, 36)) as chat:
        await chat.ready()
        await chat.answer("Hello", "Hi!")
        await chat.shows("Not saved")
        await chat.answer("And?", "Yes.")
        await chat.shows("Yes.")
        await open_list(chat, 0)
        await chat.shows("none yet")


async def test_the_shown_branch_is_exported_to_a_named_file(tmp_path: Path) -> None:
    target = tmp_path / "talk.json"
    target.write_text("mine")
    async with open_chat() as chat:
        await chat.ready()
        assert not chat.screen.check_action("export", ())
        await chat.answer("Hello", "Hi!")
        await chat.pilot.press("f9")
        await chat.until(lambda: isinstance(chat.app.screen, AskLine))
        field = chat.app.screen.query_one(Input)
        assert field.value.endswith("hello.md")
        field.value = str(target)
        await chat.pilot.press("enter")
        await chat.shows("exists already")
        target.unlink()
        await chat.pilot.press("enter")
        await chat.until(target.exists)
        assert '"content": "Hi!"' in target.read_text()


async def test_settings_hold_from_the_next_answer_on_and_are_saved() -> None:
    async with open_chat((120, 36)) as chat:
        await chat.ready()
        await chat.pilot.press("ctrl+o", *"Be brief.", "tab", "0", "tab", "tab", *"20", "escape")
        await chat.until(lambda: chat.screen.conversation.params.max_tokens == 20)
        await chat.ask("Hello")
        assert chat.client.asked[0] == (Message("system", "Be brief."), Message("user", "Hello"))
        params = chat.client.requests[0].params
        assert (params.temperature, params.top_p, params.max_tokens) == (0.0, None, 20)
        chat.client.finish()
        await chat.answered()
        await chat.screen.autosave.flush()
        talk = ConversationStore().load(chat.screen.conversation.id)
        assert (talk.system, talk.params.max_tokens) == ("Be brief.", 20)
        await chat.pilot.press("ctrl+n")
        await chat.ask("Fresh")
        assert chat.client.asked[1] == (Message("user", "Fresh"),)
        assert chat.client.requests[1].params.max_tokens is None


async def test_a_wrong_setting_is_explained_and_does_not_hold() -> None:
    async with open_chat((120, 36)) as chat:
        await chat.pilot.press("ctrl+o", "tab", "-", "1")
        await chat.shows("0 (always the likeliest")
        assert chat.screen.conversation.params.temperature is None
        await chat.pilot.press("backspace", "backspace", *"1.5")
        await chat.until(lambda: chat.screen.conversation.params.temperature == 1.5)
        await chat.until(lambda: "always the likeliest" not in chat.shown())


@pytest.mark.parametrize(("columns", "covered"), [(80, True), (120, False), (200, False)])
async def test_panels_cover_a_narrow_chat_and_stand_beside_a_wide_one(
    columns: int, covered: bool
) -> None:
    async with open_chat((columns, 24)) as chat:
        for key, panel in (("ctrl+b", chat.screen.sidebar), ("ctrl+o", chat.screen.settings)):
            await chat.pilot.press(key)
            await chat.until(lambda panel=panel: panel.region.width > 0)  # type: ignore[misc]
            await chat.pilot.pause()
            overlap = panel.region.intersection(chat.screen.view.region)
            assert bool(overlap.area) is covered
            assert panel.region in chat.screen.region
        both = chat.screen.sidebar.display and chat.screen.settings.display
        assert both is (columns == 200)
        await chat.pilot.press("escape")
        await chat.until(lambda: chat.prompt.has_focus)
        assert chat.screen.settings.display is not covered


async def test_two_windows_on_one_conversation_lose_nothing() -> None:
    talk = stored("Hello", "Hi!")
    async with open_chat() as chat:
        await chat.ready()
        await open_list(chat, 1)
        await chat.pilot.press("enter")
        await chat.until(lambda: chat.screen.conversation.id == talk.id)
        other = ConversationStore()
        theirs = other.load(talk.id)
        theirs.ask("from the other window")
        other.save(theirs)
        await chat.answer("from here", "Fine.")
        # Not by the screen: where the notice is wrapped depends on the length of the path.
        await chat.until(
            lambda: any("goes on with a copy" in note.message for note in chat.app._notifications)
        )
        await chat.screen.autosave.flush()
    store = ConversationStore()
    assert {e.title: len(store.load(e.id).nodes) for e in store.list().entries} == {
        "Hello": 4,
        "Hello (copy)": 4,
    }
    assert store.load(talk.id).path()[-2].text == "from the other window"


async def test_a_long_conversation_opens_at_its_end_and_shows_more_at_the_top() -> None:
    talk = Conversation()
    for n in range(20):
        node = talk.ask(f"question {n}")
        node.text = f"answer {n}"
        talk.end(node, Ending.STOP)
    ConversationStore().save(talk)
    async with open_chat() as chat:
        await chat.ready()
        await open_list(chat, 1)
        await chat.pilot.press("enter")
        await chat.shows("answer 19")
        view = chat.screen.view
        assert view.turns[0].node.text == "question 14"
        await chat.pilot.press("ctrl+home")
        await chat.until(lambda: len(view.turns) == 24)
        await chat.shows("question 14")
        await chat.until(lambda: view.scroll_y > 0)
        await chat.pilot.press("ctrl+home")
        await chat.until(lambda: len(view.turns) == 36)
        await chat.until(lambda: view.scroll_y > 0)
        await chat.pilot.press("ctrl+home")
        await chat.until(lambda: len(view.turns) == 40)
        await chat.until(lambda: view.scroll_y > 0)
        await chat.pilot.press("ctrl+home")
        await chat.shows("question 0")
        assert "earlier messages" not in chat.shown()
        await chat.ask("one more")
        assert len(chat.client.asked[0]) == 41
        await chat.shows("one more")


async def test_a_conversation_that_grows_long_leaves_its_first_messages_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tui.widgets.conversation_view.MOST_SHOWN", 8)
    monkeypatch.setattr("tui.widgets.conversation_view.SHOWN_AT_ONCE", 4)
    async with open_chat() as chat:
        await chat.ready()
        for n in range(5):
            await chat.answer(f"question {n}", f"answer {n}")
        await chat.shows("answer 4")
        assert chat.screen.view.turns[0].node.text == "question 3"
        assert len(chat.client.asked[4]) == 9
        await chat.pilot.press("shift+tab", *["up"] * 4)
        await chat.shows("6 earlier messages")
        await chat.pilot.press("enter")
        await chat.until(lambda: len(chat.screen.view.turns) == 8)
