"""What an engine and its ranks say to each other on the control channel, besides StepPlan and StepResult. No torch.

rank -> engine: Hello, Loading, Loaded, Profiled, CacheReady, StepResult; at any time Heartbeat, LogLine, RankFailure
engine -> rank: Begin, Profile, Allocate, StepPlan, Ping, Stop
"""

from typing import Literal

import msgspec

from shoal.engine.messages import Message, StepPlan, StepResult
from shoal.model.ledger import MemoryReport


class Hello(Message, frozen=True, kw_only=True):
    """A rank introduces itself. What must be equal on all ranks is compared before anything is loaded.

    config: fingerprint of settings, model and shard sizes. native: fingerprint of the C kernels, "" without them.
    versions: of shoal, Python and torch.
    """

    rank: int
    pid: int
    host: str
    versions: str
    config: str
    native: str


class Begin(Message, frozen=True, kw_only=True):
    """Join the others at `rendezvous` (see `shoal.parallel.mesh.make_mesh`) and load."""

    rendezvous: str


class Loading(Message, frozen=True, kw_only=True):
    """Weights read so far, in bytes."""

    rank: int
    done: int
    total: int


class Loaded(Message, frozen=True, kw_only=True):
    """The rank has its weights. All must before any runs a step: a collective waits for step_timeout_s only."""

    rank: int


class Profile(Message, frozen=True, kw_only=True):
    """Run the profiling step, together."""


class Profiled(Message, frozen=True, kw_only=True):
    """Measured."""

    report: MemoryReport


class Allocate(Message, frozen=True, kw_only=True):
    """Make the cache: blocks of every cache group."""

    num_blocks: list[int]


class CacheReady(Message, frozen=True, kw_only=True):
    """The rank waits for plans."""

    rank: int


class Ping(Message, frozen=True, kw_only=True):
    """The engine is there and has nothing to do."""


class Stop(Message, frozen=True, kw_only=True):
    """End in order."""


class Heartbeat(Message, frozen=True, kw_only=True):
    """What a rank is doing ("in step 17"), and for how many seconds.

    step: a step is under way. count: layers and collectives so far. waits: the collective it is in, with group and peer
    ("" outside), and for how long. stack: where its main thread is, once it has been at the same for a while.
    """

    rank: int
    doing: str
    for_s: float
    step: bool = False
    count: int = 0
    waits: str = ""
    waits_s: float = 0.0
    stack: str = ""


class LogLine(Message, frozen=True, kw_only=True):
    """A record of a rank's logging. level: of the logging module."""

    rank: int
    level: int
    text: str


class RankFailure(Message, frozen=True, kw_only=True):
    """A rank cannot go on, and ends.

    kind: "consequence" when it only noticed that another rank does not take part (a collective failed), so the cause is
    elsewhere; "refusal" when the settings or the checkpoint do not allow a start. detail: its traceback.
    """

    rank: int
    cause: str
    detail: str
    kind: Literal["error", "consequence", "refusal"]


FromRank = Hello | Loading | Loaded | Profiled | CacheReady | StepResult | Heartbeat | LogLine | RankFailure
ToRank = Begin | Profile | Allocate | StepPlan | Ping | Stop

FROM_RANK: "msgspec.msgpack.Decoder[FromRank]" = msgspec.msgpack.Decoder(FromRank)
TO_RANK: "msgspec.msgpack.Decoder[ToRank]" = msgspec.msgpack.Decoder(ToRank)
