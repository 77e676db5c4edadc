"""The prompts that were sent before, over all conversations: Up and Down bring them back."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from engine.paths import make_private, state_dir
from tui.store import write_private

KEPT = 500


class PromptHistory:
    """Prompts of this and earlier runs, one JSON string per line of a private file."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = state_dir() / "prompt_history.jsonl" if path is None else path
        self._prompts = self._read()
        self._at = len(self._prompts)
        self._draft = ""

    @property
    def prompts(self) -> Sequence[str]:
        """Oldest first, no two alike in a row."""
        return self._prompts

    def add(self, prompt: str) -> None:
        """Keep a prompt; raises OSError when that works for this run only."""
        if self._prompts[-1:] != [prompt]:
            self._prompts.append(prompt)
        self._at = len(self._prompts)
        self._append(prompt)

    def older(self, draft: str) -> str | None:
        """The prompt before the shown one, None at the oldest; `draft` is what is shown now."""
        if self._at == 0:
            return None
        if self._at == len(self._prompts):
            self._draft = draft
        self._at -= 1
        return self._prompts[self._at]

    def newer(self) -> str | None:
        """The prompt after the shown one, after the last one the draft; None at the draft."""
        if self._at == len(self._prompts):
            return None
        self._at += 1
        return self._draft if self._at == len(self._prompts) else self._prompts[self._at]

    def _read(self) -> list[str]:
        try:
            lines = self._path.read_bytes().splitlines()
        except OSError:
            return []
        prompts: list[str] = []
        for line in lines:
            try:
                prompt = msgspec.json.decode(line, type=str)
            except ValueError:
                continue  # a line that was cut off, or is nobody's: the others are fine
            if prompts[-1:] != [prompt]:
                prompts.append(prompt)
        return prompts[-KEPT:]

    def _append(self, prompt: str) -> None:
        make_private(self._path.parent)
        # One append is one write: two workbenches at a time do not mix their lines.
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        handle = os.open(self._path, flags, 0o600)
        try:
            os.write(handle, msgspec.json.encode(prompt) + b"\n")
            long = os.fstat(handle).st_size > 64 * 1024
        finally:
            os.close(handle)
        if long and len(self._path.read_bytes().splitlines()) > 2 * KEPT:
            kept = b"".join(msgspec.json.encode(text) + b"\n" for text in self._read())
            write_private(self._path, kept)
