"""Rate: how often something happens, over the last seconds. Constant memory."""

import time
from collections import deque
from collections.abc import Callable

SPAN_S = 10.0
BUCKETS = 20


class Rate:
    """Counts in buckets of SPAN_S / BUCKETS seconds. total: since the start."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.total = 0
        self._now, self._started = now, now()
        self._buckets: deque[tuple[int, int]] = deque(maxlen=BUCKETS + 1)

    def add(self, count: int) -> None:
        """Something happened this often, now."""
        self.total += count
        number = int(self._now() * BUCKETS / SPAN_S)
        if self._buckets and self._buckets[-1][0] == number:
            count += self._buckets.pop()[1]
        self._buckets.append((number, count))

    def per_s(self) -> float:
        """Mean over the last SPAN_S seconds, or over the life so far when that is shorter."""
        now = self._now()
        first = (now - SPAN_S) * BUCKETS / SPAN_S
        recent = sum(count for number, count in self._buckets if number >= first)
        return recent / max(SPAN_S / BUCKETS, min(SPAN_S, now - self._started))
