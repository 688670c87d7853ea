"""JoinedDeltas: fewer, larger deltas for requests whose tokens nobody follows one by one; telling of each costs the
threads that compute more than the scheduler does.
"""

from itertools import chain

import msgspec

from shoal.engine.messages import OutputDelta

HOLD_S = 0.25  # between the moments at which what is held of all requests passes


class JoinedDeltas:
    """Holds back what may come later. A request's first delta and its last one pass at once, the last with what was
    held.
    """

    def __init__(self) -> None:
        self._held: dict[str, list[OutputDelta]] = {}
        self._begun: set[str] = set()
        self._emptied = float("-inf")

    def add(self, request_id: str) -> None:
        """Hold back for this request from now on, until it ends."""
        self._held[request_id] = []

    def forget(self, request_id: str) -> None:
        """It ended, and nobody reads what is held. Unknown ids are no error."""
        self._held.pop(request_id, None)
        self._begun.discard(request_id)

    def passing(self, deltas: list[OutputDelta], now: float) -> list[OutputDelta]:
        """What is to be told of these new deltas and those held before them. now: monotonic."""
        if not self._held or not deltas:
            return deltas
        emptied = now - self._emptied >= HOLD_S
        if emptied:
            self._emptied = now
        return [told for delta in deltas if (told := self._passing(delta, emptied)) is not None]

    def _passing(self, delta: OutputDelta, emptied: bool) -> OutputDelta | None:
        request_id = delta.request_id
        held = self._held.get(request_id)
        if held is None:
            return delta
        held.append(delta)
        if delta.finish_reason is not None:
            self.forget(request_id)
        elif emptied or request_id not in self._begun:
            self._held[request_id] = []
            self._begun.add(request_id)
        else:
            return None
        return join(held)


def join(deltas: list[OutputDelta]) -> OutputDelta:
    """One delta of one request for several that follow each other, at least one."""
    first, last = deltas[0], deltas[-1]
    if first is last:
        return first
    return msgspec.structs.replace(
        last,
        start=first.start,
        token_ids=[*chain.from_iterable(delta.token_ids for delta in deltas)],
        logprobs=None if first.logprobs is None else [*chain.from_iterable(delta.logprobs or () for delta in deltas)],
        prompt_logprobs=first.prompt_logprobs,
    )
