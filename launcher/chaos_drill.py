"""A fault drill: streams under load, faults from a plan, and every stream compared with an undisturbed run.

First every request of the pool runs undisturbed and its output is kept. Then `streams` readers send requests of the
pool over and over while faults are done one after another: each waits until its replica decodes something, and the
next one until it is mended. At the end the load stops and everything must be free.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from shoal.engine.client import EngineError, QueueFull
from shoal.engine.messages import Request, TokenLogprobs
from shoal.launcher.chaos_plan import PlannedFault
from shoal.launcher.chaos_report import FaultOutcome, Sample
from shoal.launcher.controller import Controller
from shoal.launcher.controller_status import ReplicaStatus
from shoal.launcher.vitals import read_vitals

POLL_S = 0.01
DECODING_TIMEOUT_S = 30.0
IDLE_TIMEOUT_S = 10.0
SAMPLE_INTERVAL_S = 5.0
KEPT_ERRORS = 20
SIGNALS = {"kill": 9, "stop": 19}


class Output(msgspec.Struct):
    """What a request gave: compared whole."""

    token_ids: list[int] = msgspec.field(default_factory=list)
    logprobs: list[TokenLogprobs] = msgspec.field(default_factory=list)
    finish_reason: str = ""


class Drill:
    """One drill over a controller. Counters as in ChaosReport."""

    def __init__(
        self,
        controller: Controller,
        pool: Sequence[Request],
        streams: int,
        mend_timeout_s: float = 60.0,
        tell: Callable[[str], None] = lambda text: None,
        lose: Callable[[str], Awaitable[float]] | None = None,
    ) -> None:
        """mend_timeout_s: within which a replica must be ready again after a fault. tell: progress in words. lose: has
        a host end or be cut off, and returns the moment (time.monotonic) it was; may raise EngineError.
        """
        self._controller, self._pool, self._streams = controller, list(pool), streams
        self._mend_timeout_s, self._tell, self._lose = mend_timeout_s, tell, lose
        self._reference: list[Output] = []
        self._hit: set[str] = set()
        self._sent = 0
        self._stopping = False
        self.completed = self.hit = self.equal = self.diverged = self.diverged_hit = self.lost = self.tokens = 0
        self.errors: list[str] = []
        self.faults: list[FaultOutcome] = []
        self.samples: list[Sample] = []
        self.elapsed_s = 0.0

    async def run(self, faults: Sequence[PlannedFault], seconds: float | None = None, requests: int = 0) -> None:
        """Do the faults, within `seconds` when given, and at least so many requests. Raises EngineError when even the
        undisturbed run fails.
        """
        self._tell(f"{len(self._pool)} requests undisturbed")
        self._reference = list(await asyncio.gather(*(self._complete(request) for request in self._pool)))
        self._started = time.monotonic()
        readers = [asyncio.create_task(self._read()) for _ in range(self._streams)]
        sampler = asyncio.create_task(self._sample())
        try:
            await self._do_all(faults, seconds)
            while self._sent < requests:
                await asyncio.sleep(POLL_S)
            self._stopping = True
            await asyncio.gather(*readers)
        finally:
            for task in (*readers, sampler):
                task.cancel()
            await asyncio.gather(*readers, sampler, return_exceptions=True)
            self.elapsed_s = time.monotonic() - self._started
        self.samples.append(await asyncio.to_thread(self._sampled))

    async def _complete(self, request: Request) -> Output:
        """Run a request to its end. Raises EngineError when it ends with an error, or with a gap."""
        output = Output()
        async for delta in self._controller.submit(request):
            if delta.finish_reason == "error":
                raise EngineError(delta.error or "no reason was given")
            if delta.start != len(output.token_ids):
                raise EngineError(f"position {delta.start} came after {len(output.token_ids)} tokens")
            output.token_ids += delta.token_ids
            output.logprobs += delta.logprobs or []
            output.finish_reason = delta.finish_reason or ""
        return output

    async def _read(self) -> None:
        """Send requests until told to stop."""
        while not self._stopping:
            number, self._sent = self._sent, self._sent + 1
            which = number % len(self._pool)
            request = msgspec.structs.replace(self._pool[which], request_id=f"drill-{number}")
            try:
                output = await self._complete(request)
            except QueueFull as full:
                await asyncio.sleep(full.retry_after_s)
                continue
            except EngineError as error:
                self.lost += 1
                if len(self.errors) < KEPT_ERRORS:
                    self.errors.append(f"{request.request_id}: {error}")
                await asyncio.sleep(POLL_S)
                continue
            was_hit = request.request_id in self._hit
            self._hit.discard(request.request_id)
            same = output == self._reference[which]
            self.completed += 1
            self.hit += was_hit
            self.equal += same
            self.diverged += not same
            self.diverged_hit += was_hit and not same
            self.tokens += len(output.token_ids)

    async def _do_all(self, faults: Sequence[PlannedFault], seconds: float | None) -> None:
        for number, fault in enumerate(faults):
            left = float("inf") if seconds is None else self._started + seconds - time.monotonic()
            if left <= 0:
                return
            await asyncio.sleep(min(fault.pause_s, left))
            self.faults.append(outcome := await self._do(fault))
            self._tell(f"fault {number + 1}: {fault.kind} {fault.replica}.{fault.rank} {outcome.skipped}")
        if seconds is not None:
            await asyncio.sleep(max(0.0, self._started + seconds - time.monotonic()))

    async def _do(self, fault: PlannedFault) -> FaultOutcome:
        """One fault: wait until its replica decodes, hurt it, wait until it is mended."""
        decoding = await self._decoding_on(fault.replica)
        at_s = time.monotonic() - self._started
        if not decoding:
            return FaultOutcome(fault=fault, at_s=at_s, skipped=f"nothing decoded there for {DECODING_TIMEOUT_S:g} s")
        before = self._controller.state_of(fault.replica)
        self._hit.update(decoding)
        try:
            moment = await self._hurt(fault)
        except EngineError as error:
            return FaultOutcome(fault=fault, at_s=at_s, skipped=str(error))
        noticed = await self._until(lambda: self._controller.state_of(fault.replica)[1] > before[1])
        recovered = await self._until(lambda: self._controller.state_of(fault.replica)[0] == "ready")
        failures = (await self._status_of(fault.replica)).failures
        return FaultOutcome(
            fault=fault,
            at_s=at_s,
            decoding=len(decoding),
            cause=failures[-1].cause.splitlines()[0] if failures else "",
            noticed_s=None if noticed is None else noticed - moment,
            recovered_s=None if recovered is None else recovered - moment,
        )

    async def _hurt(self, fault: PlannedFault) -> float:
        """Do it; the moment it was done. Raises EngineError when it cannot be."""
        what, whom = fault.kind.split()
        if whom != "host":
            moment = time.monotonic()
            await self._controller.signal(fault.replica, fault.rank if whom == "rank" else None, SIGNALS[what])
            return moment
        ranks = (await self._status_of(fault.replica)).ranks
        if self._lose is None or not ranks:
            raise EngineError("hosts cannot be lost here")
        return await self._lose(ranks[fault.rank].host)

    async def _decoding_on(self, replica: int) -> list[str]:
        """Requests that decode on a replica, waited for; of the drill's own."""
        found: list[str] = []

        def some() -> bool:
            found[:] = [name for name, number, tokens in self._controller.progress() if number == replica and tokens]
            return bool(found) and self._controller.state_of(replica)[0] == "ready"

        await self._until(some, DECODING_TIMEOUT_S)
        return found

    async def _until(self, condition: Callable[[], bool], timeout_s: float | None = None) -> float | None:
        """The moment a condition came true; None when it did not in time."""
        deadline = time.monotonic() + (self._mend_timeout_s if timeout_s is None else timeout_s)
        while not condition():
            if time.monotonic() > deadline:
                return None
            await asyncio.sleep(POLL_S)
        return time.monotonic()

    async def _status_of(self, replica: int) -> ReplicaStatus:
        return next(found for found in (await self._controller.status()).replicas if found.number == replica)

    async def blocks_are_free(self) -> bool:
        """Whether no replica references a block, now that nothing runs; waits a little for it."""
        deadline = time.monotonic() + IDLE_TIMEOUT_S
        while True:
            stats = await self._controller.stats()
            if not any(any(replica.referenced_blocks) for replica in stats):
                return True
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(POLL_S)

    async def _sample(self) -> None:
        while True:
            await asyncio.sleep(SAMPLE_INTERVAL_S)
            self.samples.append(await asyncio.to_thread(self._sampled))

    def _sampled(self) -> Sample:
        return Sample(at_s=time.monotonic() - self._started, vitals=read_vitals())
