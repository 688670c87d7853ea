"""Executor: runs step plans on the ranks of one replica. Implemented in-process, over several ranks, and by a fake for
tests."""

from abc import ABC, abstractmethod

import msgspec

from shoal.engine.messages import StepPlan, StepResult


class ExecutorFailed(RuntimeError):
    """The executor cannot go on: names the rank (None when unknown), the cause and, after a newline, details."""

    def __init__(self, cause: str, rank: int | None = None, detail: str = "") -> None:
        self.cause, self.rank, self.detail = cause, rank, detail
        where = "" if rank is None else f"rank {rank}: "
        super().__init__(f"{where}{cause}" + (f"\n{detail}" if detail else ""))


class CacheGroup(msgspec.Struct, frozen=True, kw_only=True):
    """One cache group of the model: its layers share a block table.

    name: "full" or "window<tokens>". window: tokens a query sees including itself, None for all. num_blocks: the pool's
    size, the minimum over ranks.
    """

    name: str
    window: int | None
    num_blocks: int


class Capacity(msgspec.Struct, frozen=True, kw_only=True):
    """What an executor offers the scheduler. max_in_flight: plans that may be launched before the first result is
    taken, as stages of a pipeline work on them side by side (parallel.micro_batches). overlap: one more may be, whose
    rows follow those of the plan before with tokens that nobody but the ranks knows yet (TokenRef), so that planning
    takes no time from them.
    """

    block_size: int
    groups: list[CacheGroup]
    max_model_len: int
    vocab_size: int
    max_in_flight: int = 1
    overlap: bool = False

    @property
    def most_launched(self) -> int:
        """Plans without a result at one time."""
        return self.max_in_flight + self.overlap


class Executor(ABC):
    """Runs plans in the order they are launched. Used by one thread, the engine loop's."""

    capacity: Capacity

    @abstractmethod
    def launch(self, plan: StepPlan) -> int:
        """Start a plan and return its handle; the plan before it may have to be run first. At most
        `capacity.most_launched` may be unanswered. Raises ExecutorFailed."""

    @abstractmethod
    def result(self, handle: int, timeout_s: float) -> StepResult:
        """Wait for a plan's result; handles are taken in launch order. Raises ExecutorFailed, also when timeout_s
        passes."""

    @abstractmethod
    def health(self) -> None:
        """Raise ExecutorFailed when a rank is known to have ended. Returns at once."""

    @abstractmethod
    def stop(self) -> None:
        """End every rank within the configured time. May be called twice."""
