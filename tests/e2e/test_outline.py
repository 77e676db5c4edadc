"""Outline answers of the default model over two live stages."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.client import EngineClient
from engine.config import load_config
from engine.decoding.outline import Parts
from engine.protocol import (
    EventEnvelope,
    Finished,
    Generate,
    Message,
    SamplingParams,
    StageSpans,
    Started,
    Tokens,
    Transcript,
)
from engine.timeline import Timeline
from engine.updates import Update

CONFIG = str(Path(__file__).parents[2] / "config.json")
SMALL = {"num_threads": 1, "max_num_seqs": 8, "max_kv_cache_length": 512}
LIST = "How can I sleep better at night? Give me a list of tips."
FACT = "What is the capital of France?"
OUTLINE = SamplingParams(temperature=0, max_tokens=200, mode="outline")


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUPITER_STATE_DIR", str(tmp_path / "state"))


class Asked:
    """One answer, event by event."""

    def __init__(self, client: EngineClient, name: str, question: str) -> None:
        self.parts = Parts()
        self.points: list[int] = []
        self.events: dict[int, list[Tokens]] = {}
        self.prompt = Transcript()
        self.client = client
        self.request = Generate(
            request_id=name,
            messages=(Message("user", question),),
            params=OUTLINE,
            transcript_wanted=True,
        )

    async def answer(self, *, stop_at: int | None = None) -> Finished:
        """Until its end; it is cancelled when so many events of points have come."""
        async for event in self.client.send(self.request):
            if isinstance(event, Started):
                assert event.request_id == self.request.request_id
                self.prompt = event.transcript or self.prompt
            elif isinstance(event, Tokens):
                self.parts.add(event.point, event.text)
                self.events.setdefault(event.point, []).append(event)
                self.points += [event.point] * bool(event.point)
                if len(self.points) == stop_at:
                    self.client.cancel(self.request.request_id)
            elif isinstance(event, Finished):
                return event
        raise AssertionError("no end")


async def test_points_grow_together_and_each_as_if_it_were_alone() -> None:
    timeline = Timeline()

    def listen(update: Update) -> None:
        if isinstance(update, EventEnvelope) and isinstance(update.body, StageSpans):
            timeline.add(update.rank, update.body.spans)

    config = load_config(CONFIG, assignments=[f"{key}={value}" for key, value in SMALL.items()])
    client = EngineClient(config, listener=listen)
    await client.start()
    try:
        began = time.time()
        asked = Asked(client, "list", LIST)
        done = await asked.answer()
        ended = time.time()
        texts = asked.parts.texts
        assert done.finish_reason in ("stop", "length")
        assert len(texts) >= 4
        for point in range(2, len(texts)):
            assert re.match(rf"\n\n{point}\. \*\*[^*]+\*\*:", texts[point])
        first = asked.points.index(1)
        assert asked.points[first:] != sorted(asked.points[first:])
        assert done.completion_tokens <= 200
        assert done.transcript is not None
        assert done.transcript.text.endswith(asked.parts.text)
        assert sum(done.metrics.accepted_per_head) > 0
        await the_last_point_alone(client, asked)

        stopped = Asked(client, "stopped", LIST)
        assert (await stopped.answer(stop_at=len(texts) + 4)).finish_reason == "cancelled"
        assert asked.parts.texts[0] == stopped.parts.texts[0]
        assert len(stopped.parts.text) < len(asked.parts.text)

        fact = Asked(client, "fact", FACT)
        await fact.answer()
        assert set(fact.parts.texts) == {0}
        window = timeline.window(began, ended)
        assert window.points_at_once() >= 3
    finally:
        await client.stop()


async def the_last_point_alone(client: EngineClient, asked: Asked) -> None:
    """Without a fork, what the last point goes on behind is gone on with in the same way."""
    last = max(asked.parts.texts)
    header, *rest = asked.events[last]
    title = header.text.lstrip("\n")
    before = asked.prompt.text + asked.parts.texts[0] + title
    shared = (*asked.prompt.token_ids, *(t for e in asked.events[0] for t in e.token_ids))
    request = Generate(
        request_id="alone",
        prompt=before,
        transcript=Transcript(before, (*shared, *header.token_ids[1:])),
        params=SamplingParams(
            temperature=0, max_tokens=160, stop=("\n\n", f"\n{last + 1}.", "\n**")
        ),
    )
    text = ""
    async for event in client.send(request):
        text += event.text if isinstance(event, Tokens) else ""
    grown = "".join(event.text for event in rest)
    # A point's own limit may have cut it off.
    assert grown
    assert text.startswith(grown)


def test_a_batch_line_may_ask_for_an_outline(tmp_path: Path) -> None:
    lines = [
        {"custom_id": "plain", "prompt": FACT, "temperature": 0},
        {"custom_id": "fact", "prompt": FACT, "temperature": 0, "mode": "outline"},
        {"custom_id": "list", "prompt": LIST, "temperature": 0, "mode": "outline"},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
    command = [str(Path(sys.executable).with_name("jupiter-tui")), "--config", CONFIG, *settings]
    subprocess.run(
        [*command, "--batch", "in.jsonl", "-o", "out.jsonl", "--progress", "none"],
        cwd=tmp_path,
        check=True,
        timeout=300,
    )
    found = {}
    for line in (tmp_path / "out.jsonl").read_text().splitlines():
        record = json.loads(line)
        found[record["custom_id"]] = record["response"]["body"]
    answers = {name: body["choices"][0]["message"]["content"] for name, body in found.items()}
    assert answers["fact"] == answers["plain"]
    numbers = re.findall(r"^(\d+)\. \*\*", answers["list"], re.MULTILINE)
    assert len(numbers) >= 3
    assert numbers == [str(n) for n in range(1, len(numbers) + 1)]
    assert found["list"]["usage"]["completion_tokens"] > 60
