"""Batch files: what is read as what, and what is refused by line and key."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine.protocol import Message, SamplingParams
from tui.batch_input import CHAT, COMPLETIONS, BatchInputError, BatchRequest, parse_requests


def parse_one(record: Any) -> BatchRequest:
    text = record if isinstance(record, str) else json.dumps(record)
    (request,) = parse_requests("in.jsonl", text.encode())
    return request


def refusal(text: str | bytes) -> str:
    with pytest.raises(BatchInputError) as caught:
        parse_requests("in.jsonl", text if isinstance(text, bytes) else text.encode())
    return str(caught.value)


def chat(**body: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "hi"}]
    return {
        "custom_id": "a",
        "method": "POST",
        "url": CHAT,
        "body": {"messages": messages, **body},
    }


USER = (Message(role="user", content="hi"),)


def test_the_short_form_may_carry_columns_of_the_users_own() -> None:
    row = {"id": "q1", "source": "own", "messages": [{"role": "user", "content": "hi"}]}
    (request,) = parse_requests("in.jsonl", json.dumps(row).encode())
    assert request.custom_id == "q1"
    assert "unknown key 'foo'" in refusal(json.dumps(chat(foo=1)))


@pytest.mark.parametrize(
    ("record", "messages", "prompt"),
    [
        (chat(), USER, None),
        (chat(model="some-model", user="me", metadata={"k": "v"}), USER, None),
        ({"prompt": "hi"}, USER, None),
        ({"messages": [{"role": "user", "content": "hi"}]}, USER, None),
        ({"prompt": "hi", "url": CHAT}, USER, None),
        ({"prompt": "hi", "url": COMPLETIONS}, None, "hi"),
        ({"url": COMPLETIONS, "body": {"prompt": "hi"}}, None, "hi"),
        (
            {
                "messages": [
                    {"role": "developer", "content": "be short"},
                    {"role": "assistant", "content": "ok", "refusal": None, "tool_calls": []},
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "one"},
                            {"type": "text", "text": "two"},
                        ],
                    },
                ]
            },
            (
                Message(role="system", content="be short"),
                Message(role="assistant", content="ok"),
                Message(role="user", content="one\ntwo"),
            ),
            None,
        ),
    ],
)
def test_each_form_becomes_a_request(
    record: Any, messages: tuple[Message, ...] | None, prompt: str | None
) -> None:
    request = parse_one(record)
    assert (request.messages, request.prompt) == (messages, prompt)
    assert request.url == (COMPLETIONS if messages is None else CHAT)


@pytest.mark.parametrize(
    ("given", "params"),
    [
        ({}, SamplingParams()),
        ({"max_tokens": 7}, SamplingParams(max_tokens=7)),
        ({"max_completion_tokens": 7}, SamplingParams(max_tokens=7)),
        ({"max_tokens": 7, "max_completion_tokens": 7}, SamplingParams(max_tokens=7)),
        (
            {"temperature": 0, "top_p": 1, "seed": -3},
            SamplingParams(temperature=0.0, top_p=1.0, seed=-3),
        ),
        ({"stop": "END"}, SamplingParams(stop=("END",))),
        ({"mode": "outline"}, SamplingParams(mode="outline")),
        ({"mode": "plain"}, SamplingParams()),
        ({"stop": ["a", "b", "c", "d"]}, SamplingParams(stop=("a", "b", "c", "d"))),
        ({"stop": []}, SamplingParams()),
        ({"stop": None, "seed": None, "max_tokens": None, "n": None}, SamplingParams()),
        (
            {
                "n": 1,
                "stream": False,
                "logprobs": False,
                "tools": [],
                "response_format": {"type": "text"},
                "presence_penalty": 0.0,
                "logit_bias": {},
            },
            SamplingParams(),
        ),
    ],
)
def test_parameters_are_taken_in_both_forms(given: dict[str, Any], params: SamplingParams) -> None:
    assert parse_one(chat(**given)).params == params
    assert parse_one({"prompt": "hi", **given}).params == params


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ("{", "not JSON"),
        ("[1]", "must be a JSON object"),
        ("nonsense", "not JSON"),
        ('{"prompt": NaN}', "NaN is no JSON value"),
        ('{"prompt": "a", "prompt": "b"}', "key 'prompt' is given twice"),
        ("[" * 100_000, "nested too deep"),
        ('{"prompt": "a", "seed": ' + "9" * 5000 + "}", "not JSON that can be read"),
        ('{"prompt": "\\ud800"}', "surrogate"),
        ({}, "needs 'body'"),
        ({"custom_id": "a", "method": "POST", "url": CHAT}, "needs 'body'"),
        ({"prompt": 5}, "key 'prompt': must be a string, got 5"),
        ({"prompt": None}, "key 'prompt': must be a string"),
        ({"prompt": "a", "messages": []}, "both"),
        ({"messages": []}, "key 'messages': must be a list"),
        ({"messages": "hi"}, "key 'messages': must be a list"),
        ({"messages": ["hi"]}, "key 'messages[0]': must be an object"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content': must be a string"),
        ({"messages": [{"role": "user", "content": "x", "name": "Al"}]}, "messages[0].name'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0]'",
        ),
        ({"custom_id": 7, "prompt": "a"}, "key 'custom_id': must be a string, got 7"),
        ({"custom_id": "", "prompt": "a"}, "key 'custom_id' is empty"),
        ({"method": "GET", "prompt": "a"}, "key 'method'"),
        ({"url": "/v1/embeddings", "body": {"input": "a"}}, "key 'url'"),
        ({"body": {"messages": [{"role": "user", "content": "a"}]}}, "key 'url' is missing"),
        ({"url": CHAT, "body": "hi"}, "key 'body': must be an object"),
        ({"url": CHAT, "body": {"prompt": "a"}}, f"{CHAT} takes 'messages'"),
        ({"url": COMPLETIONS, "body": {"messages": []}}, f"{COMPLETIONS} takes 'prompt'"),
        ({"url": COMPLETIONS, "body": {"prompt": ["a", "b"]}}, "key 'prompt'"),
        ({**chat(), "temperature": 1}, "key 'temperature': beside 'body'"),
    ],
)
def test_a_line_that_is_no_request_is_refused(record: Any, said: str) -> None:
    text = record if isinstance(record, str) else json.dumps(record)
    message = refusal('{"prompt": "fine"}\n' + text)
    assert message.startswith("in.jsonl: line 2: ")
    assert said in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "given",
    [
        {"n": 2},
        {"n": True},
        {"best_of": 3},
        {"stream": True},
        {"tools": [{"type": "function"}]},
        {"tool_choice": "required"},
        {"logprobs": True},
        {"logprobs": 0},
        {"top_logprobs": 3},
        {"response_format": {"type": "json_object"}},
        {"frequency_penalty": 0.5},
        {"logit_bias": {"5": 10}},
        {"top_k": 40},
        {"echo": True},
        {"suffix": "end"},
        {"max_tokens": 0},
        {"max_tokens": 1.5},
        {"max_tokens": "10"},
        {"max_tokens": True},
        {"max_completion_tokens": -1},
        {"temperature": -0.1},
        {"temperature": 2.1},
        {"temperature": "hot"},
        {"mode": "skeleton"},
        {"top_p": 0},
        {"top_p": 1.01},
        {"seed": 2**63},
        {"seed": 1.0},
        {"stop": ""},
        {"stop": ["a", "b", "c", "d", "e"]},
        {"stop": [1]},
        {"stop": {"a": 1}},
        {"temprature": 1},
    ],
    ids=json.dumps,
)
def test_a_parameter_that_cannot_be_honoured_is_refused_by_line_and_key(
    given: dict[str, Any],
) -> None:
    (key,) = given
    for record in (chat(**given), {"prompt": "hi", **given}):
        message = refusal("\n" + json.dumps(record))
        assert message.startswith("in.jsonl: line 2: ")
        assert f"'{key}'" in message


def test_a_misspelt_parameter_is_told_its_name() -> None:
    assert "did you mean 'temperature'?" in refusal('{"prompt": "a", "temprature": 1}')


def test_limits_that_differ_are_refused() -> None:
    assert "differ" in refusal('{"prompt": "a", "max_tokens": 1, "max_completion_tokens": 2}')


def test_bom_crlf_and_blank_lines_are_tolerated_and_lines_still_counted() -> None:
    data = b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n   \n{"prompt": "b"}\r\n\n'
    assert [(r.line, r.custom_id) for r in parse_requests("in", data)] == [
        (1, "line-1"),
        (4, "line-4"),
    ]


def test_only_a_line_feed_ends_a_line() -> None:
    (request,) = parse_requests("in", '{"prompt": "a\u2028b\u0085c"}\n'.encode())
    assert request.messages == (Message(role="user", content="a\u2028b\u0085c"),)


def test_a_line_that_is_not_utf8_is_named() -> None:
    assert (
        refusal(b'{"prompt": "a"}\n{"prompt": "\xff"}') == "in.jsonl: line 2: not UTF-8 (byte 13)"
    )


def test_a_custom_id_given_twice_names_both_lines() -> None:
    message = refusal('{"custom_id": "x", "prompt": "a"}\n\n{"custom_id": "x", "prompt": "b"}')
    assert message.startswith('in.jsonl: line 3: custom_id "x" is already that of line 1')


def test_a_custom_id_equal_to_a_derived_one_is_refused() -> None:
    message = refusal('{"custom_id": "line-2", "prompt": "a"}\n{"prompt": "b"}')
    assert message.startswith('in.jsonl: line 2: custom_id "line-2" is already that of line 1')


def test_the_first_ten_problems_are_listed_in_order_with_their_number() -> None:
    lines = ['{"custom_id": "x", "prompt": "a"}'] * 3 + ["{"] * 20
    shown = refusal("\n".join(lines)).splitlines()
    assert [line.split(":")[1] for line in shown[:-1]] == [f" line {n}" for n in range(2, 12)]
    assert shown[-1] == "in.jsonl: 22 problems in all, the first 10 shown"


@pytest.mark.parametrize("data", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_a_file_without_requests_is_refused(data: bytes) -> None:
    assert "holds no request" in refusal(data)


def test_the_fingerprint_is_of_what_is_asked_and_not_of_where() -> None:
    first = parse_one('{"custom_id": "a", "prompt": "hi", "seed": 1}')
    spelt = parse_requests("in", b'\n{"seed": 1, "custom_id": "a", "prompt": "hi", "n": 1}')[0]
    other = parse_one('{"custom_id": "a", "prompt": "hi", "seed": 2}')
    assert first.fingerprint == spelt.fingerprint != other.fingerprint
