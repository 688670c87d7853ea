"""RequestLedger: what the controller keeps of every request it has accepted, so that none is lost with a replica.

Per request: the prompt and parameters as they came (with the seed that was drawn at admission), the tokens received so
far, and where it runs.
"""

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import msgspec

from shoal.engine.messages import OutputDelta, Request

if TYPE_CHECKING:
    from shoal.launcher.replica_slot import ReplicaSlot

SEED_BITS = 53


class Entry:
    """One live request.

    emitted: its output so far, with what it brought along. slot: where it runs, None while it waits. fruitless: deaths
    of replicas under it in a row without a token in between. firm: it may not be refused any more. refused_by: replicas
    that were full. work: prompt and expected output tokens its replica has not computed yet. started_here: its replica
    has given a token; answered_here: or has said that it accepts it. moving: it is to go elsewhere. on_accepted: called
    once, when it has become firm.
    """

    __slots__ = (
        "aborted",
        "answered_here",
        "emitted",
        "firm",
        "fruitless",
        "moving",
        "num_cached_tokens",
        "number",
        "on_accepted",
        "prompt_logprobs_told",
        "refused_by",
        "request",
        "slot",
        "started_here",
        "turn",
        "work",
    )

    def __init__(self, request: Request, number: int) -> None:
        self.request, self.number = request, number
        self.emitted = list(request.emitted_token_ids)
        self.slot: ReplicaSlot | None = None
        self.turn: asyncio.Future[None] | None = None
        self.aborted = self.firm = self.moving = self.started_here = self.prompt_logprobs_told = False
        self.answered_here = False
        self.on_accepted: Callable[[], None] | None = None
        self.refused_by: set[int] = set()
        self.fruitless = self.work = 0
        self.num_cached_tokens: int | None = None

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self.request.request_id

    @property
    def order(self) -> tuple[int, float, int]:
        """The smallest goes first."""
        return (self.request.priority, self.request.arrival, self.number)

    @property
    def seconds_left(self) -> float | None:
        """Until its deadline; None without one."""
        deadline = self.request.deadline_s
        return None if deadline is None else max(0.0, deadline - time.time())

    def accept(self) -> None:
        """It may not be refused any more. Idempotent."""
        self.firm = True
        tell, self.on_accepted = self.on_accepted, None
        if tell is not None:
            tell()

    def resumed(self) -> Request:
        """The request as the next replica gets it: its output so far is taken as computed."""
        if not self.emitted and not self.prompt_logprobs_told:
            return self.request
        sampling = self.request.sampling
        if self.prompt_logprobs_told and sampling.prompt_logprobs is not None:
            sampling = msgspec.structs.replace(sampling, prompt_logprobs=None)
        return msgspec.structs.replace(self.request, emitted_token_ids=list(self.emitted), sampling=sampling)

    def take(self, delta: OutputDelta) -> OutputDelta:
        """Record a delta of the replica; what the client gets of it. Raises AssertionError for one with a gap."""
        skip = len(self.emitted) - delta.start
        assert 0 <= skip <= len(delta.token_ids), f"{delta.request_id}: {len(self.emitted)} tokens, then {delta.start}"
        if skip:
            logprobs = None if delta.logprobs is None else delta.logprobs[skip:]
            delta = msgspec.structs.replace(
                delta, start=len(self.emitted), token_ids=delta.token_ids[skip:], logprobs=logprobs
            )
        if delta.token_ids:
            self.emitted += delta.token_ids
            self.fruitless = 0
        if delta.prompt_logprobs is not None:
            if self.prompt_logprobs_told:
                delta = msgspec.structs.replace(delta, prompt_logprobs=None)
            self.prompt_logprobs_told = True
        if self.num_cached_tokens is None:
            self.num_cached_tokens = delta.num_cached_tokens
        elif self.num_cached_tokens != delta.num_cached_tokens:
            delta = msgspec.structs.replace(delta, num_cached_tokens=self.num_cached_tokens)
        return delta

    def last_delta(self, reason: str, error: str | None = None) -> OutputDelta:
        """A delta that ends the stream where it is."""
        return OutputDelta(
            request_id=self.request_id,
            start=len(self.emitted),
            token_ids=[],
            finish_reason=reason,  # type: ignore[arg-type]
            error=error,
            num_cached_tokens=self.num_cached_tokens or 0,
        )


class RequestLedger:
    """The live requests by id."""

    def __init__(self, seed: int | None = None) -> None:
        """seed: makes the seeds drawn for requests without one reproducible."""
        self._entries: dict[str, Entry] = {}
        self._seeds = random.Random(seed)
        self._count = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(list(self._entries.values()))

    @property
    def num_accepted(self) -> int:
        """Requests accepted since the start."""
        return self._count

    def get(self, request_id: str) -> Entry | None:
        """The live request of this id."""
        return self._entries.get(request_id)

    def add(self, request: Request) -> Entry:
        """Accept a request; its seed is drawn here if it has none. Raises ValueError when its id is in use."""
        if request.request_id in self._entries:
            raise ValueError(f"request_id {request.request_id!r} is already in use: wait for its end or choose another")
        if request.sampling.seed is None:
            sampling = msgspec.structs.replace(request.sampling, seed=self._seeds.getrandbits(SEED_BITS))
            request = msgspec.structs.replace(request, sampling=sampling)
        entry = self._entries[request.request_id] = Entry(request, self._count)
        self._count += 1
        return entry

    def remove(self, entry: Entry) -> None:
        """Forget a request that has ended."""
        self._entries.pop(entry.request_id, None)
