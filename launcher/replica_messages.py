"""What a front end and the engine process of a replica say to each other, besides the engine's own messages. No torch.

front end -> engine: Submit, Abort, Drain, StatsQuery, Shutdown engine -> front end: Listening, Starting, Ready or
Refused; then Acknowledged, Outputs, CacheChanges, Rejected, Drained, EngineStats; at any time Beat, LogText, Failure
"""

from typing import Annotated, Literal

import msgspec

from shoal.engine.cache_log import CacheChanges
from shoal.engine.executor import Capacity
from shoal.engine.messages import (
    Abort,
    Drain,
    Drained,
    EngineStats,
    Failure,
    Message,
    OutputDelta,
    Record,
    StatsQuery,
    Submit,
)


class Listening(Message, frozen=True, kw_only=True):
    """Ranks of this replica may connect here."""

    address: str


class Starting(Message, frozen=True, kw_only=True):
    """How far the start is: what is being done, and, while weights are read, bytes of all ranks together."""

    doing: str
    done: int = 0
    total: int = 0


class ProcessPlace(Record, frozen=True):
    """Where a process runs."""

    host: str
    pid: int


class Ready(Message, frozen=True, kw_only=True):
    """The replica takes requests. report: its memory table, as text. engine, ranks: their processes, when there are
    any of their own.
    """

    capacity: Capacity
    report: str
    engine: ProcessPlace | None = None
    ranks: list[ProcessPlace] = msgspec.field(default_factory=list)


class Refused(Message, frozen=True, kw_only=True):
    """The settings or the checkpoint do not allow a start: a ValueError for the user. The engine ends."""

    text: str


class Outputs(Message, frozen=True, kw_only=True):
    """What one step gave."""

    deltas: list[OutputDelta]


class Acknowledged(Message, frozen=True, kw_only=True):
    """Requests are accepted, and will not be Rejected any more. An engine says it of those that are given no token in
    the step they came in; a detached controller of every request, before its first token and after its journal holds
    it.
    """

    request_ids: list[str]


class Rejected(Message, frozen=True, kw_only=True):
    """A request that was not accepted. kind: the error to raise: ValueError, QueueFull or EngineError."""

    request_id: str
    kind: Literal["value", "full", "engine"]
    text: str
    retry_after_s: float = 0.0


class RankHealth(Record, frozen=True):
    """What a rank said last. doing: "in step 17", with the collective, its group and the peer where it waits in one.

    for_s: how long it has been at that, when it said so. heard_s: how long ago that was.
    """

    rank: int
    host: str
    doing: str
    for_s: float
    heard_s: float


class Beat(Message, frozen=True, kw_only=True):
    """The engine process lives. busy: requests are under way. step: the last one launched, -1 before any."""

    busy: bool = False
    step: int = -1
    ranks: list[RankHealth] = msgspec.field(default_factory=list)


class LogText(Message, frozen=True, kw_only=True):
    """A log record of the engine or of a rank. level: of the logging module."""

    level: int
    text: str


class Shutdown(Message, frozen=True, kw_only=True):
    """End the ranks, then the engine process."""


class Enter(Message, frozen=True, kw_only=True):
    """The first message of a front end of a detached controller. front_end: the same in all of its connections."""

    front_end: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]


class Renew(Message, frozen=True, kw_only=True):
    """The front end of a detached controller lives: its requests go on (see `shoal.launcher.controller_door`)."""


FromEngine = (
    Listening
    | Starting
    | Ready
    | Refused
    | Acknowledged
    | Outputs
    | CacheChanges
    | Rejected
    | Drained
    | EngineStats
    | Beat
    | LogText
    | Failure
)
ToEngine = Submit | Abort | Drain | StatsQuery | Shutdown | Enter | Renew

FROM_ENGINE: "msgspec.msgpack.Decoder[FromEngine]" = msgspec.msgpack.Decoder(FromEngine)
TO_ENGINE: "msgspec.msgpack.Decoder[ToEngine]" = msgspec.msgpack.Decoder(ToEngine)
