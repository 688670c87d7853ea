"""LoopInbox: what another thread hands to an event loop without letting go of the interpreter.

`call_soon_threadsafe` wakes the loop in a system call that gives the interpreter to whoever waits for it: to the loop,
whose work then keeps the thread that computes, and the cores that wait for it, from the next step. Here the loop gets
the interpreter when that thread is in a kernel.
"""

import asyncio
import ctypes
import os
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

_write = ctypes.PyDLL(None).write  # PyDLL: keeps the interpreter
_write.argtypes, _write.restype = (ctypes.c_int, ctypes.c_char_p, ctypes.c_size_t), ctypes.c_ssize_t


class LoopInbox(Generic[T]):
    """Items on their way into one event loop, in order. Made and closed in the loop, filled from any thread.

    num_users: for its owner to count.
    """

    def __init__(self, take: Callable[[T], None]) -> None:
        """take: called in the running event loop with each item."""
        self.loop, self._take = asyncio.get_running_loop(), take
        self._items: deque[T] = deque()
        self.num_users = 0
        self._readable, self._writable = os.pipe()
        os.set_blocking(self._readable, False)
        os.set_blocking(self._writable, False)
        self.loop.add_reader(self._readable, self._look)

    def put(self, item: T) -> None:
        """Hand an item over. Raises RuntimeError when the loop is closed."""
        if self.loop.is_closed():
            raise RuntimeError("the event loop is closed")
        self._items.append(item)
        _write(self._writable, b"\0", 1)  # a pipe that is full wakes the loop as well

    def close(self) -> None:
        """Take nothing more; what is put from now on is lost."""
        self.loop.remove_reader(self._readable)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self._readable)  # not before: somebody may be about to put something
        close(self._writable)

    def _look(self) -> None:
        os.read(self._readable, 4096)
        while self._items:
            self._take(self._items.popleft())
