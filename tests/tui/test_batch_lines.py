"""Output lines: their form, and what a resumed run makes of those it finds."""

from __future__ import annotations

import json
from typing import Any

import pytest

from engine.protocol import EngineReady, Finished, Metrics
from tui.batch_input import BatchRequest, parse_requests
from tui.batch_lines import (
    BatchOutputError,
    answer_line,
    failure_line,
    plan_resume,
    read_old_lines,
)

READY = EngineReady(
    model="tiny",
    stages=(2, 1),
    device="cpu",
    dtype="float32",
    medusa_num_heads=2,
    tree_size=4,
    context_length=64,
    has_chat_template=True,
)


def requests(*records: dict[str, Any]) -> list[BatchRequest]:
    return parse_requests("in", "\n".join(map(json.dumps, records)).encode())


def answer(request: BatchRequest, text: str = "yes", **changes: Any) -> bytes:
    finished = {
        "request_id": "r1",
        "finish_reason": "stop",
        "context_full": False,
        "prompt_tokens": 5,
        "cached_tokens": 0,
        "completion_tokens": 3,
        "metrics": Metrics(),
        **changes,
    }
    return answer_line(request, text, Finished(**finished), ready=READY, request_id="r1")


def test_a_chat_answer_has_openais_batch_form() -> None:
    (request,) = requests({"custom_id": "a", "prompt": "hi"})
    metrics = Metrics(
        ttft_s=0.25,
        tokens_per_s=40.0,
        decode_steps=2,
        mean_accepted_len=1.5,
        proposed_per_head=(4, 0),
        accepted_per_head=(1, 0),
    )
    line = answer(request, "yes", metrics=metrics, finish_reason="length")
    record = json.loads(line)
    assert record.pop("id").endswith(request.fingerprint)
    body = record["response"].pop("body")
    assert record == {
        "custom_id": "a",
        "response": {"status_code": 200, "request_id": "r1"},
        "error": None,
    }
    assert body.pop("id").startswith("chatcmpl-")
    assert isinstance(body.pop("created"), int)
    assert body == {
        "object": "chat.completion",
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "yes"},
                "logprobs": None,
                "finish_reason": "length",
            }
        ],
        "usage": {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8},
        "jupiter": {
            "ttft_s": 0.25,
            "tokens_per_s": 40.0,
            "mean_accepted_len": 1.5,
            "acceptance_per_head": [0.25, None],
            "stages": [2, 1],
        },
    }


def test_a_completion_has_text_and_unknown_figures_are_null() -> None:
    (request,) = requests({"prompt": "hi", "url": "/v1/completions"})
    body = json.loads(answer(request))["response"]["body"]
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    assert body["choices"][0]["text"] == "yes"
    assert "message" not in body["choices"][0]
    assert body["jupiter"] == {
        "ttft_s": None,
        "tokens_per_s": None,
        "mean_accepted_len": None,
        "acceptance_per_head": [],
        "stages": [2, 1],
    }


def test_a_failed_line_has_an_error_and_no_response() -> None:
    (request,) = requests({"custom_id": "a", "prompt": "hi"})
    record = json.loads(failure_line(request, "prompt_too_long", "70 tokens, 64 fit"))
    assert record["custom_id"] == "a"
    assert record["response"] is None
    assert record["error"] == {"code": "prompt_too_long", "message": "70 tokens, 64 fit"}


def test_a_line_is_one_line_for_any_reader_and_readable() -> None:
    (request,) = requests({"custom_id": "a", "prompt": "hi"})
    text = "日本\u2028two\u2029three\u0085four\nfive\r\x0b\x0c\x1c"
    line = answer(request, text).decode()
    assert len(line.splitlines()) == 1
    assert line.endswith("\n")
    assert "日本" in line
    assert json.loads(line)["response"]["body"]["choices"][0]["message"]["content"] == text


def test_resuming_keeps_answers_and_asks_the_rest_again() -> None:
    asked = requests(*({"custom_id": name, "prompt": name} for name in "abcd"))
    a, b, c, _ = asked
    data = answer(c) + failure_line(a, "internal_error", "x") + answer(b)
    plan = plan_resume("out", read_old_lines("out", data), asked)
    assert b"".join(line.raw for line in plan.keep) == answer(c) + answer(b)
    assert [request.custom_id for request in plan.todo] == ["a", "d"]
    assert plan.strangers == []


@pytest.mark.parametrize("at", [1, 2, 10, 40, -2, -1])
def test_a_torn_last_line_is_dropped_and_asked_again(at: int) -> None:
    asked = requests({"custom_id": "a", "prompt": "a"}, {"custom_id": "b", "prompt": "b"})
    data = answer(asked[0]) + answer(asked[1])[:at]
    plan = plan_resume("out", read_old_lines("out", data), asked)
    whole = at == -1  # only the line feed is missing
    assert [request.custom_id for request in plan.todo] == ([] if whole else ["b"])
    assert b"".join(line.raw for line in plan.keep) == data[: len(answer(asked[0]))] + (
        answer(asked[1]) if whole else b""
    )


def test_zeros_that_a_power_cut_left_are_a_torn_line() -> None:
    (request,) = requests({"custom_id": "a", "prompt": "a"})
    assert len(read_old_lines("out", answer(request) + b"\0" * 100)) == 1


@pytest.mark.parametrize(
    "data",
    [
        b"my notes",
        b"my notes\n",
        b'{"prompt": "an input file"}\n',
        b'{"custom_id": 3, "response": null, "error": null}\n',
        b'{"custom_id": "a", "response": null, "error": null}\n',
        b'[{"custom_id": "a"}]\n',
        b'{"id": "x", "custom\n',
    ],
)
def test_a_file_that_is_no_output_of_a_batch_is_refused_by_line(data: bytes) -> None:
    (request,) = requests({"custom_id": "a", "prompt": "a"})
    with pytest.raises(BatchOutputError, match=r"^out: line 2: not an output line"):
        read_old_lines("out", answer(request) + data)


def test_lines_of_another_program_in_the_same_form_count_as_answers() -> None:
    asked = requests({"custom_id": "a", "prompt": "a"}, {"custom_id": "b", "prompt": "b"})
    data = (
        b'{"id":"batch_req_1","custom_id":"a","response":{"status_code":200,"body":{}},"error":null}\n'
        b'{"id":"batch_req_2","custom_id":"b","response":{"status_code":500},"error":null}\n'
    )
    plan = plan_resume("out", read_old_lines("out", data), asked)
    assert [request.custom_id for request in plan.todo] == ["b"]


def test_lines_that_are_not_in_the_input_are_kept_once_and_told() -> None:
    asked = requests({"custom_id": "a", "prompt": "a"})
    (other,) = requests({"custom_id": "z", "prompt": "z"})
    failed = failure_line(other, "internal_error", "x")
    data = failed + answer(other) + answer(asked[0]) + answer(other)
    plan = plan_resume("out", read_old_lines("out", data), asked)
    assert sorted(line.raw for line in plan.keep) == sorted([answer(other), answer(asked[0])])
    assert [line.custom_id for line in plan.strangers] == ["z"]
    assert plan.todo == []


def test_an_answer_to_what_the_input_no_longer_asks_is_refused() -> None:
    before = requests({"prompt": "first"}, {"prompt": "second"})
    data = b"".join(map(answer, before))
    after = requests({"prompt": "new"}, {"prompt": "first"}, {"prompt": "second"})
    with pytest.raises(BatchOutputError) as caught:
        plan_resume("out", read_old_lines("out", data), after)
    assert str(caught.value).startswith('out: line 1: "line-1" was asked something else')
    assert "(2 such lines)" in str(caught.value)


def test_a_failed_line_may_be_mended_in_the_input() -> None:
    (before,) = requests({"custom_id": "a", "prompt": "much too long"})
    (after,) = requests({"custom_id": "a", "prompt": "short"})
    data = failure_line(before, "prompt_too_long", "x")
    plan = plan_resume("out", read_old_lines("out", data), [after])
    assert (plan.keep, plan.todo) == ([], [after])
