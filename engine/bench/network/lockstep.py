"""A pipeline in lock-step, as the original has it: for comparison, on the same stages.

One micro-batch at a time: the prompt goes whole from stage to stage, then each step's tree. Every
message is a blocking exchange of its own: the length, the hidden states, the new tokens with their
places to every rank, the candidates to the first. Nobody goes on before all have the new tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from engine.decoding.drafted import Drafted
from engine.decoding.tree import Tree
from engine.pipeline.batch import Entry, Judge
from engine.pipeline.stage import Stage

PREFILL, DECODE, END = 1, 2, 0


class LockStep:
    """One rank; all of them follow the same sequence."""

    def __init__(self, stage: Stage, rank: int, world: int, tree: Tree) -> None:
        self.stage, self.rank, self.world, self.tree = stage, rank, world, tree
        self._width = stage.model.config.hidden_size
        self._sequential = stage.model.heads.kind == "hydra"
        self._fed = self._keep_to = 0
        self._keep: list[int] = []
        self._root = 0
        self._candidates: list[list[int]] = []

    def answer(self, prompt: Sequence[int], max_tokens: int, stops: frozenset[int]) -> list[int]:
        """Greedy tokens, on rank 0."""
        tokens = self._step(PREFILL, prompt)
        while len(tokens) < max_tokens and not stops.intersection(tokens):
            tokens += self._step(DECODE, ())
        return tokens[:max_tokens]

    def serve(self) -> None:
        """Every other rank's part, until rank 0 ends."""
        while True:
            op, rows = _receive_numbers(self.rank - 1, 2)
            if self.rank < self.world - 1:
                _send_numbers(self.rank + 1, [op, rows])
            if op == END:
                return
            hidden = torch.empty(rows, self._width, dtype=self.stage.dtype)
            dist.recv(hidden, self.rank - 1)
            entry = self._entry(op, [0] * rows)
            hidden = self.stage.run([entry], hidden)
            if self.rank < self.world - 1:
                dist.send(hidden.contiguous(), self.rank + 1)
                self._take(op, rows, *self._receive_new())
            else:
                self._judge(op, entry, hidden)

    def end(self) -> None:
        """Let the others leave, on rank 0."""
        _send_numbers(1, [END, 0])

    def _step(self, op: int, prompt: Sequence[int]) -> list[int]:
        tokens = self._drafted() if op == DECODE else list(prompt)
        entry = self._entry(op, tokens)
        hidden = self.stage.run([entry], None)
        _send_numbers(1, [op, len(tokens)])
        dist.send(hidden.contiguous(), 1)
        path, token = self._receive_new()
        (count, width) = _receive_numbers(self.world - 1, 2)
        flat = _receive_numbers(self.world - 1, count * width) if count else []
        self._take(op, len(tokens), path, token)
        self._candidates = [flat[i * width : (i + 1) * width] for i in range(count)]
        return [tokens[node] for node in path[1:]] + [token] if op == DECODE else [token]

    def _judge(self, op: int, entry: Entry, hidden: Tensor) -> None:
        """On the last rank: the result goes to every other one, the candidates to the first."""
        if op == DECODE:
            entry.tokens = self._drafted()
        (result,) = self.stage.judge([entry], hidden)
        for rank in range(self.world - 1):
            _send_numbers(rank, [len(result.path), result.next_token])
            _send_numbers(rank, result.path)
        count = len(result.candidates)
        width = len(result.candidates[0]) if count else 0
        _send_numbers(0, [count, width])
        if count:
            _send_numbers(0, [token for head in result.candidates for token in head])
        self._take(op, len(entry.tokens), result.path, result.next_token)
        self._candidates = result.candidates

    def _receive_new(self) -> tuple[list[int], int]:
        length, token = _receive_numbers(self.world - 1, 2)
        return _receive_numbers(self.world - 1, length), token

    def _take(self, op: int, rows: int, path: Sequence[int], token: int) -> None:
        """What every rank does with the new tokens; its KV rows move with the next step."""
        if op == PREFILL:
            self._fed, self._keep = rows, []
        else:
            self._keep = [self._fed + node for node in path]
            self._keep_to = self._fed
            self._fed += len(path)
        self._root = token

    def _drafted(self) -> list[int]:
        """The tree's tokens, on the first and the last rank."""
        along = self.tree if self._sequential else None
        return Drafted(self._candidates, along).tokens(self.tree, self._root)

    def _entry(self, op: int, tokens: list[int]) -> Entry:
        prefill = op == PREFILL
        return Entry(
            slot=0,
            start=0 if prefill else self._fed,
            tokens=tokens,
            parents=list(range(-1, len(tokens) - 1)) if prefill else list(self.tree.parents),
            judge=Judge.LAST if prefill else Judge.TREE,
            keep=[] if prefill else self._keep,
            keep_to=self._keep_to,
            draft_width=self.tree.width if self.tree.depth else 0,
            draft_tree=self.tree if self._sequential else None,
        )


def _send_numbers(to: int, numbers: Sequence[int]) -> None:
    dist.send(torch.tensor(numbers, dtype=torch.int64), to)


def _receive_numbers(source: int, count: int) -> list[int]:
    numbers = torch.empty(count, dtype=torch.int64)
    dist.recv(numbers, source)
    return [int(number) for number in numbers]
