"""Prefix keys: a block's content and all before it as one hash; and the longest prefix every cache group still holds.

A block's key is blake2b(parent's key, its token ids); the first parent is made from the salt. Equal keys mean equal
prefixes under equal salts (256 bits, no collision within reach), so the dictionaries from keys to blocks in the pools
are one radix tree with steps of constant time, and the same keys serve a router or a further tier of memory.
"""

from array import array
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b

from shoal.engine.block_pool import BlockPool

KEY_BYTES = 32


@lru_cache(maxsize=256)
def root_key(salt: str | None) -> bytes:
    """The parent of a first block: prefixes are shared only under an equal salt."""
    return blake2b(b"" if salt is None else b"salt:" + salt.encode(), digest_size=KEY_BYTES).digest()


def extend_keys(keys: list[bytes], root: bytes, token_ids: Sequence[int], block_size: int, num_blocks: int) -> None:
    """Append the keys of the blocks len(keys) .. num_blocks - 1 of a sequence. All of them must be full."""
    parent = keys[-1] if keys else root
    for start in range(len(keys) * block_size, num_blocks * block_size, block_size):
        content = array("I", token_ids[start : start + block_size]).tobytes()
        parent = blake2b(parent + content, digest_size=KEY_BYTES).digest()
        keys.append(parent)


def first_visible_block(position: int, window: int | None, block_size: int) -> int:
    """Index of the first block that a query at `position`, or any later one, reads."""
    return 0 if window is None else max(0, position - window + 1) // block_size


def longest_hit(
    keys: Sequence[bytes], pools: Sequence[BlockPool], windows: Sequence[int | None], block_size: int
) -> int:
    """How many leading blocks need not be computed: after them, every group holds what the next token reads."""
    groups = list(zip(pools, windows, strict=True))
    runs = [0] * len(groups)  # per group, blocks held in a row up to here
    longest = 0
    for count, key in enumerate(keys, start=1):
        complete = True
        for index, (pool, window) in enumerate(groups):
            if pool.lookup(key) is not None:
                runs[index] += 1
            elif window is None:
                return longest
            else:
                runs[index] = 0
            complete = complete and runs[index] >= count - first_visible_block(count * block_size, window, block_size)
        if complete:
            longest = count
    return longest
