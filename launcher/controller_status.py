"""What a controller says of itself and of its replicas, as typed structs; `shoal status` prints them."""

from typing import Literal

import msgspec

from shoal.engine.messages import EngineStats
from shoal.launcher.replica import RankPlace
from shoal.launcher.replica_messages import RankHealth

ReplicaState = Literal["starting", "ready", "draining", "backing off", "given up", "stopped"]


class FailureRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One life of a replica that ended badly. moment: time.time(). life: 0 is the first. lived_s: since it was ready,
    None when it never was.
    """

    moment: float
    life: int
    cause: str
    lived_s: float | None


class ReplicaStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One replica.

    live: it has processes, or is about to. ready: it takes requests. busy: it works on some. in_flight: requests the
    controller has given it. outstanding_tokens: prompt and expected output it has not computed. first_failure: of the
    present series of failures; failures: the last ones, oldest first. stats: None when it does not answer.
    """

    number: int
    state: ReplicaState
    live: bool
    ready: bool
    busy: bool
    restarts: int
    ready_for_s: float | None
    in_flight: int
    outstanding_tokens: int
    ranks: list[RankPlace]
    health: list[RankHealth]
    failures: list[FailureRecord]
    first_failure: FailureRecord | None = None
    next_start_in_s: float | None = None
    stats: EngineStats | None = None


class ControllerStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The controller. Counters since its start. waiting: accepted requests no replica works on. resumed: times that a
    request went on elsewhere, or on the rebuilt replica, after a failure or a drain. tokens_per_s: over the last
    seconds.
    """

    replicas: list[ReplicaStatus]
    draining: bool
    live_requests: int
    waiting: int
    accepted: int
    refused: int
    resumed: int
    lost: int
    tokens: int
    tokens_per_s: float
    uptime_s: float
