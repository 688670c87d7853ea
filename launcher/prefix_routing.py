"""PrefixRouting: a request goes where most of its prompt is cached already, unless that replica has too much to do.

The replicas tell which blocks they hold, as chained hashes (`shoal.engine.cache_log`), so the longest cached prefix of
a prompt is found by walking its own chain. A replica is chosen for its prefix only while its outstanding tokens, with
this request's, stay within `load_factor` times those of the least loaded, with this request's. Prompts under way count
as cached where they are being computed: of many that come at once with a new prefix, all go to one replica.
"""

from collections.abc import Iterator, Mapping, Sequence

from shoal.engine.cache_log import KEY_BYTES
from shoal.engine.messages import Request
from shoal.engine.prefix_cache import extend_keys, root_key
from shoal.launcher.routing import LeastLoaded, Routing


class PrefixRouting(Routing):
    """Memory: one entry per cached block of a replica, and per block of a prompt that is being computed."""

    def __init__(self, block_size: int, load_factor: float) -> None:
        """load_factor: at least 1. Raises ValueError for less."""
        if load_factor < 1.0:
            raise ValueError(f"load_factor = {load_factor}: at least 1, where only the least loaded is chosen")
        self._block_size, self._load_factor = block_size, load_factor
        self._by_load = LeastLoaded()
        self._held: dict[int, set[bytes]] = {}
        self._coming: dict[int, dict[bytes, int]] = {}
        self._chains: dict[str, list[bytes]] = {}

    def rank(self, request: Request, loads: Mapping[int, int]) -> list[int]:
        """Those within the bound, longest cached prefix first; then the others, by load."""
        order = self._by_load.rank(request, loads)
        if len(order) < 2:
            return order
        cost = len(request.prompt_token_ids) + (request.sampling.max_tokens or 0)
        bound = self._load_factor * (loads[order[0]] + cost) - cost
        within = [number for number in order if loads[number] <= bound]
        hits = self.hits(request, within)
        within.sort(key=lambda number: -hits[number])  # stable: the least loaded of equals
        return within + [number for number in order if loads[number] > bound]

    def hits(self, request: Request, numbers: Sequence[int]) -> dict[int, int]:
        """Per replica, the leading blocks of the prompt that it holds, or is computing."""
        hits = dict.fromkeys(numbers, 0)
        candidates = list(numbers)
        for key in self._chain(request):
            candidates = [n for n in candidates if key in self._held.get(n, ()) or key in self._coming.get(n, ())]
            if not candidates:
                break
            for number in candidates:
                hits[number] += 1
        return hits

    def _chain(self, request: Request) -> Iterator[bytes]:
        """Keys of the prompt's full blocks, made as far as they are asked for; the last token is always computed."""
        keys: list[bytes] = []
        root, tokens = root_key(request.cache_salt), request.prompt_token_ids
        for count in range(1, (len(tokens) - 1) // self._block_size + 1):
            extend_keys(keys, root, tokens, self._block_size, count)
            yield keys[-1][:KEY_BYTES]

    def sent(self, request: Request, number: int) -> None:
        """Its prompt is about to be cached there."""
        chain = self._chains[request.request_id] = list(self._chain(request))
        coming = self._coming.setdefault(number, {})
        for key in chain:
            coming[key] = coming.get(key, 0) + 1

    def arrived(self, request: Request, number: int) -> None:
        """The replica has told what it cached of it."""
        coming = self._coming.get(number, {})
        for key in self._chains.pop(request.request_id, ()):
            count = coming.get(key, 0) - 1
            if count > 0:
                coming[key] = count
            else:
                coming.pop(key, None)

    def cache_changed(self, number: int, stored: Sequence[bytes], removed: Sequence[bytes], *, anew: bool) -> None:
        """Follow a replica's cache."""
        held = self._held.setdefault(number, set())
        if anew:
            held.clear()
        held.update(stored)
        held.difference_update(removed)

    def forget(self, number: int) -> None:
        """The replica's memory is gone."""
        self._held.pop(number, None)
        self._coming.pop(number, None)

    @property
    def num_entries(self) -> int:
        """Keys that are remembered, over all replicas."""
        return sum(map(len, self._held.values())) + sum(map(len, self._coming.values()))
