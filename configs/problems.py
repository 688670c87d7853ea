"""What is wrong with a configuration: one Problem per key, all of them raised together as a ConfigError."""

import difflib
from collections.abc import Iterable, Sequence

import msgspec

_SHOWN_CHARS = 80


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """One mistake: the key it is about, what is wrong and what would be right, the value given and where it stands.

    value: the text shown after the key, None when the key itself is the mistake. source: "command line",
    "tp2.yaml:7", ...
    """

    key: str
    message: str
    value: str | None = None
    source: str | None = None

    def __str__(self) -> str:
        shown = "" if self.value is None else f" = {self.value}"
        where = "" if self.source is None else f" ({self.source})"
        return f"{self.key}{shown}{where}: {self.message}"


class ConfigError(ValueError):
    """The configuration cannot be used. `problems` holds every mistake found, in the order of the settings."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        assert problems, "a ConfigError needs at least one problem"
        self.problems = list(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


def show(value: object) -> str:
    """A value as YAML and the flags spell it, cut to a readable length."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    text = value if isinstance(value, str) and value.isprintable() and value.strip() else repr(value)
    return text if len(text) <= _SHOWN_CHARS else text[: _SHOWN_CHARS - 3] + "..."


def nearest(word: str, possible: Iterable[str]) -> str | None:
    """The candidate most like `word`, also when one contains the other; None when none is similar."""
    names = list(possible)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if close:
        return close[0]
    containing = [name for name in names if len(word) >= 3 and (word in name or name in word)]
    return min(containing, key=len) if containing else None


def suggest(word: str, possible: Iterable[str]) -> str:
    """`; did you mean X?`, or nothing when no candidate is similar."""
    found = nearest(word, possible)
    return "" if found is None else f"; did you mean {found}?"
