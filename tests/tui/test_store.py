"""Conversations on disk: whole, private, found again; and files that are broken."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from engine.protocol import SamplingParams, Transcript
from tui import store as store_module
from tui.conversation import Conversation, Ending
from tui.store import ConversationStore, StoreError


def talk(prompt: str, answer: str = "yes", age_s: float = 0.0) -> Conversation:
    made = Conversation()
    node = made.ask(prompt)
    node.text = answer
    made.end(node, Ending.STOP)
    made.updated_at -= timedelta(seconds=age_s)
    return made


@pytest.fixture
def store(tmp_path: Path) -> ConversationStore:
    return ConversationStore(tmp_path / "deep" / "conversations")


def test_a_conversation_comes_back_as_it_was_saved(store: ConversationStore) -> None:
    saved = talk("Hello", "a\x1b[0m\r\n “ü”")
    cut = saved.ask("Count")
    cut.text, cut.token_ids, cut.model = "one", [5, 6], "m"
    cut.asked = Transcript("prompt", (1, 2))
    saved.end(cut, Ending.LENGTH)
    saved.answer_again(saved.node(1)).ending = Ending.CANCELLED
    saved.switch(saved.node(2), 0)
    saved.name, saved.system = "Greetings", "Be kind."
    saved.params = SamplingParams(temperature=0.0, seed=7)
    store.save(saved)
    loaded = store.load(saved.id)
    assert store_module.encode(loaded) == store_module.encode(saved)
    assert [n.text for n in loaded.path()] == ["Hello", "a\x1b[0m\r\n “ü”", "Count", "one"]


def test_the_file_names_its_version_and_only_its_owner_can_read_it(
    store: ConversationStore,
) -> None:
    saved = talk("Hello")
    store.save(saved)
    file = store.path(saved.id)
    assert json.loads(file.read_text())["version"] == 1
    assert file.stat().st_mode & 0o777 == 0o600
    assert store.folder.stat().st_mode & 0o777 == 0o700


def test_an_answer_that_was_running_is_cut_off_when_it_is_loaded(store: ConversationStore) -> None:
    saved = talk("Hello")
    saved.ask("And?").text = "half an ans"
    store.save(saved)
    assert store.load(saved.id).path()[-1].ending is Ending.INTERRUPTED


def test_the_latest_comes_first(store: ConversationStore) -> None:
    for prompt, age in (("old", 90), ("new", 0), ("older", 900)):
        store.save(talk(prompt, age_s=age))
    assert [entry.title for entry in store.list().entries] == ["new", "old", "older"]


def test_a_search_finds_all_its_words_in_titles_and_texts(store: ConversationStore) -> None:
    store.save(talk("Why is the sky blue?", "Because of Rayleigh scattering of SUNLIGHT."))
    store.save(talk("Name a colour", "Blue."))
    found = store.list("sunlight SKY").entries
    assert [entry.title for entry in found] == ["Why is the sky blue?"]
    assert "SUNLIGHT" in found[0].snippet
    assert len(store.list("blue").entries) == 2
    assert store.list("nowhere").entries == ()


def test_broken_files_are_named_and_the_others_are_listed(store: ConversationStore) -> None:
    store.save(talk("fine"))
    for name, text in (
        ("cut", '{"version": 1, "nodes": [{"id"'),
        ("later", '{"version": 2}'),
        ("tree", '{"version": 1, "nodes": [{"id": 3, "role": "user"}]}'),
        ("bytes", "\xff\x00"),
        ("deep", "[" * 100_000),
    ):
        store.path(name).write_text(text, encoding="latin-1")
    listing = store.list()
    assert [entry.title for entry in listing.entries] == ["fine"]
    assert len(listing.problems) == 5
    for problem in listing.problems:
        assert str(store.folder) in problem and "\n" not in problem
    with pytest.raises(StoreError, match=r"cut\.json: not a conversation"):
        store.load("cut")
    assert store.path("cut").exists()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    blocked = ConversationStore(tmp_path / "file" / "conversations")
    with pytest.raises(StoreError, match="cannot be written: Not a directory"):
        blocked.save(talk("x"))
    assert blocked.list().entries == ()
    blocked.delete("x")


def test_a_failed_write_leaves_the_old_file_and_no_litter(
    store: ConversationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = talk("before")
    store.save(saved)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    saved.name = "after"
    with pytest.raises(StoreError, match="No space left"):
        store.save(saved)
    assert store.load(saved.id).title == "before"
    assert [file.name for file in store.folder.iterdir()] == [f"{saved.id}.json"]


def test_a_process_killed_while_it_saves_leaves_a_whole_file(store: ConversationStore) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from tui.conversation import Conversation; from tui.store import ConversationStore\n"
        "store = ConversationStore(Path(sys.argv[1])); talk = Conversation(id='it')\n"
        "node = talk.ask('go')\n"
        "while True:\n"
        "    node.text += 'word ' * 2000; store.save(talk)\n"
        "    print(len(node.text), flush=True)\n"
    )
    command = [sys.executable, "-c", script, str(store.folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(4):
            told = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
    assert len(store.load("it").path()[-1].text) >= told


def test_renaming_and_deleting(store: ConversationStore) -> None:
    saved = talk("Hello")
    store.save(saved)
    store.rename(saved.id, "  Hi \n there ")
    assert store.list().entries[0].title == "Hi"
    store.rename(saved.id, "")
    assert store.list().entries[0].title == "Hello"
    store.delete(saved.id)
    store.delete(saved.id)
    assert store.list().entries == ()
    with pytest.raises(StoreError, match="no such conversation"):
        store.load(saved.id)


def test_what_another_process_has_written_is_not_overwritten(store: ConversationStore) -> None:
    saved = talk("Hello")
    store.save(saved)
    other = ConversationStore(store.folder)
    theirs = other.load(saved.id)
    theirs.ask("from the other window")
    other.save(theirs)
    with pytest.raises(StoreError, match="another Jupiter has changed it"):
        store.save(saved)
    assert len(store.load(saved.id).nodes) == 4
    store.save(saved)  # having read the newer state, this one knows what it replaces
