"""DiskSync: has what is written to a file on the disk within a bound, from a thread, so that no writer waits for it."""

import logging
import os
import threading

logger = logging.getLogger("shoal")


class DiskSync:
    """One file at a time. Used by one thread. num_syncs: calls of fdatasync so far."""

    def __init__(self, fd: int, interval_s: float) -> None:
        """interval_s: between the first write that is not on the disk and the sync that puts it there."""
        self._fd, self._interval_s = fd, interval_s
        self._dirty = self._closing = self._warned = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self.num_syncs = 0

    def written(self) -> None:
        """Something was."""
        if self._dirty:  # the thread looks after it already, or will
            return
        with self._changed:
            self._dirty = True
            self._changed.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="shoal-sync", daemon=True)
            self._thread.start()

    def switch(self, fd: int) -> None:
        """Another file has taken the place of this one, and is on the disk. The old one may be closed."""
        with self._changed:
            self._fd, self._dirty = fd, False

    def close(self) -> None:
        """Sync what is left. The file may be closed. Idempotent."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._dirty or self._closing)
                self._changed.wait_for(lambda: self._closing, self._interval_s)
                if not self._dirty:
                    if self._closing:
                        return
                    continue
                self._dirty, fd = False, os.dup(self._fd)  # the file may be switched meanwhile
            try:
                os.fdatasync(fd)
                self.num_syncs += 1
            except OSError as error:
                if not self._warned:
                    logger.warning("what was written may not outlive a host that loses power: %s", error)
                self._warned = True
            finally:
                os.close(fd)
