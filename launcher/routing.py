"""Which replica a request goes to: policies over the replicas' load, in outstanding tokens. No waiting, no processes.

The controller and the simulation of `scripts/bench_routing.py` use the same objects.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from shoal.engine.messages import Request


class Routing(ABC):
    """Ranks replicas for a request. Replicas are known by their numbers."""

    @abstractmethod
    def rank(self, request: Request, loads: Mapping[int, int]) -> list[int]:
        """The replicas of `loads` (number -> outstanding tokens), best first."""

    def sent(self, request: Request, number: int) -> None:
        """The request was given to a replica."""
        return

    def arrived(self, request: Request, number: int) -> None:
        """The replica has computed the request's prompt, or gives the request back."""
        return

    def cache_changed(self, number: int, stored: Sequence[bytes], removed: Sequence[bytes], *, anew: bool) -> None:
        """Keys of blocks that a replica's cache now holds, or no longer. anew: it holds nothing but what is stored."""
        return

    def forget(self, number: int) -> None:
        """The replica's memory is gone."""
        return


class RoundRobin(Routing):
    """One after the other."""

    def __init__(self) -> None:
        self._turn = 0

    def rank(self, request: Request, loads: Mapping[int, int]) -> list[int]:
        """Those that follow the last one's turn."""
        order = sorted(loads)
        start = self._turn % len(order) if order else 0
        self._turn += 1
        return order[start:] + order[:start]


class LeastLoaded(Routing):
    """The fewest outstanding tokens; equals take turns."""

    def __init__(self) -> None:
        self._turns = RoundRobin()

    def rank(self, request: Request, loads: Mapping[int, int]) -> list[int]:
        """By load."""
        return sorted(self._turns.rank(request, loads), key=loads.__getitem__)
