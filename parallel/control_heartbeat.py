"""Heartbeat: a thread that tells the peer of a control channel what this process is doing, and notices at once when
the peer is gone.

It runs beside a main thread that may be deep in a kernel or a collective: the peer learns which step a silent rank is
in, and a process whose owner died ends although its main thread would not look at the channel for minutes.
"""

import os
import select
import threading
from collections.abc import Callable

import msgspec

from shoal.parallel.control import Channel, ControlError

HEARTBEAT_INTERVAL_S = 1.0
_GONE = select.POLLRDHUP | select.POLLHUP | select.POLLERR | select.POLLNVAL


class Heartbeat(threading.Thread):
    """Sends `message()` every interval_s (dropped while the peer takes nothing) and calls `on_gone` once when the peer
    hangs up.
    """

    def __init__(
        self,
        channel: Channel,
        message: Callable[[], msgspec.Struct],
        on_gone: Callable[[], None],
        interval_s: float = HEARTBEAT_INTERVAL_S,
    ) -> None:
        super().__init__(name="shoal-heartbeat", daemon=True)
        self._channel, self._message, self._on_gone, self._interval_s = channel, message, on_gone, interval_s
        self._stop_event = os.eventfd(0)

    def run(self) -> None:
        """Beat until stopped or the peer is gone."""
        poller = select.poll()
        poller.register(self._channel.fileno(), _GONE)
        poller.register(self._stop_event, select.POLLIN)
        while True:
            events = dict(poller.poll(self._interval_s * 1000))
            if self._stop_event in events:
                return
            if events or not self._beat():
                self._on_gone()
                return

    def _beat(self) -> bool:
        """Whether the peer is still there."""
        try:
            self._channel.try_send(self._message())
        except ControlError:
            return False
        return True

    def stop(self) -> None:
        """End the thread; call before the channel is closed. Idempotent."""
        if self._stop_event >= 0:
            os.eventfd_write(self._stop_event, 1)
            if self.is_alive():
                self.join()
            os.close(self._stop_event)
            self._stop_event = -1
