"""InProcessExecutor: one rank, in the calling process. launch runs the plan; result hands its result over."""

from collections import deque

from shoal.engine.executor import Capacity, Executor, ExecutorFailed
from shoal.engine.messages import StepPlan, StepResult
from shoal.engine.worker import Worker


class InProcessExecutor(Executor):
    """Runs plans on a worker that is loaded and has its cache."""

    def __init__(self, worker: Worker, capacity: Capacity) -> None:
        self.worker, self.capacity = worker, capacity
        self.results: deque[tuple[int, StepResult]] = deque()
        self.stopped = False

    def launch(self, plan: StepPlan) -> int:
        """Run the plan at once. A failure inside it ends the executor, with its cause."""
        if self.stopped:
            raise ExecutorFailed("the executor is stopped", rank=0)
        try:
            result = self.worker.run(plan)
        except (RuntimeError, ValueError, MemoryError) as error:
            raise ExecutorFailed(f"{type(error).__name__} in step {plan.step}: {error}", rank=0) from error
        assert result is not None, "one rank both computes and samples"
        self.results.append((plan.step, result))
        return plan.step

    def result(self, handle: int, timeout_s: float) -> StepResult:
        """The result of a launched plan; never waits, since launch did."""
        step, result = self.results.popleft()
        assert step == handle, "results are taken in launch order"
        return result

    def health(self) -> None:
        """There is nobody else who could have ended."""
        if self.stopped:
            raise ExecutorFailed("the executor is stopped", rank=0)

    def stop(self) -> None:
        """Give back the worker's memory."""
        if not self.stopped:
            self.stopped = True
            self.worker.close()
