"""Stragglers: requests on a replica that is far slower than the others go on elsewhere, from what they have emitted.

Every INTERVAL_S the tokens each replica gave per request it worked on are compared; one that gave less than SLOWER of
the best, PATIENCE times in a row, hands its requests over, as many as the others have room for.
"""

import asyncio

from shoal.launcher.controller import Controller

INTERVAL_S = 1.0
SLOWER = 0.25
PATIENCE = 3


class Stragglers:
    """Watches a controller until cancelled (`run`). moved: requests that went on elsewhere."""

    def __init__(self, controller: Controller, interval_s: float = INTERVAL_S) -> None:
        self._controller, self._interval_s = controller, interval_s
        self._seen: dict[str, tuple[int, int]] = {}  # request -> replica and tokens at the last look
        self._rates: dict[int, float] = {}  # replica -> tokens per request when it last had any
        self._slow: dict[int, int] = {}  # replica -> looks in a row at which it was slow
        self.moved = 0

    async def run(self) -> None:
        """Look and act until cancelled."""
        while True:
            await asyncio.sleep(self._interval_s)
            await self.look()

    async def look(self) -> None:
        """Compare the replicas over the time since the last look, and move what is too slow."""
        gains = self._gains()
        self._rates.update({number: sum(tokens.values()) / len(tokens) for number, tokens in gains.items()})
        for number, tokens in gains.items():
            best = max((rate for other, rate in self._rates.items() if other != number), default=0.0)
            self._slow[number] = self._slow.get(number, 0) + 1 if self._rates[number] < SLOWER * best else 0
            if self._slow[number] >= PATIENCE:
                self._slow[number] = 0
                self.moved += await self._controller.move_away(list(tokens))

    def _gains(self) -> dict[int, dict[str, int]]:
        """Per replica, the tokens that each request gained which was there at the last look too."""
        gains: dict[int, dict[str, int]] = {}
        seen: dict[str, tuple[int, int]] = {}
        for request_id, number, tokens in self._controller.progress():
            seen[request_id] = (number, tokens)
            before = self._seen.get(request_id)
            if before is not None and before[0] == number:
                gains.setdefault(number, {})[request_id] = tokens - before[1]
        self._seen = seen
        return gains
