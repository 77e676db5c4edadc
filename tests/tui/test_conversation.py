"""What is sent to the model of a conversation."""

from __future__ import annotations

from engine.protocol import Message
from tui.conversation import Conversation, Ending, Exchange


def test_the_whole_conversation_is_sent_with_the_new_prompt_last() -> None:
    first, second = Exchange("Hello", "Hi!", Ending.STOP), Exchange("And?")
    conversation = Conversation([first, second])
    assert conversation.messages_for(second) == (
        Message("user", "Hello"),
        Message("assistant", "Hi!"),
        Message("user", "And?"),
    )


def test_a_stopped_answer_is_sent_as_far_as_it_came() -> None:
    cut, new = Exchange("Count", "one, two", Ending.CANCELLED), Exchange("Go on")
    sent = Conversation([cut, new]).messages_for(new)
    assert sent[1] == Message("assistant", "one, two")


def test_a_prompt_without_an_answer_is_left_out() -> None:
    refused, new = Exchange("far too long", "", Ending.REFUSED), Exchange("short")
    assert Conversation([refused, new]).messages_for(new) == (Message("user", "short"),)


def test_prompts_that_wait_behind_are_not_sent_early() -> None:
    now, later = Exchange("now"), Exchange("later")
    assert Conversation([now, later]).messages_for(now) == (Message("user", "now"),)


def test_the_models_own_characters_are_sent_back_unchanged() -> None:
    odd, new = Exchange("x", "a\x1b[0m\r\n", Ending.STOP), Exchange("y")
    assert Conversation([odd, new]).messages_for(new)[1].content == "a\x1b[0m\r\n"
