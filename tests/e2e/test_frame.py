"""Around the screens, in a real terminal: the modes, suspending, resizing, colours, keys."""

from __future__ import annotations

import json
import re
from pathlib import Path

import psutil
import pytest

from tests.e2e.terminal import ALTERNATE_SCREEN, CTRL_Q, ENTER, MAIN_SCREEN
from tests.e2e.test_chat import (
    ANSWER_S,
    START_S,
    answer_tokens,
    assert_left_clean,
    one_line,
    rest_state,
    tiny_chat,
    workers,
)

CTRL_Z, F1, F2, F3, F4, F5 = "\x1a", "\x1bOP", "\x1bOQ", "\x1bOR", "\x1bOS", "\x1b[15~"
COLOUR = re.compile(rb"\x1b\[[\d;]*\b(?:3[0-7]|4[0-7]|9[0-7]|10[0-7]|[34]8)[\d;]*m")


def test_every_screen_opens_by_its_key_and_the_last_one_quits_clean(tmp_path: Path) -> None:
    with tiny_chat(tmp_path) as terminal:
        terminal.wait_for(rest_state, START_S)
        terminal.send(F3)
        terminal.wait_for("2 layers")
        terminal.send(F4)
        terminal.wait_for("tokens/s")
        terminal.send(F5)
        terminal.wait_for("New run")
        terminal.send(F1)
        terminal.wait_for("Help: Training")
        terminal.send("q")
        terminal.send(F2)
        terminal.wait_for("Ask something")
        terminal.send(F5)
        terminal.wait_for("New run")
        terminal.send(CTRL_Q)
        assert terminal.wait_exit() == 0
        assert_left_clean(terminal)


def test_ctrl_z_leads_to_the_shell_and_fg_back_to_a_chat_whose_engine_lived_on(
    tmp_path: Path,
) -> None:
    with tiny_chat(tmp_path, shell=True) as terminal:
        terminal.wait_for(rest_state, START_S)
        stages = workers(terminal)
        terminal.send("hello")
        terminal.wait_for("hello")
        terminal.send(CTRL_Z)
        terminal.wait_for("Stopped")
        assert terminal.transcript.rfind(MAIN_SCREEN) > terminal.transcript.rfind(ALTERNATE_SCREEN)
        terminal.send("echo back-$((40 + 2))\n")
        terminal.wait_for(lambda screen: screen.count("back-42") == 1 and "echo back-$" in screen)
        assert all(psutil.pid_exists(pid) for pid in stages)
        terminal.send("fg\n")
        terminal.wait_for(lambda screen: rest_state(screen) and "hello" in screen)
        assert workers(terminal) == stages
        terminal.send(ENTER)
        terminal.wait_for(lambda screen: answer_tokens(screen) > 0, ANSWER_S)
        terminal.wait_for(rest_state, ANSWER_S)
        terminal.send(CTRL_Q)
        terminal.wait_for("bash")
        terminal.send("exit 0\n")
        assert terminal.wait_exit() == 0
        terminal.wait_gone()


def test_the_screen_follows_the_window_s_size(tmp_path: Path) -> None:
    with tiny_chat(tmp_path) as terminal:
        terminal.wait_for(rest_state, START_S)
        for columns, rows in ((80, 24), (200, 60), (120, 36)):
            terminal.resize(columns, rows)
            terminal.wait_for(
                lambda screen, columns=columns, rows=rows: (
                    len(screen.splitlines()) == rows
                    and screen.splitlines()[0].endswith("ready")
                    and columns - 2 <= len(screen.splitlines()[0]) <= columns
                    and "palette" in screen.splitlines()[-1]
                )
            )
        terminal.send(CTRL_Q)
        assert terminal.wait_exit() == 0
        assert_left_clean(terminal)


def test_no_color_is_obeyed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    with tiny_chat(tmp_path) as terminal:
        terminal.wait_for(rest_state, START_S)
        terminal.send(F4)
        terminal.wait_for("tokens/s")
        terminal.send(CTRL_Q)
        assert terminal.wait_exit() == 0
        assert not COLOUR.search(terminal.transcript)
        assert_left_clean(terminal)


def test_a_keymap_that_clashes_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    keymap = json.dumps({"chat.new": "f1"})
    with tiny_chat(tmp_path, "--set", f"keymap={keymap}") as terminal:
        assert terminal.wait_exit(timeout=30) == 2
        assert one_line(terminal)
        assert "'chat.new' and 'app.help' cannot both be on 'f1'" in terminal.screen
