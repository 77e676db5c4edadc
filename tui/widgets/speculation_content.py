"""Acceptance and draft trees as text."""

from __future__ import annotations

from textual.content import Content

from engine.protocol import StepTrace, TreeChosen, TreeOption
from tui import metrics
from tui.speculation import (
    RECENT_STEPS,
    ROOT,
    UNTRACED,
    Acceptance,
    AnswerTrace,
    TreeLine,
    tree_lines,
)
from tui.themes import DIM
from tui.token_layout import visible
from tui.widgets.token_text import head_style

LABEL_CELLS = 9
RECENT_CELLS = 19
BAR_CELLS = 6
WEIGHED = (1, 4, 16, 64)
"""Sizes of trees whose expected speed is shown beside the chosen; there is no room for all."""
NOTHING_YET = "No step was traced yet: the answers from now on will show how each token came."
LOOK = "others: click, or Shift+Tab"
MARKS = {"root": "", "accepted": "✓", "next": "✓", "rejected": "✗"}


def acceptance(
    recent: Acceptance, whole: Acceptance, heads: int | None, tuned: TreeChosen | None = None
) -> Content:
    """The legend and the figures: one line per head, of the last steps and of all.

    Where the tree is tuned, also what it is now, and the speeds that it was weighed by.
    """
    about_root = "the model: no heads" if heads == 0 else "the model itself"
    heads = max(heads or 0, len(whole.proposed))
    span = f"last {recent.steps} steps" if recent.steps else f"last {RECENT_STEPS} steps"
    lines = [
        Content.styled(_row("from", span, "conversation"), DIM),
        Content.assemble(_label(" root ", ROOT), (about_root, DIM)),
        *(_head_line(head, recent, whole) for head in range(1, heads + 1)),
        Content.assemble(
            ("per step".ljust(LABEL_CELLS), DIM),
            _tokens(recent).ljust(RECENT_CELLS),
            _tokens(whole),
        ),
    ]
    if tuned is not None:
        lines += _choice(tuned)
    return Content("\n").join(lines)


def _choice(tuned: TreeChosen) -> list[Content]:
    """The tree in use and what it promises, then tokens per second by the nodes of a tree."""
    times = f"×{tuned.sequences}" if tuned.sequences > 1 else ""
    what = "no drafts" if tuned.nodes == 1 else f"{tuned.nodes}{times} nodes"
    promise = f", {tuned.chosen.tokens_per_step:.2f} tokens in {tuned.chosen.step_ms:.3g} ms"
    shown = [option for option in tuned.options if option.nodes in {*WEIGHED, tuned.nodes}]
    weighed = Content(" ").join(
        Content.styled(
            f"{option.nodes}:{_speed(option, tuned.sequences):.0f}",
            "" if option.nodes == tuned.nodes else DIM,
        )
        for option in shown
    )
    return [
        Content.assemble(("tree".ljust(LABEL_CELLS), DIM), what, (promise, DIM)),
        Content.assemble(("tok/s".ljust(LABEL_CELLS), DIM), weighed),
    ]


def _speed(option: TreeOption, sequences: int) -> float:
    return 1000.0 * sequences * option.tokens_per_step / option.step_ms


def _row(label: str, recent: str, whole: str) -> str:
    return label.ljust(LABEL_CELLS) + recent.ljust(RECENT_CELLS) + whole


def _label(text: str, head: int) -> Content:
    return Content.assemble((text, head_style(head)), " " * (LABEL_CELLS - len(text)))


def _tokens(figures: Acceptance) -> str:
    value = figures.tokens_per_step
    return metrics.UNKNOWN if value is None else f"{value:.2f} tokens"


def _head_line(head: int, recent: Acceptance, whole: Acceptance) -> Content:
    rate = recent.rate(head)
    filled, empty = metrics.bar(round((rate or 0) * BAR_CELLS), BAR_CELLS, BAR_CELLS)
    return Content.assemble(
        _label(f" head {head} ", head),
        (filled, "$primary"),
        (empty, "$foreground 25%"),
        f" {_share(head, recent)}".ljust(RECENT_CELLS - BAR_CELLS),
        _share(head, whole),
    )


def _share(head: int, figures: Acceptance) -> str:
    """` 62% 31/50`: accepted of proposed."""
    rate = figures.rate(head)
    if rate is None:
        return f"{metrics.UNKNOWN:>4}"
    return f"{rate:4.0%} {figures.accepted[head - 1]}/{figures.proposed[head - 1]}"


def tree(trace: AnswerTrace | None, token: int | None, width: int) -> Content:
    """The draft tree of a token's step (None: of the latest), `width` cells wide, and its title."""
    if trace is None or not trace.steps:
        return Content.styled(NOTHING_YET, DIM)
    number = len(trace.steps) - 1 if token is None else trace.tokens[token].step
    lines = [_title(trace, token, width)]
    if number >= 0:
        step = trace.steps[number]
        about = Content.styled(f"step {number + 1}/{len(trace.steps)}: {_made(step)}", DIM)
        lines.append(about.truncate(width, ellipsis=True))
        lines += [_tree_line(line, width) for line in tree_lines(step)]
    return Content("\n").join(lines)


def _made(step: StepTrace) -> str:
    if not step.parents:
        return "the first token"
    count = len(step.pieces)
    return f"{count} token{'s' if count != 1 else ''}, {len(step.parents) - 1} drafted"


def _title(trace: AnswerTrace, token: int | None, width: int) -> Content:
    if token is None:
        title = Content.styled("latest step", "bold")
        hint = Content.styled(f" · {LOOK}", DIM)
        return title + hint if title.cell_length + hint.cell_length <= width else title
    looked = trace.tokens[token]
    if looked.head == UNTRACED:
        return Content.styled("how this part came was not traced", DIM)
    origin = f" head {looked.head} " if looked.head else " root "
    left = Content.assemble(
        (f"token {token + 1}/{len(trace.tokens)} ", DIM), (visible(looked.own), "bold")
    )
    room = max(1, width - len(origin) - 1)
    return Content.assemble(
        left.truncate(room, ellipsis=True), " ", (origin, head_style(looked.head))
    )


def _tree_line(line: TreeLine, width: int) -> Content:
    origin = {"root": "before", "next": "root"}.get(line.fate, f"head {line.head}")
    mark = f"{origin} {MARKS[line.fate]:1}"
    kept = line.fate in ("accepted", "next")
    room = max(1, width - len(line.guide) - len(mark) - 1)
    style = head_style(line.head) if kept else DIM
    text = Content.styled(visible(line.text), style).truncate(room, ellipsis=True)
    gap = " " * max(1, width - len(line.guide) - text.cell_length - len(mark))
    return Content.assemble(
        (line.guide, "$foreground 35%"), text, gap, (mark, "$text-success" if kept else DIM)
    )
