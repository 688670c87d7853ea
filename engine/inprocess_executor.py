"""InProcessExecutor: one rank, in the calling process. launch hands a plan to the device where that waits for nothing,
else result runs it."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from shoal.engine.begun import Begun
from shoal.engine.executor import Capacity, Executor, ExecutorFailed
from shoal.engine.messages import StepPlan, StepResult
from shoal.engine.worker import Worker


class InProcessExecutor(Executor):
    """Runs plans on a worker that is loaded and has its cache."""

    def __init__(self, worker: Worker, capacity: Capacity) -> None:
        self.worker, self.capacity = worker, capacity
        self.begun: deque[Begun] = deque()
        self.stopped = False

    def launch(self, plan: StepPlan) -> int:
        """Begin with the plan. A failure in it ends the executor, with its cause."""
        if self.stopped:
            raise ExecutorFailed("the executor is stopped", rank=0)
        with named_failure(plan.step):
            self.begun.append(self.worker.begin(plan))
        return plan.step

    def result(self, handle: int, timeout_s: float) -> StepResult:
        """The result of a launched plan, computed now unless the device was quicker. A failure likewise."""
        begun = self.begun.popleft()
        assert begun.plan.step == handle, "results are taken in launch order"
        with named_failure(handle):
            result = self.worker.finish(begun)
        assert result is not None, "one rank both computes and samples"
        return result

    def health(self) -> None:
        """There is nobody else who could have ended."""
        if self.stopped:
            raise ExecutorFailed("the executor is stopped", rank=0)

    def stop(self) -> None:
        """Give back the worker's memory."""
        if not self.stopped:
            self.stopped = True
            self.begun.clear()
            self.worker.close()


@contextmanager
def named_failure(step: int) -> Iterator[None]:
    """Turn what a step may raise into ExecutorFailed."""
    try:
        yield
    except (RuntimeError, ValueError, MemoryError) as error:
        raise ExecutorFailed(f"{type(error).__name__} in step {step}: {error}", rank=0) from error
