"""RankWatch: what every rank of a replica said last, and whether one of them, or all together, hang.

A rank hangs when it is silent for the limit (stopped, or stuck with the interpreter's lock), or when a step is under
way and no rank has come any further for the limit. The one to blame is then one that does not wait in a collective for
the others, if there is one.
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from shoal.engine.rank_messages import Heartbeat

STALE_HEARTBEAT_S = 3.0
LOOK_INTERVAL_S = 1.0
SHORTEST_S = 1.5  # launcher.hang_timeout_s allows no less


def patience_s(hang_timeout_s: float) -> float:
    """After how long a silence or standstill counts as a hang, so that it is known within launcher.hang_timeout_s: up
    to 2 s less, for a beat that was still sent, the look at it, and the stacks.
    """
    return round(hang_timeout_s - min(2.0, 0.3 * (hang_timeout_s - SHORTEST_S)), 3)


class Hang(NamedTuple):
    """rank: to blame; None when every rank waits for others. silent: it does not even beat."""

    cause: str
    rank: int | None
    silent: bool


class _Heard:
    """A rank's last heartbeat, when it came, and when it last told of progress."""

    __slots__ = ("beat", "moment", "moved")

    def __init__(self, moment: float) -> None:
        self.beat: Heartbeat | None = None
        self.moment = self.moved = moment


class RankWatch:
    """Written by the engine's thread; `describe` may be called from others."""

    def __init__(self, hosts: Sequence[str], limit_s: float, now: Callable[[], float] = time.monotonic) -> None:
        """hosts: of the ranks, in order. limit_s: `patience_s`."""
        self.hosts, self.limit_s, self._now = list(hosts), limit_s, now
        self._last_look = now()
        self._heard = [_Heard(self._last_look) for _ in self.hosts]
        self._step_since: float | None = None

    def hear(self, rank: int, beat: Heartbeat) -> None:
        """A rank's heartbeat came."""
        heard, now = self._heard[rank], self._now()
        if heard.beat is None or beat.count != heard.beat.count:
            heard.moved = now
        heard.beat, heard.moment = beat, now

    def hang(self, waiting: bool) -> Hang | None:
        """Whether something hangs. Call at least every LOOK_INTERVAL_S, after hearing what there is.

        waiting: the engine waits for a step's result. A longer pause between calls was this process's own (suspended,
        or held up by its front end), and does not count against the ranks.
        """
        now = self._now()
        paused = now - self._last_look - 2 * LOOK_INTERVAL_S
        self._last_look = now
        if paused > 0:
            for heard in self._heard:
                heard.moment, heard.moved = heard.moment + paused, heard.moved + paused
            self._step_since = None if self._step_since is None else self._step_since + paused
        if not waiting:
            self._step_since = None
        elif self._step_since is None:
            self._step_since = now
        for rank, heard in enumerate(self._heard):
            if now - heard.moment > self.limit_s:
                return Hang(f"gave no sign of life for {self.limit_s:g} s (launcher.hang_timeout_s)", rank, True)
        if self._step_since is None or now - self._step_since <= self.limit_s:
            return None
        if any(now - heard.moved <= self.limit_s for heard in self._heard):
            return None
        return self._standstill()

    def _standstill(self) -> Hang:
        """No rank moves, all beat."""
        beats = [heard.beat for heard in self._heard]
        busy = [rank for rank, beat in enumerate(beats) if beat is not None and beat.step and not beat.waits]
        limit = f"no progress for {self.limit_s:g} s (launcher.hang_timeout_s)"
        if len(busy) == 1 or (busy and len(busy) < len(beats)):
            return Hang(f"hangs, {limit}", busy[0], False)
        if busy:
            return Hang(f"every rank hangs outside of any collective, {limit}", None, False)
        return Hang(f"every rank waits for others, {limit}", None, False)

    def step_done(self) -> None:
        """A result came: whatever comes next has its full time."""
        self._step_since = None

    def stalest(self) -> int | None:
        """The one rank that has been silent for seconds while others were not; None when there is no such one."""
        now = self._now()
        silent = [rank for rank, heard in enumerate(self._heard) if now - heard.moment > STALE_HEARTBEAT_S]
        return silent[0] if len(silent) == 1 else None

    def describe(self) -> list[tuple[str, float, float]]:
        """Per rank: what it said it does, for how long, and how many seconds ago it said so."""
        now = self._now()
        return [
            ("never heard", 0.0, now - heard.moment)
            if heard.beat is None
            else (_words(heard.beat), heard.beat.waits_s if heard.beat.waits else heard.beat.for_s, now - heard.moment)
            for heard in self._heard
        ]

    def doing(self) -> str:
        """The same, a line per rank, with the Python stack of those that told it."""
        lines = []
        for rank, (doing, for_s, heard_s) in enumerate(self.describe()):
            beat = self._heard[rank].beat
            when = "" if beat is None else f" since {for_s:.1f} s, heard {heard_s:.1f} s ago"
            lines.append(f"rank {rank}: {doing}{when}")
            if beat is not None and beat.stack:
                lines += [f"    {line}" for line in beat.stack.splitlines()]
        return "\n".join(lines)


def _words(beat: Heartbeat) -> str:
    return f"{beat.doing}, in {beat.waits}" if beat.waits else beat.doing
