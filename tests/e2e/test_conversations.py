"""Conversations of a real run: continued exactly, and still there after kill -9."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

from tests.e2e.terminal import CTRL_Q, ENTER, JUPITER_TUI, Terminal, wait_gone
from tests.tiny import tiny_folder
from tui.conversation import Conversation, Ending, Node
from tui.store import ConversationStore, StoreError

START_S = 90.0
ANSWER_S = 60.0
LIMIT = 60
CTRL_B, CTRL_G, CTRL_L = "\x02", "\x07", "\x0c"


def chat(folder: Path, *words: str) -> Terminal:
    """A chat with two stages of a tiny random model, which starts in seconds."""
    config = folder / "tiny.json"
    values = {
        "base_model_name_or_path": str(tiny_folder(layers=4)),
        "stage_num_hidden_layers_list": [2, 2],
        "temperature": 0.0,
        "num_threads": 1,
    }
    config.write_text(json.dumps(values))
    return Terminal([JUPITER_TUI, "--config", str(config), *words], folder / "state")


def saved(folder: Path) -> Conversation | None:
    """The one conversation on disk, as it is now."""
    store = ConversationStore(folder / "state" / "conversations")
    try:
        (entry,) = store.list().entries
        return store.load(entry.id)
    except (ValueError, StoreError):
        return None


def last(folder: Path) -> Node:
    talk = saved(folder)
    return Node(id=1, role="assistant") if talk is None else talk.path()[-1]


def ended(folder: Path, ending: Ending, node_id: int, tokens: int = 0) -> bool:
    """Whether the message `node_id` ends the shown branch, and ended that way."""
    node = last(folder)
    return (node.id, node.ending) == (node_id, ending) and len(node.token_ids) >= tokens


def test_a_cut_off_answer_continues_after_kill_9_as_the_undisturbed_one(tmp_path: Path) -> None:
    with chat(tmp_path) as terminal:
        terminal.wait_for("● ready", START_S)
        terminal.send("Tell me a story." + ENTER)
        terminal.wait_for(lambda _: ended(tmp_path, Ending.STOP, 2), ANSWER_S)
        whole = last(tmp_path)

        run = terminal.processes()
        os.kill(terminal.pid, signal.SIGKILL)
        assert terminal.wait_exit() == -signal.SIGKILL
        assert not wait_gone(run, timeout=10)

    with chat(tmp_path, "--set", f"max_new_tokens={LIMIT}") as terminal:
        terminal.wait_for("● ready", START_S)
        terminal.send(CTRL_B)
        terminal.wait_for("Rename")
        terminal.send(ENTER)
        terminal.wait_for("Again")
        terminal.send(CTRL_G)
        terminal.wait_for(lambda _: ended(tmp_path, Ending.LENGTH, 3), ANSWER_S)
        assert len(last(tmp_path).token_ids) == LIMIT < len(whole.text)
        terminal.wait_for("cut off at the length limit   ‹ 2/2 ›   continue")
        while last(tmp_path).ending is Ending.LENGTH:
            tokens = len(last(tmp_path).token_ids)
            terminal.wait_for("continue")
            terminal.send(CTRL_L)
            terminal.wait_for(
                lambda _, tokens=tokens: (
                    ended(tmp_path, Ending.STOP, 3) or ended(tmp_path, Ending.LENGTH, 3, tokens + 1)
                ),
                ANSWER_S,
            )
        assert last(tmp_path).text == whole.text
        terminal.send(CTRL_Q)
        assert terminal.wait_exit() == 0
        terminal.wait_gone()
