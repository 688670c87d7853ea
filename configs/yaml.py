"""YAML as the configuration reads it: the 1.2 core schema, strict and bounded, every key with its line.

PyYAML's loaders follow YAML 1.1, where `no` is false, `1e-5` a string and `12:30` a number. Here its parser only gives
the events; scalars are resolved by the core schema of YAML 1.2.2 (section 10.3.2). Duplicate keys, tags, several
documents and undefined aliases are refused, and file size, depth and alias expansion are capped.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

MAX_FILE_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_NODES = 100_000

_CONSTANTS: dict[str, object] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), float("nan")),
    **{sign + text: float("inf") for sign in ("", "+") for text in (".inf", ".Inf", ".INF")},
    **{"-" + text: float("-inf") for text in (".inf", ".Inf", ".INF")},
}
_DECIMAL = re.compile(r"[-+]?[0-9]+")
_OCTAL = re.compile(r"0o[0-7]+")
_HEXADECIMAL = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_MAX_DIGITS = 1000


class YamlError(ValueError):
    """The text is not YAML this reader takes; `line` counts from 1."""

    def __init__(self, message: str, line: int) -> None:
        self.line = line
        super().__init__(message)


class YamlMapping(dict[Any, Any]):
    """A mapping that knows the line of each of its keys."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: dict[Any, int] = {}


def resolve_scalar(text: str) -> Any:
    """The value of a plain scalar in the core schema: None, bool, int, float or the text itself."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if len(text) > _MAX_DIGITS:
        return text
    if _DECIMAL.fullmatch(text):
        return int(text)
    if _OCTAL.fullmatch(text):
        return int(text, 8)
    if _HEXADECIMAL.fullmatch(text):
        return int(text, 16)
    return float(text) if _FLOAT.fullmatch(text) else text


def read_yaml(path: Path) -> Any:
    """The value in a file. Raises OSError, and YamlError for a file too large, not UTF-8, or not acceptable YAML."""
    with path.open("rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    return parse_yaml(data)


def parse_yaml(data: str | bytes) -> Any:
    """The value in a text: YamlMapping, list or scalar; None for an empty one. Raises YamlError."""
    raw = data.encode() if isinstance(data, str) else data
    if len(raw) > MAX_FILE_BYTES:
        raise YamlError(f"the file is larger than {MAX_FILE_BYTES} bytes", 1)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise YamlError("the file is not UTF-8 text", raw[: error.start].count(b"\n") + 1) from None
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return _Builder(yaml.parse(text, Loader=loader)).document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlError(f"not valid YAML: {error.problem or error}", mark.line + 1 if mark else 1) from None
    except yaml.YAMLError as error:
        raise YamlError(f"not valid YAML: {error}", 1) from None


class _Builder:
    """Turns parser events into values; one use."""

    def __init__(self, events: Iterator[yaml.Event]) -> None:
        self._events = events
        self._anchors: dict[str, tuple[Any, int]] = {}
        self._num_nodes = 0

    def document(self) -> Any:
        """The only document's value."""
        next(self._events)  # StreamStartEvent
        if isinstance(next(self._events), yaml.StreamEndEvent):
            return None
        value = self._node(next(self._events), 0)
        next(self._events)  # DocumentEndEvent
        follower = next(self._events)
        if not isinstance(follower, yaml.StreamEndEvent):
            raise YamlError("a second document begins; one file holds one document", _line(follower))
        return value

    def _node(self, event: yaml.Event, depth: int) -> Any:
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self._anchors:
                raise YamlError(
                    f"alias *{event.anchor} has no anchor &{event.anchor} that ends before it", _line(event)
                )
            value, num_nodes = self._anchors[event.anchor]
            self._count(num_nodes, event)
            return value
        if depth > MAX_DEPTH:
            raise YamlError(f"nested deeper than {MAX_DEPTH} levels", _line(event))
        assert isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent), event
        if event.tag is not None:
            raise YamlError(f"tags are not taken: {event.tag}", _line(event))
        before = self._num_nodes
        self._count(1, event)
        if isinstance(event, yaml.ScalarEvent):
            value = resolve_scalar(event.value) if event.implicit[0] else event.value  # implicit[0]: plain
        elif isinstance(event, yaml.SequenceStartEvent):
            value = [self._node(item, depth + 1) for item in self._items()]
        else:
            value = self._mapping(depth)
        if event.anchor is not None:
            self._anchors[event.anchor] = (value, self._num_nodes - before)
        return value

    def _mapping(self, depth: int) -> YamlMapping:
        mapping = YamlMapping()
        for event in self._items():
            if not isinstance(event, yaml.ScalarEvent):
                raise YamlError("a key must be a plain word or number", _line(event))
            key = self._node(event, depth + 1)
            if key in mapping:
                raise YamlError(f"duplicate key {key}, first on line {mapping.lines[key]}", _line(event))
            mapping.lines[key] = _line(event)
            mapping[key] = self._node(next(self._events), depth + 1)
        return mapping

    def _items(self) -> Iterator[yaml.Event]:
        for event in self._events:
            if isinstance(event, yaml.CollectionEndEvent):
                return
            yield event

    def _count(self, num_nodes: int, event: yaml.Event) -> None:
        self._num_nodes += num_nodes
        if self._num_nodes > MAX_NODES:
            raise YamlError(f"more than {MAX_NODES} values after aliases are expanded", _line(event))


def _line(event: yaml.Event) -> int:
    return event.start_mark.line + 1 if event.start_mark else 1
