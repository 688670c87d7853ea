"""QueueWait: how long a new request is expected to wait before its first step, from what runs and how long steps take.

A place frees when a running sequence ends; how much it has left is bounded by max_tokens, and guessed from the outputs
that ended (`Admission.remaining`). A wrong guess refuses a request that could have waited, or has one wait longer.
"""

from shoal.engine.scheduler import Scheduler

WEIGHT = 0.1  # of a new step in the mean
OUTLIER = 3.0  # a step counts as at most so many times the mean: compilation is not the step's cost


class QueueWait:
    """Of one scheduler. Everything in seconds."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._step_s: float | None = None

    def observe(self, seconds: float) -> None:
        """A step took so long."""
        if self._step_s is None:
            self._step_s = seconds
        else:
            self._step_s += WEIGHT * (min(seconds, OUTLIER * self._step_s) - self._step_s)

    def expected_s(self) -> float:
        """For one more request that comes behind those that wait; 0 before anything is known."""
        scheduler, step_s = self._scheduler, self._step_s
        seats = 0 if scheduler.short_of_blocks else scheduler.max_num_running - len(scheduler.running)
        ahead = len(scheduler.waiting) - seats
        occupying = [*scheduler.running, *scheduler.waiting[:seats]]  # before this one has its turn
        if step_s is None or ahead < 0 or not occupying:
            return 0.0
        left = sorted(map(scheduler.admission.remaining, occupying))
        rounds, place = divmod(ahead, len(left))
        return step_s * (left[place] + rounds * scheduler.admission.mean_output)
