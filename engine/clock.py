"""Clock: where the engine gets its time, so that tests and planning can run it on virtual seconds."""

import time


class Clock:
    """The machine's time."""

    def time(self) -> float:
        """Seconds since 1970: what arrivals and deadlines are compared with."""
        return time.time()

    def monotonic(self) -> float:
        """Seconds from an arbitrary moment, never going back: for durations."""
        return time.perf_counter()

    def sleep_until(self, moment: float) -> None:
        """Return when `monotonic()` has reached `moment`."""
        time.sleep(max(0.0, moment - self.monotonic()))


class VirtualClock(Clock):
    """A clock that moves only when somebody sleeps on it."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def time(self) -> float:
        """The virtual moment."""
        return self.now

    def monotonic(self) -> float:
        """The same moment."""
        return self.now

    def sleep_until(self, moment: float) -> None:
        """Move to `moment` at once."""
        self.now = max(self.now, moment)
