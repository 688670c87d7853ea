"""FakeReplica: a replica without processes, the real engine loop over a FakeExecutor, for drills of the controller.

Tokens are hashes of the context (`shoal.engine.fake_model`), so a stream that was continued wrongly shows it.
"""

import signal
from collections.abc import Callable

from shoal.configs.schema import ShoalConfig
from shoal.engine.client import EngineError
from shoal.engine.engine_core import EngineCore
from shoal.engine.executor import CacheGroup, Capacity
from shoal.engine.fake_executor import FakeExecutor, Fault, StepLatency
from shoal.engine.inprocess_client import InprocessClient
from shoal.launcher.replica import Progress, ReplicaHandle
from shoal.launcher.replica_messages import Ready

VOCAB_SIZE = 4096


def fake_capacity(config: ShoalConfig, num_blocks: int = 1024) -> Capacity:
    """One cache group, of the settings' block size and context length."""
    return Capacity(
        block_size=config.cache.block_size,
        groups=[CacheGroup(name="full", window=None, num_blocks=config.cache.num_blocks or num_blocks)],
        max_model_len=config.model.max_model_len or 512,
        vocab_size=VOCAB_SIZE,
    )


class FakeReplica(ReplicaHandle):
    """One life. `kill` ends it as a dying rank would."""

    client: InprocessClient

    def __init__(self, config: ShoalConfig, latency: StepLatency | None = None) -> None:
        self.config = config
        self.executor = FakeExecutor(fake_capacity(config), latency=latency)

    async def start(self) -> None:
        """Make the engine."""
        self.core = EngineCore(self.config, self.executor)
        self.client = InprocessClient(self.core)

    async def ready(self, timeout_s: float, on_progress: Progress | None = None) -> Ready:
        """At once."""
        return Ready(capacity=self.executor.capacity, report="no memory")

    async def failed(self) -> EngineError:
        """From the engine's thread."""
        return await self.client.failed()

    def watch_accepted(self, on_accepted: Callable[[str], None]) -> None:
        """From the engine's thread."""
        self.client.on_accepted = on_accepted

    def kill(self, cause: str = "killed by SIGKILL") -> None:
        """The next step, or the next look at the ranks, fails."""
        self.executor.fault = Fault(step=0, cause=cause)

    async def signal(self, rank: int | None, number: int) -> None:
        """Any signal kills."""
        self.kill(f"killed by {signal.Signals(number).name}")

    async def stop(self) -> None:
        """End the engine's thread."""
        await self.client.close()


class FakeReplicas:
    """A factory of FakeReplicas. lives: every handle it made, by number. on_make: called for each; may raise."""

    def __init__(
        self,
        config: ShoalConfig,
        latency: StepLatency | None = None,
        on_make: Callable[[int, int], None] | None = None,
    ) -> None:
        """on_make: given the replica's number and the count of its earlier lives."""
        self.config, self.latency, self._on_make = config, latency, on_make
        self.lives: dict[int, list[FakeReplica]] = {}

    async def __call__(self, number: int) -> FakeReplica:
        """The next life of a replica."""
        lives = self.lives.setdefault(number, [])
        if self._on_make is not None:
            self._on_make(number, len(lives))
        lives.append(FakeReplica(self.config, self.latency))
        return lives[-1]
