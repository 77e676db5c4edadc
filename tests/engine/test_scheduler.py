"""The scheduler over one stage in this process: what is emitted, kept and cancelled."""

from __future__ import annotations

import functools
import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch

from engine.config import JupiterConfig, parse_config
from engine.decoding.drafted import Drafted
from engine.decoding.tree import Tree, choose_tree
from engine.decoding.tuner import SIZES, Drafting, FixedTree, TreeTuner
from engine.model.config import ModelConfig
from engine.model.medusa import HeadShape, MedusaLlamaForCausalLM, fuse_projections
from engine.pipeline.rehearsal import rehearse
from engine.pipeline.rule import accept_rule
from engine.pipeline.scheduler import Scheduler
from engine.pipeline.sequence import Fork
from engine.pipeline.stage import Stage
from engine.protocol import (
    Cancel,
    Event,
    Failed,
    Finished,
    Generate,
    Message,
    SamplingParams,
    Shutdown,
    Started,
    Tokens,
    TreeChosen,
)
from engine.text import TextCodec
from tests.tiny import reference, tiny_folder

CONTEXT = 200
GREEDY = SamplingParams(temperature=0, max_tokens=24)


class Engine:
    """A scheduler thread and its two queues."""

    def __init__(
        self,
        heads: HeadShape,
        choices: Any = "mc_63",
        *,
        drafting: Drafting | None = None,
        **config: Any,
    ) -> None:
        values = {"base_model_name_or_path": "tiny", "stage_num_hidden_layers_list": [6], **config}
        self.config: JupiterConfig = parse_config(values, "test")
        folder = tiny_folder("llama")
        source = reference("llama")
        model_config = ModelConfig.from_folder(folder)
        torch.manual_seed(1)
        model = MedusaLlamaForCausalLM(model_config, heads)
        model.load_state_dict(source.state_dict(), strict=False)
        fuse_projections(model.eval().requires_grad_(False))
        self.stage = Stage(
            model,
            first=True,
            last=True,
            context_length=CONTEXT,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        self.codec = TextCodec(folder, folder / "tokenizer.json", model_config.eos_token_id)
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.chosen: list[TreeChosen] = []
        self.scheduler = Scheduler(
            self.stage,
            None,
            self.codec,
            self.config,
            drafting
            or FixedTree(choose_tree(choices, heads.num_heads), sequential=heads.kind == "hydra"),
            context_length=CONTEXT,
            inbox=self.inbox,
            emit=self.events.put,
            tick_s=5,
        )
        self.thread = threading.Thread(target=self.scheduler.run)
        self.thread.start()

    def stop(self) -> None:
        self.inbox.put(Shutdown())
        self.thread.join(10)
        assert not self.thread.is_alive()

    def ask(self, *requests: Generate) -> dict[str, list[Event]]:
        """Submit all at once; events by request, once all have ended."""
        for request in requests:
            self.inbox.put(request)
        return self.collect({request.request_id for request in requests})

    def collect(self, pending: set[str]) -> dict[str, list[Event]]:
        found: dict[str, list[Event]] = {name: [] for name in pending}
        pending = set(pending)
        while pending:
            event = self.events.get(timeout=30)
            if isinstance(event, TreeChosen):
                self.chosen.append(event)
                continue
            found.setdefault(event.request_id, []).append(event)
            if isinstance(event, Finished | Failed):
                pending.discard(event.request_id)
        return found


NO_HEADS = HeadShape(0)
RANDOM_HEADS = HeadShape(5, 1, vocab_size=260)
# New ResBlocks are the identity: these heads repeat the next token's guesses, and are often right
# where an answer repeats itself.
ECHO_HEADS = HeadShape(5, 1)
ROOT_HEADS = HeadShape(5, 2, vocab_size=260, kind="root", inner_size=24)
HYDRA_HEADS = HeadShape(5, 2, vocab_size=260, kind="hydra", inner_size=24)
SHAPES = {
    "none": NO_HEADS,
    "random": RANDOM_HEADS,
    "echo": ECHO_HEADS,
    "root": ROOT_HEADS,
    "hydra": HYDRA_HEADS,
}


@pytest.fixture(params=SHAPES.values(), ids=SHAPES)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    engine = Engine(request.param)
    yield engine
    engine.stop()


@pytest.fixture
def plain() -> Iterator[Engine]:
    engine = Engine(ECHO_HEADS)
    yield engine
    engine.stop()


def prompt(name: str, text: str, params: SamplingParams = GREEDY) -> Generate:
    return Generate(request_id=name, prompt=text, params=params)


def tokens_of(events: list[Event]) -> list[int]:
    return [token for event in events if isinstance(event, Tokens) for token in event.token_ids]


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Tokens))


def expected_greedy(codec: TextCodec, text: str, count: int) -> list[int]:
    return _generate(tuple(codec.encode(text, add_special_tokens=True)), count)


@functools.cache
def _generate(prompt_ids: tuple[int, ...], count: int) -> list[int]:
    model = reference("llama")
    ids = torch.tensor([prompt_ids])
    seen = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=seen, max_new_tokens=count, do_sample=False)
    return out[0, ids.shape[1] :].tolist()


PROMPTS = [f"{'word ' * n}number {n * n}?" for n in range(8)]


def test_greedy_tokens_equal_transformers_alone_and_together(engine: Engine) -> None:
    expected = [expected_greedy(engine.codec, text, 24) for text in PROMPTS]
    for index, text in enumerate(PROMPTS[:3]):
        assert tokens_of(engine.ask(prompt("one", text))["one"]) == expected[index]
    events = engine.ask(*(prompt(str(i), text) for i, text in enumerate(PROMPTS)))
    assert [tokens_of(events[str(i)]) for i in range(len(PROMPTS))] == expected


def test_figures_of_a_finished_request_are_consistent(engine: Engine) -> None:
    done = engine.ask(prompt("a", PROMPTS[1]))["a"][-1]
    assert isinstance(done, Finished)
    metrics = done.metrics
    assert done.completion_tokens == 24
    assert metrics.mean_accepted_len == pytest.approx(23 / metrics.decode_steps)
    assert metrics.ttft_s is not None
    assert metrics.ttft_s > 0
    depth = engine.scheduler.drafting.tree.depth
    assert metrics.proposed_per_head == (metrics.decode_steps,) * depth
    assert list(metrics.accepted_per_head) == sorted(metrics.accepted_per_head, reverse=True)
    if depth == 0:
        assert metrics.mean_accepted_len == 1.0


def test_repeating_answers_are_accepted_several_tokens_at_a_time() -> None:
    engine = Engine(ECHO_HEADS)
    done = engine.ask(*(prompt(str(i), text) for i, text in enumerate(PROMPTS)))
    engine.stop()
    steps = sum(events[-1].metrics.decode_steps for events in done.values())
    assert steps < 0.9 * 23 * len(PROMPTS)


def test_a_second_turn_prefills_only_what_is_new(plain: Engine) -> None:
    first = (Message("user", "hello there"),)
    events = plain.ask(Generate(request_id="1", messages=first, params=GREEDY))["1"]
    answer = Message("assistant", text_of(events))
    second = (*first, answer, Message("user", "and now?"))
    rows_before = plain.stage.meter.rows
    events = plain.ask(Generate(request_id="2", messages=second, params=GREEDY))["2"]
    started = events[0]
    assert isinstance(started, Started)
    closing = plain.codec.encode(
        "<|im_end|>\n<|im_start|>user\nand now?<|im_end|>\n<|im_start|>assistant\n",
        add_special_tokens=False,
    )
    # The answer's last token was never fed, so its row is new too.
    assert started.prompt_tokens - started.cached_tokens <= len(closing) + 1
    decoded = events[-1].metrics.decode_steps * plain.scheduler.drafting.tree.size
    assert (
        plain.stage.meter.rows - rows_before
        == started.prompt_tokens - started.cached_tokens + decoded
    )
    fresh = Engine(NO_HEADS)
    alone = fresh.ask(Generate(request_id="2", messages=second, params=GREEDY))["2"]
    fresh.stop()
    assert tokens_of(alone) == tokens_of(events)


def test_cancel_keeps_the_partial_text_and_frees_the_slot(plain: Engine) -> None:
    endless = SamplingParams(temperature=0)
    plain.inbox.put(prompt("long", PROMPTS[2], endless))
    seen: list[Event] = []
    while not tokens_of(seen):
        seen.append(plain.events.get(timeout=30))
    plain.inbox.put(Cancel("long"))
    seen += plain.collect({"long"})["long"]
    assert isinstance(seen[-1], Finished)
    assert seen[-1].finish_reason == "cancelled"
    assert tokens_of(seen) == expected_greedy(plain.codec, PROMPTS[2], len(tokens_of(seen)))
    assert not any(slot.busy for slot in plain.scheduler.slots.slots)


def test_forks_of_running_and_ended_sequences_answer_like_fresh_ones(engine: Engine) -> None:
    whole = PROMPTS[6]
    engine.inbox.put(prompt("long", whole, SamplingParams(temperature=0, max_tokens=90)))
    seen: list[Event] = []
    while not tokens_of(seen):
        seen.append(engine.events.get(timeout=30))
    texts = [whole[: 20 + n] + f" {n}?" for n in range(4)]
    forks = [Fork(request_id=str(n), prompt=t, params=GREEDY) for n, t in enumerate(texts)]
    events = engine.ask(*forks)
    for n, text in enumerate(texts):
        started = events[str(n)][0]
        assert isinstance(started, Started)
        assert started.cached_tokens >= 20 + n
        assert tokens_of(events[str(n)]) == expected_greedy(engine.codec, text, 24)
    engine.inbox.put(Cancel("long"))
    seen += events.get("long", [])
    if not isinstance(seen[-1], Finished):
        seen += engine.collect({"long"})["long"]
    assert tokens_of(seen) == expected_greedy(engine.codec, whole, len(tokens_of(seen)))
    # What an answer's last step has yet to move is no part of a fork.
    text = whole + text_of(seen)
    fork = engine.ask(Fork(request_id="on", prompt=text, params=GREEDY))["on"]
    assert tokens_of(fork) == expected_greedy(engine.codec, text, 24)


def test_cancelling_what_only_waits_ends_it_too() -> None:
    engine = Engine(NO_HEADS, max_num_seqs=1)
    engine.inbox.put(prompt("runs", PROMPTS[0]))
    engine.inbox.put(prompt("waits", PROMPTS[1]))
    engine.inbox.put(Cancel("waits"))
    events = engine.collect({"runs", "waits"})
    engine.stop()
    assert len(tokens_of(events["runs"])) == 24
    assert [type(e) for e in events["waits"]] == [Finished]


def test_more_requests_than_slots_are_all_answered() -> None:
    engine = Engine(NO_HEADS, max_num_seqs=2)
    events = engine.ask(*(prompt(str(i), text) for i, text in enumerate(PROMPTS)))
    expected = [expected_greedy(engine.codec, text, 24) for text in PROMPTS]
    engine.stop()
    assert [tokens_of(events[str(i)]) for i in range(len(PROMPTS))] == expected


def test_sequences_are_admitted_by_the_rows_that_they_may_come_to_have() -> None:
    engine = Engine(NO_HEADS, max_num_seqs=8, max_batch_total_tokens=100)
    taken: list[int] = []
    emit = engine.scheduler.emit

    def watch(event: Event) -> None:
        if isinstance(event, Started):
            busy = [slot for slot in engine.scheduler.slots.slots if slot.busy]
            taken.append(sum(slot.taken for slot in engine.scheduler.slots.slots))
            assert sum(slot.reserved for slot in busy) <= 100
        emit(event)

    engine.scheduler.emit = watch
    events = engine.ask(*(prompt(str(i), text) for i, text in enumerate(PROMPTS)))
    assert [tokens_of(events[str(i)]) for i in range(len(PROMPTS))] == [
        expected_greedy(engine.codec, text, 24) for text in PROMPTS
    ]
    # The order is kept: a long one is not passed by short ones.
    assert len(taken) == len(PROMPTS)
    assert max(taken) <= 100
    # A prompt that can never fit is told so; an answer without a limit has what there is.
    bad = engine.ask(prompt("bad", "x" * 100))["bad"][-1]
    full = engine.ask(prompt("full", "x" * 90, SamplingParams(temperature=0)))["full"][-1]
    engine.stop()
    assert isinstance(bad, Failed)
    assert "max_batch_total_tokens" in bad.message
    assert isinstance(full, Finished)
    assert (full.context_full, full.prompt_tokens + full.completion_tokens) == (True, 100)


def test_a_queue_of_thousands_is_cancelled_at_once() -> None:
    engine = Engine(NO_HEADS, max_num_seqs=1)
    engine.inbox.put(prompt("runs", PROMPTS[1]))
    names = [f"w{n}" for n in range(4000)]
    for name in names:
        engine.inbox.put(prompt(name, "x"))
    for name in reversed(names):
        engine.inbox.put(Cancel(name))
    events = engine.collect({"runs", *names})
    engine.stop()
    ended = [events[name][-1] for name in names]
    assert all(isinstance(event, Finished) for event in ended)
    assert len(tokens_of(events["runs"])) == 24


def test_a_stop_string_ends_the_text_before_it(plain: Engine) -> None:
    whole = text_of(plain.ask(prompt("all", PROMPTS[3]))["all"])
    stop = whole[9:12]
    params = SamplingParams(temperature=0, max_tokens=24, stop=(stop,))
    events = plain.ask(prompt("cut", PROMPTS[3], params))["cut"]
    assert text_of(events) == whole[: whole.index(stop)]
    assert events[-1].finish_reason == "stop"


def test_a_full_context_is_told_from_a_token_limit(plain: Engine) -> None:
    text = "x" * (CONTEXT - 10)
    done = plain.ask(prompt("full", text, SamplingParams(temperature=0)))["full"][-1]
    assert (done.finish_reason, done.context_full) == ("length", True)
    assert done.prompt_tokens + done.completion_tokens == CONTEXT
    done = plain.ask(prompt("short", "x", SamplingParams(temperature=0, max_tokens=3)))["short"][-1]
    assert (done.finish_reason, done.context_full, done.completion_tokens) == ("length", False, 3)


def test_max_steps_caps_decode_steps_where_it_is_set() -> None:
    engine = Engine(NO_HEADS, max_steps=5)
    done = engine.ask(prompt("a", PROMPTS[1]))["a"][-1]
    engine.stop()
    assert (done.finish_reason, done.completion_tokens) == ("length", 6)


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (prompt("bad", "x" * CONTEXT), "prompt_too_long"),
        (prompt("bad", ""), "invalid_request"),
        (prompt("bad", "x", SamplingParams(temperature=-1)), "invalid_request"),
        (prompt("bad", "x", SamplingParams(top_p=0)), "invalid_request"),
        (prompt("bad", "x", SamplingParams(max_tokens=0)), "invalid_request"),
    ],
)
def test_a_bad_request_fails_alone(plain: Engine, request_: Generate, code: str) -> None:
    events = plain.ask(request_, prompt("good", "x"))
    assert isinstance(events["bad"][-1], Failed)
    assert events["bad"][-1].code == code
    assert len(tokens_of(events["good"])) == 24


def test_a_seeded_answer_is_the_same_whatever_the_tree_and_the_batch() -> None:
    params = SamplingParams(temperature=1.0, top_p=0.95, seed=11, max_tokens=20)
    answers = []
    for heads in (NO_HEADS, RANDOM_HEADS, ECHO_HEADS, HYDRA_HEADS):
        engine = Engine(heads)
        alone = engine.ask(prompt("a", PROMPTS[2], params))["a"]
        many = engine.ask(*(prompt(str(i), text, params) for i, text in enumerate(PROMPTS)))
        engine.stop()
        answers += [tokens_of(alone), tokens_of(many["2"])]
    assert all(answer == answers[0] for answer in answers)


def test_a_request_that_names_top_p_gets_nucleus_sampling() -> None:
    config = parse_config(
        {"base_model_name_or_path": "x", "stage_num_hidden_layers_list": [1]}, "test"
    )
    typical = accept_rule(SamplingParams(), config)
    nucleus = accept_rule(SamplingParams(top_p=0.5), config)
    greedy = accept_rule(SamplingParams(temperature=0, top_p=0.5), config)
    assert [typical.rule, nucleus.rule, greedy.rule] == [1, 2, 0]


# --- the tuned tree -------------------------------------------------------------------------------


class Restless(TreeTuner):
    """Uses a tree of another size in every step."""

    def __init__(self, num_heads: int, *, sequential: bool = False) -> None:
        super().__init__(num_heads, sequential=sequential)
        self.used: list[int] = []

    @property
    def heads(self) -> int:
        """Often too few: what was not drafted for must be decoded all the same."""
        return 5 * len(self.used) % 6

    def step(self, sequences: int) -> Tree:
        trees = [tree for tree, _ in self.trees()]
        self.tree = trees[(7 * len(self.used)) % len(trees)]
        self.used.append(self.tree.size)
        return self.tree


@pytest.mark.parametrize("shape", ["echo", "root", "hydra"])
def test_greedy_tokens_are_the_same_whatever_tree_each_step_uses(shape: str) -> None:
    heads = SHAPES[shape]
    drafting = Restless(5, sequential=shape == "hydra")
    engine = Engine(heads, drafting=drafting)
    expected = [expected_greedy(engine.codec, text, 24) for text in PROMPTS]
    alone = engine.ask(prompt("one", PROMPTS[0]))["one"]
    events = engine.ask(*(prompt(str(i), text) for i, text in enumerate(PROMPTS)))
    engine.stop()
    assert tokens_of(alone) == expected[0]
    assert [tokens_of(events[str(i)]) for i in range(len(PROMPTS))] == expected
    assert set(drafting.used) == set(SIZES)


def test_a_seeded_nucleus_answer_is_the_same_whatever_tree_each_step_uses() -> None:
    params = SamplingParams(temperature=1.0, top_p=0.95, seed=11, max_tokens=40)
    answers = []
    for drafting in (None, Restless(5)):
        engine = Engine(ECHO_HEADS, drafting=drafting)
        answers.append(tokens_of(engine.ask(prompt("a", PROMPTS[2], params))["a"]))
        engine.stop()
    assert answers[0] == answers[1]


def test_a_tuner_gives_up_on_heads_that_are_never_right_and_says_so() -> None:
    tuner = TreeTuner(5)
    tuner.begin({1: 0.010, 64: 0.074}, undrafted=0.0095)
    assert tuner.tree.size > 1
    engine = Engine(RANDOM_HEADS, drafting=tuner)
    # The costs of this tiny model are no matter here: only what its heads are right about is.
    tuner.timed = lambda *args, **named: None  # type: ignore[method-assign]
    params = SamplingParams(temperature=0, max_tokens=80)
    events = engine.ask(prompt("a", PROMPTS[1], params), prompt("b", PROMPTS[2], params))
    alone = engine.ask(prompt("c", PROMPTS[3], params))["c"]
    rows = engine.stage.meter.rows
    engine.stop()
    assert tuner.tree.size == engine.chosen[-1].nodes == 1
    assert engine.chosen[0].nodes > 1
    assert [option.nodes for option in engine.chosen[-1].options] == list(SIZES)
    done = alone[-1]
    assert isinstance(done, Finished)
    assert done.metrics.mean_accepted_len < 1.1
    assert rows < 600
    for name, index in (("a", 1), ("b", 2)):
        assert tokens_of(events[name]) == expected_greedy(engine.codec, PROMPTS[index], 80)


class Predicting(TreeTuner):
    """Notes what it expected of each step that had candidates, and what the step made."""

    def __init__(self, num_heads: int) -> None:
        super().__init__(num_heads)
        self.expected: float = 0
        self.made = self.steps = 0

    def observe(self, drafted: Drafted, tokens: Iterable[int]) -> None:
        tokens = list(tokens)
        self.steps += 1
        self.expected += self.expected_tokens(self.tree)
        self.made += len(tokens)
        super().observe(drafted, tokens)


def test_a_tuner_expects_of_its_tree_what_steps_then_make() -> None:
    tuner = Predicting(5)
    tuner.begin({1: 0.010, 64: 0.012}, undrafted=0.0095)
    engine = Engine(ECHO_HEADS, drafting=tuner)
    tuner.timed = lambda *args, **named: None  # type: ignore[method-assign]
    params = SamplingParams(temperature=0, max_tokens=60)
    for _ in range(2):  # learn, then be tried
        tuner.expected = tuner.made = tuner.steps = 0
        engine.ask(*(prompt(str(i), text, params) for i, text in enumerate(PROMPTS)))
    engine.stop()
    assert tuner.made > 1.5 * tuner.steps
    assert tuner.expected == pytest.approx(tuner.made, rel=0.15)


def test_a_rehearsal_measures_sizes_and_leaves_nothing_behind() -> None:
    engine = Engine(ECHO_HEADS)
    measured, undrafted, one_head = rehearse(
        engine.stage, None, 0, context_length=CONTEXT, largest=48
    )
    assert {1, 16} <= set(measured) <= {size for size in SIZES if size <= 48}
    assert all(0 < seconds < 10 for seconds in (*measured.values(), undrafted, one_head))
    answer = tokens_of(engine.ask(prompt("a", PROMPTS[5]))["a"])
    engine.stop()
    assert answer == expected_greedy(engine.codec, PROMPTS[5], 24)
