"""WaitingLine: accepted requests that no replica works on, in the order they will be served. One event loop."""

import asyncio
from bisect import bisect_left, insort

from shoal.launcher.request_ledger import Entry


def _order(entry: Entry) -> tuple[int, float, int]:
    return entry.order


class WaitingLine:
    """Priority first, then arrival. Whoever is woken and finds a place leaves, and wakes the next."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []

    def __len__(self) -> int:
        return len(self._entries)

    def may_go(self, entry: Entry) -> bool:
        """Whether nobody waits who goes before this one."""
        return not self._entries or entry.order <= self._entries[0].order

    async def wait(self, entry: Entry, timeout_s: float | None) -> None:
        """Stand in line until woken, or until timeout_s has passed. Stays in line: `leave` it at the end."""
        if entry.turn is None:
            insort(self._entries, entry, key=_order)
        entry.turn = asyncio.get_running_loop().create_future()
        await asyncio.wait([entry.turn], timeout=timeout_s)

    def leave(self, entry: Entry) -> None:
        """The entry waits no more. Idempotent."""
        if entry.turn is not None:
            entry.turn = None
            del self._entries[bisect_left(self._entries, entry.order, key=_order)]

    def wake(self) -> None:
        """Something changed: the first may look whether there is a place."""
        if self._entries:
            self.wake_one(self._entries[0])

    def wake_all(self) -> None:
        """Something changed that concerns everybody."""
        for entry in self._entries:
            self.wake_one(entry)

    @staticmethod
    def wake_one(entry: Entry) -> None:
        """Something changed for this one."""
        if entry.turn is not None and not entry.turn.done():
            entry.turn.set_result(None)
