"""The tree of messages: what is shown, what is sent, and what is never lost."""

from __future__ import annotations

import pytest

from engine.protocol import Message, Transcript
from tui.conversation import Conversation, Ending, Node


def said(talk: Conversation, prompt: str, answer: str, ending: Ending = Ending.STOP) -> Node:
    """A whole exchange at the end of the shown branch."""
    node = talk.ask(prompt)
    node.text, node.model, node.token_ids = answer, "m", [1, 2]
    talk.end(node, ending)
    return node


def texts(talk: Conversation) -> list[str]:
    return [node.text for node in talk.path()]


def test_the_whole_branch_is_sent_with_the_new_prompt_last() -> None:
    talk = Conversation()
    said(talk, "Hello", "Hi!")
    assert talk.messages_for(talk.ask("And?")) == (
        Message("user", "Hello"),
        Message("assistant", "Hi!"),
        Message("user", "And?"),
    )


def test_a_system_prompt_goes_first_and_a_blank_one_is_none() -> None:
    talk = Conversation(system="Be brief.")
    new = talk.ask("x")
    assert talk.messages_for(new) == (Message("system", "Be brief."), Message("user", "x"))
    talk.system = " \n"
    assert talk.messages_for(new) == (Message("user", "x"),)


def test_a_stopped_answer_is_sent_as_far_as_it_came() -> None:
    talk = Conversation()
    said(talk, "Count", "one, two", Ending.CANCELLED)
    assert talk.messages_for(talk.ask("Go on"))[1] == Message("assistant", "one, two")


def test_a_prompt_without_an_answer_is_left_out() -> None:
    talk = Conversation()
    said(talk, "far too long", "", Ending.REFUSED)
    assert talk.messages_for(talk.ask("short")) == (Message("user", "short"),)


def test_prompts_that_wait_behind_are_not_sent_early() -> None:
    talk = Conversation()
    now = talk.ask("now")
    talk.ask("later")
    assert talk.messages_for(now) == (Message("user", "now"),)


def test_the_models_own_characters_are_sent_back_unchanged() -> None:
    talk = Conversation()
    said(talk, "x", "a\x1b[0m\r\n")
    assert talk.messages_for(talk.ask("y"))[1].content == "a\x1b[0m\r\n"


def test_an_edited_prompt_is_a_branch_beside_the_old_one() -> None:
    talk = Conversation()
    said(talk, "Hello", "Hi!")
    old = said(talk, "Why?", "Because.")
    prompt = talk.parent(old)
    assert prompt is not None
    new = talk.ask("Why not?", after=prompt.parent)
    assert texts(talk) == ["Hello", "Hi!", "Why not?", ""]
    assert [m.content for m in talk.messages_for(new)] == ["Hello", "Hi!", "Why not?"]
    talk.switch(talk.node(new.parent), -1)
    assert texts(talk) == ["Hello", "Hi!", "Why?", "Because."]


def test_the_first_prompt_can_be_edited_too() -> None:
    talk = Conversation()
    said(talk, "Hello", "Hi!")
    said(talk, "More", "Yes.")
    talk.ask("Goodbye", after=0)
    assert texts(talk) == ["Goodbye", ""]


def test_a_regenerated_answer_keeps_the_old_one_and_what_followed_it() -> None:
    talk = Conversation()
    first = said(talk, "Hello", "Hi!")
    said(talk, "More", "Yes.")
    prompt = talk.parent(first)
    assert prompt is not None
    second = talk.answer_again(prompt)
    second.text = "Hey!"
    assert texts(talk) == ["Hello", "Hey!"]
    assert talk.siblings(second) == [first, second]
    assert talk.switch(second, -1) is first
    assert texts(talk) == ["Hello", "Hi!", "More", "Yes."]
    assert talk.switch(first, -1) is first
    assert talk.switch(first, 1) is second
    assert talk.switch(second, 1) is second


def test_only_a_cut_off_last_answer_of_the_same_model_can_be_continued() -> None:
    talk = Conversation()
    cut = said(talk, "Count", "one", Ending.CANCELLED)
    assert talk.can_continue(cut, "m")
    assert not talk.can_continue(cut, "another model")
    talk.ask("next")
    assert not talk.can_continue(cut, "m")
    for ending in (Ending.STOP, Ending.CONTEXT_FULL):
        assert not talk.can_continue(said(talk, "x", "y", ending), "m")


def test_exact_tokens_are_kept_for_the_last_answers_of_the_branch_only() -> None:
    talk = Conversation()
    answers = [said(talk, f"p{n}", f"a{n}") for n in range(4)]
    for n, answer in enumerate(answers):
        talk.remember(answer, Transcript(f"t{n}", (n,)))
    assert [answer.transcript is not None for answer in answers] == [False, False, True, True]
    new = talk.ask("next")
    assert talk.transcript_for(new, "m") == Transcript("t3", (3,))
    assert talk.transcript_for(new, "another model") is None
    assert talk.transcript_for(answers[3], "m") == Transcript("t2", (2,))


def test_what_was_running_when_the_conversation_was_left_counts_as_cut_off() -> None:
    talk = Conversation()
    done, running = said(talk, "a", "b"), talk.ask("c")
    talk.close()
    assert (done.ending, running.ending) == (Ending.STOP, Ending.INTERRUPTED)


def test_the_title_is_the_users_or_the_first_prompts_first_line() -> None:
    talk = Conversation()
    assert talk.title == "New conversation"
    talk.ask("  Why is\tthe sky blue? \nAnd the sea?")
    assert talk.title == "Why is the sky blue?"
    talk.ask("x" * 100, after=0)
    assert talk.title == "Why is the sky blue?"
    talk.name = "Sky"
    assert talk.title == "Sky"


@pytest.mark.parametrize(
    "nodes",
    [
        [Node(id=2, role="user")],
        [Node(id=1, role="assistant")],
        [Node(id=1, role="user", parent=1)],
        [Node(id=1, role="user"), Node(id=2, role="user", parent=1)],
        [Node(id=1, role="user"), Node(id=2, role="assistant", parent=5)],
    ],
)
def test_a_tree_that_is_not_whole_is_refused(nodes: list[Node]) -> None:
    with pytest.raises(ValueError, match="message"):
        Conversation(nodes=nodes).check()


def test_a_choice_that_leads_nowhere_is_refused() -> None:
    talk = Conversation()
    talk.ask("x")
    talk.check()
    talk.chosen[1] = 7
    with pytest.raises(ValueError, match="chosen"):
        talk.check()
