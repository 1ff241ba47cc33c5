"""Messages: everything that an engine and the ranks of its model say to each other, as msgpack with a fixed schema.

    engine -> rank   Start, Allocate, Step, Clear, Check, Stop
    rank -> engine   Opened, Joined, Alive, Loaded, Done, Spent, Result, Failed

Invariant: a message that was decoded has the fields and types declared here, and values that make sense by themselves;
anything else is one `ProtocolError`. Nothing is ever unpickled or executed. Whether a message comes at the
right time is for those who exchange it.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

import msgspec

from qengine.config import EngineConfig
from qengine.request import SamplingParams, TokenLogprobs
from qengine.runtime.channel import ProtocolError
from qengine.runtime.loader import LoadTimes
from qengine.runtime.planner import Card, MemoryPlan

Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Seconds = Annotated[float, msgspec.Meta(ge=0.0, le=1e9)]
Ids = tuple[Annotated[int, msgspec.Meta(ge=0, lt=2**31)], ...]
#: The first step may take so long, whatever is said of others: it compiles kernels and makes connections.
WARM_UP_SECONDS = 600.0
#: In place of a token where there is none: the row failed.
NO_TOKEN = -1


class _Record(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Fields in order, without their names."""


class _Message(_Record, frozen=True, array_like=True, forbid_unknown_fields=True, tag=True):
    """A record that begins with its own name."""


# From the engine


class Start(_Message, frozen=True):
    """The first message: who the rank is, and all it needs to load its part of the model.

    Attributes:
        config: what the engine was started with; the model is a path.
        rank: number of this process; stages follow each other, and the ranks of one are neighbours.
        plan: of all cards, as far as headers tell.
        rendezvous: path of the file that they find each other by, which each has inherited.
        seats: for tensors through host memory, of the stage's ranks and between the stages; none for a single rank.
    """

    config: EngineConfig
    plan: MemoryPlan
    rank: Count
    rendezvous: str
    log_level: str
    show_progress: bool
    seats: tuple[str | None, str | None] = (None, None)


class Allocate(_Message, frozen=True):
    """The second: make the KV cache."""

    plan: MemoryPlan


class Sampling(_Record, frozen=True):
    """What sampling needs of a request beside its output; sent once."""

    params: SamplingParams
    seed: Count
    prompt_token_ids: Ids
    eos_token_ids: Ids


class Entry(_Record, frozen=True):
    """One sequence's share of a step; what the rank knows already is left out.

    Attributes:
        slot: names the sequence between engine and rank.
        is_new: nothing is known of the slot's sequence.
        num_kept_blocks: leading blocks of the table that are those of the sequence's last step.
        block_ids: the blocks after them.
        samples: a token is sampled after the last one.
        sampling: with the first step that samples.
        output_ids: what was added to the output since the last step that sampled.
        allowed: a bit for each token that the sequence's grammar allows next; None for all.
        pool: what is wanted of the hidden states, instead of a token.
    """

    slot: Count
    is_new: bool
    start: Count
    token_ids: Ids
    num_kept_blocks: Count
    block_ids: Ids
    samples: bool
    sampling: Sampling | None = None
    output_ids: Ids = ()
    num_prompt_logprobs: Count | None = None
    prompt_targets: Ids = ()
    allowed: bytes | None = None
    pool: Literal["last", "sum"] | None = None


class Step(_Message, frozen=True):
    """Compute a batch."""

    entries: tuple[Entry, ...]


class Clear(_Message, frozen=True):
    """Zero those of the blocks that hold NaN or infinity. Not answered."""

    block_ids: Ids


class Check(_Message, frozen=True):
    """Say `Done`, if you can."""


class Stop(_Message, frozen=True):
    """Release everything and end. Not answered."""


# From a rank


class Opened(_Message, frozen=True):
    """Answers `Start`, first: the rank is up, has opened the model, and goes to meet the others."""


class Joined(_Message, frozen=True):
    """Answers `Start`, second: the rank has met the others, and tensors pass between them."""


class Alive(_Message, frozen=True):
    """Answers nothing: said every second while weights are loaded and memory is taken, however long that lasts."""


class Loaded(_Message, frozen=True):
    """Answers `Start`, third: the weights are in place.

    Attributes:
        card: as it was before them; None where all ranks share the computer's memory.
        times: what reading them took.
    """

    card: Card | None
    weight_bytes: Count
    times: LoadTimes


class Done(_Message, frozen=True):
    """Answers `Allocate` and `Check`."""


class Spent(_Message, frozen=True):
    """With each `Step`, from every rank that can tell: what it spent in collectives. Nobody waits for it."""

    seconds: Seconds


class Result(_Message, frozen=True):
    """Answers `Step`, from the rank that samples. Entries are named by their place in the step.

    Attributes:
        token_ids: one for each entry that samples, `NO_TOKEN` for one that failed.
        logprobs: none, or one for each of those.
        pooled: float32 [hidden] of each entry that pools, and did not fail.
    """

    token_ids: tuple[Annotated[int, msgspec.Meta(ge=NO_TOKEN, lt=2**31)], ...]
    logprobs: tuple[TokenLogprobs | None, ...] = ()
    prompt_logprobs: dict[Count, tuple[TokenLogprobs, ...]] = {}  # frozen, and msgspec copies it
    failed: dict[Count, str] = {}
    pooled: dict[Count, bytes] = {}


class Failed(_Message, frozen=True):
    """Instead of any answer: the rank cannot go on.

    `kind` is "internal" for what is no fault of the user's, "transport" where another rank may be the cause.
    """

    kind: Literal["config", "load", "internal", "transport"]
    text: str


Order = Start | Allocate | Step | Clear | Check | Stop
Report = Opened | Joined | Alive | Loaded | Done | Spent | Result | Failed
_T = TypeVar("_T")

_ENCODER = msgspec.msgpack.Encoder()
_ORDERS: msgspec.msgpack.Decoder[Order] = msgspec.msgpack.Decoder(Order)
_REPORTS: msgspec.msgpack.Decoder[Report] = msgspec.msgpack.Decoder(Report)


def encode(message: Order | Report) -> bytes:
    """A message as bytes."""
    return _ENCODER.encode(message)


def decode_order(data: bytes) -> Order:
    """What an engine sent. Raises ProtocolError."""
    return _decode(_ORDERS, data)


def decode_report(data: bytes) -> Report:
    """What a rank sent. Raises ProtocolError."""
    return _decode(_REPORTS, data)


def _decode(decoder: msgspec.msgpack.Decoder[_T], data: bytes) -> _T:
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ProtocolError(f"a message of {len(data)} bytes cannot be read: {error}") from error
