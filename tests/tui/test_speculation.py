"""Where tokens come from, what the heads are worth, and trees as lines."""

from __future__ import annotations

from engine.protocol import Metrics, StepTrace
from tui.speculation import (
    RECENT_STEPS,
    ROOT,
    UNTRACED,
    Acceptance,
    AnswerTrace,
    Speculation,
    of_metrics,
    of_step,
    tree_lines,
)

FIRST = StepTrace(next_text="The", pieces=("The",))
# The -> cat (sat, ran (off)), dog; "cat" and "ran" were accepted, then the model wrote "away".
STEP = StepTrace(
    texts=("The", " cat", " dog", " sat", " ran", " off"),
    parents=(-1, 0, 0, 1, 1, 4),
    path=(0, 1, 4),
    next_text=" away",
    pieces=(" cat", " ran", " away"),
)
NOTHING_ACCEPTED = StepTrace(
    texts=(" away", " x"), parents=(-1, 0), path=(0,), next_text=".", pieces=(".",)
)


def test_each_token_has_the_head_that_drafted_it_and_the_step_that_made_it() -> None:
    trace = AnswerTrace()
    for step in (FIRST, STEP, NOTHING_ACCEPTED):
        trace.add(step)
    assert [(t.text, t.head, t.step) for t in trace.tokens] == [
        ("The", ROOT, 0),
        (" cat", 1, 1),
        (" ran", 2, 1),
        (" away", ROOT, 1),
        (".", ROOT, 2),
    ]


def test_tokens_behind_the_end_of_an_answer_are_not_listed() -> None:
    trace = AnswerTrace()
    trace.add(
        StepTrace(
            texts=("a", "<end>", "b"),
            parents=(-1, 0, 1),
            path=(0, 1, 2),
            next_text="c",
            pieces=("",),
        )
    )
    assert [(t.text, t.own, t.head) for t in trace.tokens] == [("", "<end>", 1)]


def test_text_of_which_nothing_is_known_is_untraced() -> None:
    known = Speculation()
    known.begin(4, "Begun before. ")
    known.grew(4, [FIRST], "Begun before. The end")
    assert [(t.text, t.head) for t in known.traces[4].tokens] == [
        ("Begun before. ", UNTRACED),
        ("The", ROOT),
        (" end", UNTRACED),
    ]
    known.begin(4, "Begun before. The end")
    assert len(known.traces[4].tokens) == 3


def test_acceptance_counts_the_heads_that_a_path_reached() -> None:
    assert of_step(FIRST) == Acceptance()
    assert of_step(STEP) == Acceptance(1, 3, (1, 1, 1), (1, 1, 0))
    both = of_step(STEP) + of_step(NOTHING_ACCEPTED)
    assert both == Acceptance(2, 4, (2, 1, 1), (1, 1, 0))
    assert (both.tokens_per_step, both.rate(1), both.rate(2), both.rate(4)) == (2.0, 0.5, 1.0, None)
    assert Acceptance().tokens_per_step is None


def test_the_recent_figures_forget_and_those_of_the_conversation_do_not() -> None:
    known = Speculation()
    known.begin(2, "")
    known.grew(2, [FIRST, STEP, *[NOTHING_ACCEPTED] * RECENT_STEPS], "")
    assert known.recent == Acceptance(RECENT_STEPS, RECENT_STEPS, (RECENT_STEPS,), (0,))
    assert known.whole.accepted == (1, 1, 0)
    known.begin(4, "")
    known.grew(4, [STEP], "")
    assert known.recent.accepted == (1, 1, 0)
    assert known.whole.accepted == (2, 2, 0)


def test_answers_without_a_trace_count_in_the_conversation_by_the_engines_figures() -> None:
    metrics = Metrics(
        decode_steps=10,
        mean_accepted_len=1.6,
        proposed_per_head=(10, 10),
        accepted_per_head=(5, 1),
    )
    assert of_metrics(metrics) == Acceptance(10, 16, (10, 10), (5, 1))
    known = Speculation()
    known.begin(2, "")
    known.grew(2, [STEP], "")
    known.ended_untraced(metrics)
    assert known.whole == Acceptance(11, 19, (11, 11, 1), (6, 2, 0))
    assert known.recent == of_step(STEP)


def test_a_tree_is_drawn_with_its_accepted_branch_on_top() -> None:
    assert [(line.guide + line.text, line.head, line.fate) for line in tree_lines(STEP)] == [
        ("The", 0, "root"),
        ("├─  cat", 1, "accepted"),
        ("│  ├─  ran", 2, "accepted"),
        ("│  │  ├─  away", 0, "next"),
        ("│  │  └─  off", 3, "rejected"),
        ("│  └─  sat", 2, "rejected"),
        ("└─  dog", 1, "rejected"),
    ]
    assert [line.text for line in tree_lines(FIRST)] == ["The"]
    leaf = tree_lines(StepTrace(texts=("a",), parents=(-1,), path=(0,), next_text="b", pieces=()))
    assert [(line.guide, line.fate) for line in leaf] == [("", "root"), ("└─ ", "next")]
