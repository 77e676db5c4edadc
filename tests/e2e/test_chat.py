"""The chat in a real terminal: the shipped command, real stages, the default model."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.e2e.terminal import (
    ALTERNATE_SCREEN,
    CTRL_J,
    CTRL_Q,
    ENTER,
    ESCAPE,
    JUPITER_TUI,
    MAIN_SCREEN,
    SHOW_CURSOR,
    Terminal,
    wait_gone,
)
from tests.tiny import tiny_folder

START_S = 90.0
ANSWER_S = 60.0


def chat(state: Path, *words: str, columns: int = 120, rows: int = 36) -> Terminal:
    command = [JUPITER_TUI, "--config", "config.json", "--set", "temperature=0", *words]
    return Terminal(command, state, columns=columns, rows=rows)


def tiny_chat(folder: Path, *words: str, shell: bool = False) -> Terminal:
    """A chat with two stages of a tiny random model, which starts in seconds."""
    config = folder / "tiny.json"
    values = {
        "base_model_name_or_path": str(tiny_folder(layers=4)),
        "stage_num_hidden_layers_list": [2, 2],
        "temperature": 0.0,
        "num_threads": 1,
    }
    config.write_text(json.dumps(values))
    command = [JUPITER_TUI, "--config", str(config), *words]
    if not shell:
        return Terminal(command, folder / "state")
    terminal = Terminal(["bash", "--norc", "--noprofile", "-i"], folder / "state")
    terminal.wait_for("bash")
    terminal.send(" ".join(command) + "\n")
    return terminal


def shows(pattern: str) -> Callable[[str], object]:
    """Whether a line of the screen matches `pattern`."""
    return lambda screen: re.search(pattern, screen)


def rest_state(screen: str) -> bool:
    """Whether the engine is ready and nothing is being answered."""
    return "● ready" in screen


def workers(terminal: Terminal) -> list[int]:
    """The pids of the stages; each is a fork of a process that torchrun has started."""
    found = [p for p in terminal.processes() if p.name().startswith("jupiter-rank-")]
    return [p.pid for p in found if p.ppid() in {other.pid for other in found}]


def assert_left_clean(terminal: Terminal) -> None:
    """No process, and the terminal as before."""
    terminal.wait_gone()
    written = terminal.transcript
    assert written.rfind(MAIN_SCREEN) > written.rfind(ALTERNATE_SCREEN) >= 0
    assert written.rfind(SHOW_CURSOR) > written.rfind(b"\x1b[?25l")
    assert terminal.modes_restored


def test_a_chat_from_start_to_quit(default_model: Path, tmp_path: Path) -> None:
    with chat(tmp_path / "state", "--set", "max_new_tokens=1200") as terminal:
        terminal.wait_for("starting", timeout=10)
        terminal.wait_for(shows(r"stage 1 .* \d+/\d+ tensors"), START_S)
        terminal.send("What is the capital of France?" + ENTER)
        terminal.wait_for("Paris", START_S)
        terminal.wait_for(rest_state, ANSWER_S)
        terminal.wait_for(shows(r"first token \d.* m?s  \d.* tok/s  [1-5]\.\d\d tok/step  15\|15"))

        # An answer that goes on for longer than the test looks at it.
        story = "Write a long story about a dragon and a small village."
        terminal.send(story + CTRL_J + "Go." + ENTER)
        terminal.wait_for("● answering")
        terminal.wait_for(lambda screen: answer_tokens(screen) >= 10, ANSWER_S)
        terminal.send(ESCAPE)
        terminal.wait_for("stopped", timeout=10)
        terminal.wait_for(rest_state)

        terminal.send("Thank you. Say goodbye." + ENTER)
        terminal.wait_for("● answering")
        terminal.wait_for(rest_state, ANSWER_S)
        # The turns before are still in the KV cache: only what is new was prefilled.
        terminal.wait_for(shows(r" \d{2} new, \d{2,3} cached"))

        terminal.send(CTRL_Q)
        assert terminal.wait_exit(timeout=10) == 0
        assert_left_clean(terminal)


def test_the_bundled_heads_change_no_answer_and_show_what_they_gain(
    default_model: Path, tmp_path: Path
) -> None:
    answers, gains = [], []
    for name, words in {"with": (), "without": ("--no-heads",)}.items():
        state = tmp_path / name
        with chat(state, "--set", "max_new_tokens=80", *words) as terminal:
            terminal.wait_for(rest_state, START_S)
            terminal.send("Give three tips for staying healthy." + ENTER)
            terminal.wait_for(lambda screen: answer_tokens(screen) > 0, ANSWER_S)
            terminal.wait_for(rest_state, ANSWER_S)
            screen = terminal.wait_for(shows(r"\d\.\d\d tok/step"))
            (gain,) = re.findall(r"(\d\.\d\d) tok/step", screen)
            gains.append(float(gain))
            terminal.send(CTRL_Q)
            assert terminal.wait_exit() == 0
        (file,) = (state / "conversations").glob("*.json")
        answers.append(json.loads(file.read_text())["nodes"][1]["text"])
    assert answers[0] == answers[1] != ""
    assert gains[0] > 1.2 and gains[1] == 1


def answer_tokens(screen: str) -> int:
    """The length of the latest answer as the status line tells it, 0 when it does not."""
    found = re.search(r"answer ([\d,]+) tokens", screen)
    return int(found[1].replace(",", "")) if found else 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--stages", "15;15"], "--stages 15;15"),
        (["--set", "temperatur=0"], "did you mean 'temperature'"),
        (["--config", "nowhere.json"], "nowhere.json"),
        (["--resume"], "--batch"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(
    words: Sequence[str], told: str, tmp_path: Path
) -> None:
    with Terminal([JUPITER_TUI, *words], tmp_path) as terminal:
        assert terminal.wait_exit() == 2
        assert one_line(terminal) and told in terminal.screen


def test_a_split_that_does_not_fit_the_model_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    with tiny_chat(tmp_path, "--stages", "2,3") as terminal:
        assert terminal.wait_exit(timeout=30) == 2
        last = terminal.transcript.rpartition(MAIN_SCREEN)[2].decode()
        line = re.sub(r"\x1b\[[?<>]?\d*[a-zA-Z]", "", last).strip()
        assert "\n" not in line and line.startswith("jupiter-tui: ")
        assert "stage_num_hidden_layers_list" in line or "layers" in line
        assert_left_clean(terminal)


def one_line(terminal: Terminal) -> bool:
    """Whether the program wrote one line, and opened no screen."""
    written = terminal.transcript
    return written.count(b"\n") == 1 and ALTERNATE_SCREEN not in written


def test_a_prompt_longer_than_the_context_is_explained_and_the_chat_goes_on(
    tmp_path: Path,
) -> None:
    with tiny_chat(tmp_path, "--set", "max_kv_cache_length=64") as terminal:
        terminal.wait_for(rest_state, START_S)
        terminal.send("word " * 100 + ENTER)
        terminal.wait_for("This prompt does not fit")
        terminal.wait_for(rest_state)
        terminal.send("hi" + ENTER)
        terminal.wait_for(lambda screen: answer_tokens(screen) > 0, ANSWER_S)
        terminal.wait_for(rest_state, ANSWER_S)
        terminal.send(CTRL_Q)
        assert terminal.wait_exit() == 0
        assert_left_clean(terminal)


def test_a_killed_stage_is_named_in_the_chat_and_replaced(tmp_path: Path) -> None:
    with tiny_chat(tmp_path) as terminal:
        terminal.wait_for(rest_state, START_S)
        os.kill(workers(terminal)[1], signal.SIGKILL)
        screen = terminal.wait_for("recovering, attempt 1", START_S)
        assert "SIGKILL" in screen and "Traceback" not in screen
        terminal.wait_for(rest_state, START_S)
        terminal.send("hi" + ENTER)
        terminal.wait_for(lambda screen: answer_tokens(screen) > 0, ANSWER_S)
        terminal.send(CTRL_Q)
        assert terminal.wait_exit() == 0
        assert_left_clean(terminal)


def test_sigterm_ends_the_run_and_leaves_nothing(tmp_path: Path) -> None:
    with tiny_chat(tmp_path) as terminal:
        terminal.wait_for(rest_state, START_S)
        os.kill(terminal.pid, signal.SIGTERM)
        assert terminal.wait_exit() == 143
        assert_left_clean(terminal)


def test_a_closed_window_ends_the_run_and_leaves_nothing(tmp_path: Path) -> None:
    with tiny_chat(tmp_path) as terminal:
        terminal.wait_for(rest_state, START_S)
        terminal.close_window()
        terminal.wait_gone(timeout=5)


def test_quitting_while_the_engine_starts_leaves_nothing(tmp_path: Path) -> None:
    with tiny_chat(tmp_path) as terminal:
        terminal.wait_for(lambda _: workers(terminal), START_S)
        terminal.send(CTRL_Q)
        assert terminal.wait_exit() == 0
        assert_left_clean(terminal)


def test_a_workbench_that_is_killed_outright_leaves_a_usable_terminal(tmp_path: Path) -> None:
    with tiny_chat(tmp_path, shell=True) as terminal:
        terminal.wait_for(rest_state, START_S)
        (workbench,) = (
            process
            for process in terminal.processes()
            if process.ppid() == terminal.pid and JUPITER_TUI in process.cmdline()
        )
        run = [process for process in terminal.processes() if process.pid != terminal.pid]
        os.kill(workbench.pid, signal.SIGKILL)
        terminal.wait_for("jupiter-tui was killed")
        assert not wait_gone(run, timeout=5)
        assert terminal.transcript.rfind(MAIN_SCREEN) > terminal.transcript.rfind(ALTERNATE_SCREEN)
        terminal.send("echo back-$((40 + 2))\n")
        terminal.wait_for(lambda screen: screen.count("back-42") == 1 and "echo back-$" in screen)
        terminal.send("exit 0\n")
        assert terminal.wait_exit() == 0
