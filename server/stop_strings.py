"""Stop strings in streamed text: found across pieces, with text held back while it may be the start of one.

Knuth, Morris and Pratt's matcher per stop string, one step per character. The stop that counts is the one that ends
first (of those that end at the same place, the first in the list), so the result does not depend on how the text was
cut into tokens.
"""

from collections.abc import Sequence


class _Pattern:
    """One stop string and how much of it the text read so far ends with."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        self._fallback = [0] * (len(text) + 1)  # [k]: longest proper border of the first k characters
        border = 0
        for size in range(2, len(text) + 1):
            while border and text[border] != text[size - 1]:
                border = self._fallback[border]
            if text[border] == text[size - 1]:
                border += 1
            self._fallback[size] = border

    def step(self, character: str) -> bool:
        """Read a character; returns whether the stop string ends with it."""
        matched = self.matched
        if matched == len(self.text):
            matched = self._fallback[matched]
        while matched and self.text[matched] != character:
            matched = self._fallback[matched]
        self.matched = matched + 1 if self.text[matched] == character else 0
        return self.matched == len(self.text)

    def pending(self) -> int:
        """Characters at the end of the text that may be the start of this stop string (not the whole of it)."""
        return self.matched if self.matched < len(self.text) else self._fallback[self.matched]


class StopChecker:
    """Watches one output's text for stop strings.

    stops: non-empty strings. include: the stop string stays in the text. Text is released by `push` and, at the end,
    `close`.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        assert all(stops), "an empty stop string ends every output at once"
        self._patterns = [_Pattern(stop) for stop in stops]
        self._firsts = {stop[0] for stop in stops}
        self._include = include
        self._held = ""
        self.found: str | None = None

    def push(self, text: str, check: bool = True) -> str:
        """Take more text; returns the text that is now final. When a stop string is complete, `found` names it and what
        is returned ends the output. With check False (before min_tokens) a stop string that ends in this text does not
        count.
        """
        assert self.found is None, "nothing follows a stop string"
        if not self._held and self._firsts.isdisjoint(text):
            for pattern in self._patterns:
                pattern.matched = 0
            return text
        window = self._held + text
        for end, character in enumerate(text, start=len(self._held) + 1):
            complete = [pattern.text for pattern in self._patterns if pattern.step(character)]
            if complete and check:
                self.found = complete[0]
                self._held = ""
                return window[: end if self._include else end - len(self.found)]
        held_from = len(window) - max(pattern.pending() for pattern in self._patterns)
        self._held = window[held_from:]
        return window[:held_from]

    def close(self) -> str:
        """The output is complete without a stop string: returns the text that was held back."""
        final, self._held = self._held, ""
        return final
