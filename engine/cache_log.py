"""CacheLog: which prefixes a replica's cache holds, as changes for a router to follow. No torch.

Keys are the prefix cache's chained block hashes, shortened to 8 bytes: a router that errs once in 2**64 loses a hit, no
more. What comes and goes between two looks cancels out; after more than MAX_CHANGES the whole content is told anew.
"""

from collections.abc import Iterable

from shoal.engine.messages import Message

KEY_BYTES = 8
MAX_CHANGES = 8192


class CacheChanges(Message, frozen=True, kw_only=True):
    """Engine -> front end: keys, KEY_BYTES each, one behind the other. anew: the cache holds `stored` and nothing
    else.
    """

    stored: bytes = b""
    removed: bytes = b""
    anew: bool = False


def split_keys(joined: bytes) -> list[bytes]:
    """The keys of a message."""
    return [joined[start : start + KEY_BYTES] for start in range(0, len(joined), KEY_BYTES)]


class CacheLog:
    """Written by a BlockPool, taken by the engine's loop after each step."""

    def __init__(self, *, anew: bool = False) -> None:
        """anew: tell the whole content first, for a cache that holds something already."""
        self._changes: dict[bytes, bool] = {}
        self._overflowed = anew

    def stored(self, key: bytes) -> None:
        """The block with this key can be found now."""
        self._note(key, True)

    def removed(self, key: bytes) -> None:
        """It cannot any more."""
        self._note(key, False)

    def _note(self, key: bytes, stored: bool) -> None:
        if self._overflowed:
            return
        if self._changes.pop(key, stored) == stored:  # else the two cancel out
            self._changes[key] = stored
        if len(self._changes) > MAX_CHANGES:
            self._changes.clear()
            self._overflowed = True

    def take(self, held: Iterable[bytes]) -> CacheChanges | None:
        """The changes since the last call, None without any. held: all keys there are, looked at after too many
        changes only.
        """
        if self._overflowed:
            self._overflowed = False
            return CacheChanges(stored=_join(held), anew=True)
        if not self._changes:
            return None
        changes, self._changes = self._changes, {}
        return CacheChanges(
            stored=_join(key for key, stored in changes.items() if stored),
            removed=_join(key for key, stored in changes.items() if not stored),
        )


def _join(keys: Iterable[bytes]) -> bytes:
    return b"".join(key[:KEY_BYTES] for key in keys)
