"""Controllers over replicas without processes: scripted clients, and the real engine loop over FakeExecutors."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from shoal.configs.schema import CacheConfig, ModelConfig, SchedulerConfig, ShoalConfig
from shoal.engine.client import EngineClient, EngineError
from shoal.engine.executor import CacheGroup, Capacity
from shoal.engine.fake_executor import StepLatency
from shoal.engine.fake_model import FakeModel
from shoal.engine.messages import EngineStats, OutputDelta, Request
from shoal.launcher.controller import Controller, ControllerOptions
from shoal.launcher.dispatch import Limits
from shoal.launcher.fake_replica import VOCAB_SIZE, FakeReplica, FakeReplicas
from shoal.launcher.replica import Progress, ReplicaHandle
from shoal.launcher.replica_messages import Ready
from shoal.launcher.replica_slot import RestartPolicy
from tests.launcher.harness import until

QUICK = RestartPolicy(first_s=0.01, longest_s=0.02, lasting_s=1000.0)
CAPACITY = Capacity(
    block_size=16, groups=[CacheGroup(name="full", window=None, num_blocks=8)], max_model_len=100, vocab_size=100
)


class Scripted(EngineClient):
    """A replica's client that answers token by token when it is let, and refuses as told."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.refusal: Exception | None = None
        self.failure: EngineError | None = None
        self.go = asyncio.Event()
        self.accepted: list[str] = []
        self.aborted: list[str] = []
        self.closed = 0

    async def submit(self, request: Request) -> AsyncIterator[OutputDelta]:
        await self.health()
        if self.refusal is not None:
            raise self.refusal
        self.accepted.append(request.request_id)
        try:
            for index in range(request.sampling.max_tokens or 4):
                last = index == (request.sampling.max_tokens or 4) - 1
                yield OutputDelta(
                    request_id=request.request_id,
                    start=index,
                    token_ids=[self.number],
                    finish_reason="length" if last else None,
                )
                if not last:
                    await self.go.wait()
        finally:
            self.aborted.append(request.request_id)

    async def abort(self, request_ids: list[str]) -> None:
        self.aborted += request_ids

    async def stats(self) -> list[EngineStats]:
        await self.health()
        return [EngineStats(num_running=self.number)]

    async def health(self) -> None:
        if self.failure is not None:
            raise self.failure

    async def drain(self, timeout_s: float) -> list[str]:
        return []

    async def close(self) -> None:
        self.closed += 1


class ScriptedReplica(ReplicaHandle):
    """Ready at once; fails when `died` is set."""

    client: Scripted

    def __init__(self, client: Scripted) -> None:
        self.client, self.died = client, asyncio.Event()

    async def start(self) -> None: ...

    async def ready(self, timeout_s: float, on_progress: Progress | None = None) -> Ready:
        return Ready(capacity=CAPACITY, report="")

    async def failed(self) -> EngineError:
        await self.died.wait()
        assert self.client.failure is not None
        return self.client.failure

    async def stop(self) -> None:
        await self.client.close()


@asynccontextmanager
async def scripted(count: int, **options: Any) -> AsyncIterator[tuple[Controller, Sequence[Scripted]]]:
    """A controller that never rebuilds, over scripted replicas."""
    clients = [Scripted(number) for number in range(count)]

    async def factory(number: int) -> ReplicaHandle:
        return ScriptedReplica(clients[number])

    options = {"limits": Limits(max_model_len=100), "restarts": RestartPolicy(max_restarts=0), **options}
    controller = Controller(factory, count, ControllerOptions(**options))
    await controller.start()
    yield controller, clients
    await controller.close()


def settings(**scheduler: Any) -> ShoalConfig:
    """For fake replicas."""
    return ShoalConfig(
        model=ModelConfig(max_model_len=512),
        cache=CacheConfig(block_size=4),
        scheduler=SchedulerConfig(**{"max_num_seqs": 8, **scheduler}),
    )


@asynccontextmanager
async def fakes(
    count: int,
    step_s: float = 0.002,
    on_make: Callable[[int, int], None] | None = None,
    config: ShoalConfig | None = None,
    **options: Any,
) -> AsyncIterator[tuple[Controller, FakeReplicas]]:
    """A controller over fake replicas that take step_s for a step."""
    factory = FakeReplicas(config or settings(), StepLatency(base_s=step_s), on_make)
    options = {"limits": Limits(max_model_len=512), "restarts": QUICK, "drain_timeout_s": 5.0, **options}
    controller = Controller(factory, count, ControllerOptions(**options))
    try:
        await controller.start()
        yield controller, factory
    finally:
        await controller.close()


def answer(wanted: Request) -> list[int]:
    """What an undisturbed replica says."""
    count = wanted.sampling.max_tokens
    assert count is not None
    return FakeModel(VOCAB_SIZE).generate(wanted.prompt_token_ids, wanted.sampling, count)


def outstanding(controller: Controller) -> list[int]:
    """Tokens, per replica."""
    return [slot.work for _, slot in sorted(controller._slots.items())]


async def serving(controller: Controller, factory: FakeReplicas, number: int, life: int) -> FakeReplica:
    """Wait until a life of a replica has given a token."""
    slot = controller._slots[number]
    await until(lambda: slot.life == life and slot.served, f"life {life} of replica {number} to serve")
    return factory.lives[number][life]
