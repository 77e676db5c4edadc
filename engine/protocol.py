"""What travels on the shared queue: commands to the workers, events from them.

Every message is one msgpack frame of an `Envelope`. Text in, text out: no tensor and no pickle
ever crosses these sockets. A frame that does not decode is dropped, counted and reported.
"""

from __future__ import annotations

from typing import Literal, TypeVar

import msgspec

from engine.planning.profiles import Profile

PROTOCOL_VERSION = 1
NODE_PIDS = 10_000_000
"""A process on node n is known by its pid there + n times this; pids are smaller."""
TELEMETRY_INTERVAL_S = 0.5
"""Seconds between two StageTelemetry of a stage that is ready, busy or not."""

FinishReason = Literal["stop", "length", "cancelled"]
StagePhase = Literal["starting", "compiling", "connecting", "loading", "ready", "lost", "stopped"]
"""A stage that has "lost" a neighbour keeps its weights and waits for a Regroup."""


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One chat message, in OpenAI's shape."""

    role: Literal["system", "user", "assistant"]
    content: str


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A request's own parameters; None leaves the choice to the config."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    mode: Literal["plain", "outline"] = "plain"
    """With "outline" the points of an answer that is a list are written side by side; see
    `Tokens.point`. Limits hold for the whole answer, stop strings for each point."""


class Transcript(msgspec.Struct, frozen=True, omit_defaults=True):
    """Text, and the tokens that stand for it in a sequence.

    A model may write text in other tokens than the tokenizer would: whoever goes on from here
    with the same tokens gets the same continuation on any engine of the model.
    """

    text: str = ""
    """Exactly the rendered text of the tokens; empty where that cannot be said."""
    token_ids: tuple[int, ...] = ()


# --- commands: client -> workers ---------------------------------------------------------------


class Generate(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Answer `messages` (through the chat template) or continue `prompt` (as it is).

    Exactly one of the two is given. `request_id` is unique within a launch.
    """

    request_id: str
    messages: tuple[Message, ...] | None = None
    prompt: str | None = None
    params: SamplingParams = SamplingParams()
    trace: bool = False
    """Send along how each token came; see `Tokens.trace`."""
    transcript: Transcript | None = None
    """How the beginning of the conversation was encoded before; ignored where it does not fit."""
    transcript_wanted: bool = False
    """Have `Started` and `Finished` carry transcripts."""
    answered: tuple[int, ...] = ()
    """Tokens that the answer has already: not sent again, but counted for every limit."""
    answered_steps: int = 0
    """Decode steps that these took, for the limit on steps."""


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """Stop a request within one step; its partial text stands, it ends with `Finished`."""

    request_id: str


class Measure(msgspec.Struct, frozen=True, tag=True):
    """Measure stages and links as soon as nothing runs, and send a `Profiled`.

    Takes some seconds, in which requests wait; KV rows kept for later turns are lost.
    """


class Heartbeat(msgspec.Struct, frozen=True, tag=True):
    """Sent about once a second: proves to a worker that it is subscribed."""


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Finish nothing more and exit with code 0."""


class Regroup(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A stage was lost: leave the process group, and meet the others again in that of `epoch`.

    Sent under the epoch before. Weights stay; requests and KV rows are forgotten.
    """

    epoch: int
    store: str
    """File of the new group's FileStore."""


class Resplit(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Go over to another split of the same layers over as many stages, between two steps.

    When that is done, rank 0 sends another EngineReady.
    """

    split: tuple[int, ...]


Command = Generate | Cancel | Measure | Heartbeat | Shutdown | Regroup | Resplit


# --- events: workers -> client -----------------------------------------------------------------


class StageState(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Where a stage is in its start. `done` of `total` counts tensors while loading."""

    phase: StagePhase
    first_layer: int = 0
    num_layers: int = 0
    done: int = 0
    total: int = 0
    pid: int = 0
    """On another machine the process's there + node × 10 million; see `node`."""
    node: str = ""
    """The name of the machine, where it is another than the client's."""


class EngineReady(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """From rank 0, once a message has gone round all stages: requests may be sent."""

    model: str
    """Short name of the model, for people."""
    stages: tuple[int, ...]
    """Layers per stage."""
    device: str
    """Device of rank 0, such as "cpu" or "cuda:0"."""
    dtype: str
    medusa_num_heads: int
    tree_size: int
    """Nodes of the draft tree, root included; 1 means no speculation."""
    tree_tuned: bool = False
    """The tree changes with what is measured, see `TreeChosen`; tree_size is the first one's."""
    context_length: int
    """Tokens that prompt and answer may have together."""
    has_chat_template: bool


class Started(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A request was admitted and its prefill begins."""

    request_id: str
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens whose KV rows were still there; only the others are prefilled."""
    transcript: Transcript | None = None
    """Of the prompt, where `Generate.transcript_wanted` is set."""


class StepTrace(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One step of an answer: the draft tree, what was accepted of it, and the tokens it made.

    A node's depth is the number of the Medusa head that drafted it; node 0 is the root, the
    token before this step's. A prompt's last chunk has no tree: it only makes the first token.
    """

    texts: tuple[str, ...] = ()
    """Each node's token as text of its own: special tokens by name, "\ufffd" for part of a
    character."""
    parents: tuple[int, ...] = ()
    """Index of each node's parent, -1 for the root; parents come first."""
    path: tuple[int, ...] = ()
    """Accepted nodes, root first."""
    next_text: str
    """The token that the base model itself put behind the path; the next tree's root."""
    pieces: tuple[str, ...]
    """What each new token added to the answer's text: those of path[1:], then the next token;
    fewer where one of them ended the answer."""


class Tokens(msgspec.Struct, frozen=True, kw_only=True, tag=True, omit_defaults=True):
    """Newly accepted tokens and the text they add; text may be empty inside a character."""

    request_id: str
    token_ids: tuple[int, ...]
    text: str
    trace: tuple[StepTrace, ...] = ()
    """How they came, where `Generate.trace` asked for it; the pieces together are `text`."""
    point: int = 0
    """Of an outline answer: the point, from 1, that grows by these; 0 is what comes before the
    list. The answer is the points' texts in their order."""
    point_ended: bool = False
    """Nothing more will come of this point."""


class Metrics(msgspec.Struct, frozen=True, kw_only=True):
    """Measured figures of one request; None where nothing could be measured."""

    ttft_s: float | None = None
    """From the arrival of the request at rank 0 to its first token, in seconds."""
    tokens_per_s: float | None = None
    """Tokens of the decode steps over their time."""
    decode_steps: int = 0
    mean_accepted_len: float | None = None
    """Tokens that decode steps emitted / decode steps; 1.0 without heads."""
    proposed_per_head: tuple[int, ...] = ()
    """Steps whose tree reached this head's depth."""
    accepted_per_head: tuple[int, ...] = ()
    """Steps whose accepted path reached this head's depth."""


class Finished(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A request ended; always the last event about it (or `Failed` is)."""

    request_id: str
    finish_reason: FinishReason
    context_full: bool
    """With "length": the context was full, rather than a limit of the request reached."""
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    metrics: Metrics
    transcript: Transcript | None = None
    """Of prompt and answer, for the next turn, where `Generate.transcript_wanted` is set."""


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A request that cannot be answered; the engine goes on."""

    request_id: str
    message: str
    code: Literal["prompt_too_long", "invalid_request", "internal_error"]


class StageTelemetry(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Figures of one stage since it was ready; latest wins.

    `busy_s`, `wait_s`, `link_s` and `idle_s` together are the seconds since then.
    """

    layers: int
    memory_bytes: int
    memory_kind: Literal["process", "device"]
    """Resident memory of the process on CPU, memory allocated on the device on CUDA."""
    busy_s: float
    """Seconds of work: the layers and heads, on rank 0 also scheduling and text."""
    wait_s: float
    """Seconds spent waiting for a neighbour while there was work."""
    steps: int
    """Micro-batches computed."""
    rows: int
    """Rows of them: every prefilled token and every tree node counts one."""
    link_s: float = 0.0
    """Seconds spent sending, and receiving once a message has begun to arrive."""
    idle_s: float = 0.0
    """Seconds with nothing to do."""
    link_dtype: str = ""
    """In what form hidden states leave for the next stage, see engine/pipeline/wire.py; empty
    where there is one stage."""
    sent_bytes: int = 0
    """Of all messages to the next stage, or from the last one to the first."""
    decode_steps: int = 0
    """Micro-batches that were decode steps, of any number of sequences."""
    decode_busy_s: float = 0.0
    """Seconds that this stage's layers and heads took for these."""
    decode_judge_s: float = 0.0
    """Of them, those behind the layers: `lm_head`, heads and acceptance, on the last stage."""
    prefill_rows: int = 0
    """Rows of all other micro-batches: prompt tokens."""
    prefill_busy_s: float = 0.0
    """Seconds that this stage's layers and heads took for these."""
    weights_bytes: int = 0
    """Size of its parameters."""
    kv_bytes: int = 0
    """Size of its KV caches when they are full; on CPU unused parts take no memory yet."""
    memory_total_bytes: int | None = None
    """Of the device on CUDA; on CPU the machine's, or what the process's control group allows."""
    device: str = ""
    """Such as "cpu" or "cuda:0"."""
    device_name: str = ""
    """For people, such as the GPU's or the processor's model."""
    doing: Literal["busy", "wait", "link", "idle", "text"] = "idle"
    """At this moment; as the seconds above, "text" where a long text may be what it works on."""
    progress: int = 0
    """Goes up with every layer computed and every message moved; see `patience_s`."""
    patience_s: float = 0.0
    """While there is work, so long without progress of any stage is a hang."""


class FlightSpan(msgspec.Struct, frozen=True, array_like=True):
    """When a stage computed a micro-batch, and what was in it."""

    number: int
    """Of the micro-batch, from 0: the same on every stage."""
    began: float
    ended: float
    """Seconds since 1970 by the clock of the stage's machine."""
    rows: int
    decode: bool
    """A decode step; else prompt tokens."""
    points: tuple[int, ...]
    """Of each sequence in it the point of an outline answer that it writes; 0 for none."""


class StageSpans(msgspec.Struct, frozen=True, tag=True):
    """The latest micro-batches of a stage, oldest first; latest wins.

    Sent with a StageTelemetry when there are new ones. A stage keeps so many that they reach back
    further than the one before, as a rule.
    """

    spans: tuple[FlightSpan, ...]


class TreeOption(msgspec.Struct, frozen=True, array_like=True):
    """What a draft tree of a size promises."""

    nodes: int
    """Root included; 1 is plain decoding."""
    tokens_per_step: float
    """Expected, per sequence: from the latest acceptance, and the heads' calibration."""
    step_ms: float
    """Of a step of all running sequences, as measured or between measured ones."""


class TreeChosen(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The tuner has weighed the draft trees and uses this one from now on; latest wins."""

    nodes: int
    """Root included; 1 means that drafting does not pay now."""
    depth: int
    """Medusa heads that the tree uses."""
    sequences: int
    """Sequences in a step, which share the tree."""
    chosen: TreeOption
    options: tuple[TreeOption, ...]
    """What it was weighed against: the best tree of each size, smallest first."""


class TrainingStarted(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A training run has its folder and is about to learn; from rank 0."""

    run: str
    """The run folder, absolute."""
    iteration: int
    """Steps that were done before, where a checkpoint is gone on with."""
    total: int
    """Steps of the whole run."""


class TrainingStep(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A step of a training run is done; from rank 0."""

    iteration: int
    total: int
    """Steps of the whole run."""
    loss: float
    loss_per_head: tuple[float, ...]
    accuracy_per_head: tuple[float, ...]
    """Share of each head's targets whose token was the likeliest."""
    base_loss: float | None = None
    """Of the base model, where it learns or is about to."""
    base_accuracy: float | None = None
    """As `accuracy_per_head`, of the base model."""
    lr: float
    """Learning rate in this step: of the heads, if there are any."""
    grad_norm: float
    tokens_per_s: float
    """Of all ranks together, in this step."""
    memory_bytes: int
    """Of rank 0; see memory_kind."""
    memory_kind: Literal["process", "device"]
    """Resident memory of the process on CPU, the most allocated on the device so far on CUDA."""
    elapsed_s: float
    """Since the first step of this launch began."""
    remaining_s: float


class Profiled(msgspec.Struct, frozen=True, tag=True):
    """What a `Measure` has found; from rank 0."""

    profile: Profile


class Notice(msgspec.Struct, frozen=True, tag=True):
    """Something a person should know; nothing has failed."""

    message: str


class ProcessEnded(msgspec.Struct, frozen=True, tag=True):
    """A worker on another machine has ended; from the hub."""

    pid: int


class WorkerError(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The worker's last words: it exits with `exit_code` after this."""

    message: str
    exit_code: int


Event = (
    StageState
    | EngineReady
    | Started
    | Tokens
    | Finished
    | Failed
    | StageTelemetry
    | StageSpans
    | TreeChosen
    | Profiled
    | TrainingStarted
    | TrainingStep
    | Notice
    | ProcessEnded
    | WorkerError
)


class CommandEnvelope(msgspec.Struct, frozen=True, array_like=True):
    """A command with the protocol's version and the launch it is meant for."""

    version: int
    epoch: int
    body: Command


class EventEnvelope(msgspec.Struct, frozen=True, array_like=True):
    """An event with the protocol's version, its launch and the rank that sent it."""

    version: int
    epoch: int
    rank: int
    body: Event


_Message = TypeVar("_Message")
_encoder = msgspec.msgpack.Encoder()
_command_decoder = msgspec.msgpack.Decoder(CommandEnvelope)
_event_decoder = msgspec.msgpack.Decoder(EventEnvelope)


def encode(envelope: CommandEnvelope | EventEnvelope) -> bytes:
    """The frame of an envelope."""
    return _encoder.encode(envelope)


def decode_command(frame: bytes) -> CommandEnvelope | None:
    """The envelope in `frame`, or None when it is malformed or of another version."""
    envelope = decoded(_command_decoder, frame)
    return envelope if envelope and envelope.version == PROTOCOL_VERSION else None


def decode_event(frame: bytes) -> EventEnvelope | None:
    """The envelope in `frame`, or None when it is malformed or of another version."""
    envelope = decoded(_event_decoder, frame)
    return envelope if envelope and envelope.version == PROTOCOL_VERSION else None


def decoded(decoder: msgspec.msgpack.Decoder[_Message], frame: bytes) -> _Message | None:
    """What `frame` holds, None when it is malformed."""
    try:
        return decoder.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
