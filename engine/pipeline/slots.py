"""Who holds which KV cache: slots are kept after an answer, so the next turn finds its prefix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.errors import PromptError, PromptTooLongError
from engine.pipeline.batch import Copy
from engine.protocol import Transcript
from engine.text import TextCodec


@dataclass
class Slot:
    """A KV cache of every stage, and what its rows stand for."""

    index: int
    tokens: list[int] = field(default_factory=list)
    """The sequence as far as it went; its last token may have no row yet."""
    rows: int = 0
    """KV rows of these tokens that are there, once `keep` is carried out."""
    text: str = ""
    """Exactly the text of `tokens`, or empty where that cannot be said; see `encode_on`."""
    keep: list[int] = field(default_factory=list)
    keep_to: int = 0
    busy: bool = False
    used: int = 0
    reserved: int = 0
    """While it is busy: rows that the sequence may come to have."""
    held: int = 0
    """Rows whose memory has been used since it was last given back."""

    @property
    def taken(self) -> int:
        """Rows whose memory is, or may come to be, this slot's."""
        return max(self.held, self.reserved)

    def free(self) -> None:
        """The sequence has ended."""
        self.busy, self.held, self.reserved = False, max(self.held, len(self.tokens)), 0

    def empty(self) -> Copy:
        """Forget all rows; what has every stage give their memory back."""
        self.tokens, self.rows, self.text, self.keep, self.held = [], 0, "", [], 0
        return Copy(self.index, self.index, 0)

    def hold(self, tokens: list[int]) -> None:
        """While the slot is busy: all rows of `tokens` are there, or sent."""
        self.tokens, self.rows, self.text, self.keep = tokens, len(tokens), "", []

    def shared(self, tokens: Sequence[int]) -> int:
        """Rows of a beginning of `tokens` that another slot may copy: none that is to move yet."""
        rows = min(self.rows, self.keep_to) if self.keep else self.rows
        return min(shared_prefix(self.tokens, tokens), rows, len(tokens) - 1)


@dataclass(frozen=True)
class Place:
    """A slot taken for a prompt."""

    slot: Slot
    tokens: list[int]
    """The prompt's tokens."""
    cached: int
    """How many of these, and of the answer's, have their rows in the slot already."""
    keep: list[int]
    keep_to: int
    copies: tuple[Copy, ...] = ()
    """What brings the rows there, and empties other slots for them; to be sent with the very next
    micro-batch."""


class SlotTable:
    """All slots, and the choice of one for a new prompt.

    Args:
        count: sequences at a time.
        budget: rows that all of them together may have; None for no limit.
    """

    def __init__(self, count: int, budget: int | None = None) -> None:
        self.slots = [Slot(i) for i in range(count)]
        self._budget = budget
        self._clock = 0

    def any_free(self) -> bool:
        """Whether `acquire` would find one."""
        return any(not slot.busy for slot in self.slots)

    def acquire(
        self,
        text: str,
        codec: TextCodec,
        *,
        chat: bool,
        limit: int,
        transcript: Transcript | None = None,
        answered: Sequence[int] = (),
        fork: bool = False,
        max_tokens: int | None = None,
    ) -> Place | None:
        """Take the free slot that shares the longest beginning with the prompt.

        None where the rows that prompt and answer may come to have do not fit beside those of the
        sequences that run; it fits when some of these have ended.

        At most all tokens but the last count as cached: its row must run to give the answer's
        next token. Raises PromptError when the prompt has `limit` tokens or more.

        Args:
            text: the prompt.
            codec: the tokenizer.
            chat: `text` is a rendered conversation, which may go on from an earlier one.
            limit: tokens of the context.
            transcript: how the client knows the beginning of the prompt to be encoded.
            answered: tokens that the answer has already.
            fork: the rows may be copied from a slot that shares more, free or busy.
            max_tokens: of the whole answer; None for as many as the context holds.
        """
        plain = codec.encode(text, add_special_tokens=not chat)
        known = 0
        if transcript is not None and codec.says(transcript.token_ids, transcript.text):
            tokens = encode_on(transcript.text, transcript.token_ids, text, codec)
            if tokens is not None:
                plain, known = tokens, len(transcript.text)
        found = []
        for slot in self.slots:
            if slot.busy:
                continue
            tokens = None
            if chat and len(slot.text) > known:
                tokens = encode_on(slot.text, slot.tokens, text, codec)
            tokens = tokens or plain
            whole = [*tokens, *answered]
            shared = min(shared_prefix(slot.tokens, whole), slot.rows, len(whole) - 1)
            found.append((shared, -slot.used, slot, tokens))
        shared, _, slot, tokens = max(found, key=lambda entry: entry[:2])
        if not tokens:
            raise PromptError("the prompt is empty")
        if len(tokens) >= limit:
            raise PromptTooLongError(
                f"the prompt has {len(tokens)} tokens; with room for an answer at most "
                f"{limit - 1} fit the context (max_kv_cache_length, max_batch_total_tokens and "
                "the model's own limit)"
            )
        keep, keep_to = slot.keep, slot.keep_to
        whole = [*tokens, *answered]
        need = limit if max_tokens is None else min(limit, len(tokens) + max_tokens)
        source = None
        if fork:
            source = max(self.slots, key=lambda each: each.shared(whole))
            if (rows := source.shared(whole)) > shared:
                slot = min((s for s in self.slots if not s.busy), key=lambda each: each.used)
                shared, keep = rows, []
            else:
                source = None
        emptied = self._make_room(slot, need, source)
        if emptied is None:
            return None
        if slot in emptied or (source is not None and source in emptied):
            shared, keep, source = 0, [], None
        copies = [each.empty() for each in emptied]
        if source is not None:
            copies.append(Copy(source.index, slot.index, shared))
        self._clock += 1
        slot.busy, slot.used, slot.reserved = True, self._clock, need
        slot.tokens, slot.rows, slot.text = whole[:shared], shared, ""
        slot.keep, slot.keep_to = keep, keep_to
        return Place(slot, tokens, shared, keep, keep_to, tuple(copies))

    def _make_room(self, slot: Slot, need: int, source: Slot | None) -> list[Slot] | None:
        """Idle slots that are to be emptied so that `slot` can have `need` rows.

        Those come first that were used longest ago, last `source`, which is to be copied, and the
        slot itself. None where the running sequences leave too little.
        """
        if self._budget is None:
            return []
        others = [each for each in self.slots if each is not slot]
        taken = sum(each.taken for each in others) + max(slot.held, need)
        idle = [each for each in others if not each.busy and each.held]
        idle.sort(key=lambda each: (each is source, each.used))
        emptied = []
        for each in [*idle, slot]:
            if taken <= self._budget:
                break
            taken -= each.held if each is not slot else max(slot.held - need, 0)
            emptied.append(each)
        return emptied if taken <= self._budget else None


def encode_on(before: str, tokens: Sequence[int], text: str, codec: TextCodec) -> list[int] | None:
    """Tokens of a prompt that goes on from the text `before`, whose tokens are known.

    A model may write text in other tokens than the tokenizer would; encoding only what is new
    keeps every row that is there. None when the prompt does not go on from there.
    """
    if not before or not text.startswith(before):
        return None
    return [*tokens, *codec.encode(text[len(before) :], add_special_tokens=False)]


def shared_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count
