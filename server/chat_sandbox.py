"""The jinja sandbox of chat templates: no way to Python, and bounds on time, size and repetition.

    render_bounded(compile_template(text), {"messages": [...]})

The environment is jinja's immutable sandbox (no attributes with underscores, no mutation of what is passed in, ranges
up to 100,000) with what Hugging Face templates expect. Beyond it, every operator that can blow up a value is checked,
and a deadline is looked at on every call, attribute and piece of output.
"""

import json
import re
import threading
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_RENDERED_CHARS = 16 << 20
MAX_RENDER_S = 10.0
_MAX_POWER_BITS = 4096
_WIDE_FORMAT = re.compile(r"%[^a-zA-Z%]*(?:\*|\d{4})")
_PADDING_METHODS = frozenset(("center", "ljust", "rjust", "zfill", "expandtabs"))

_running = threading.local()


class TemplateLimit(RuntimeError):
    """A template took too long, or made something too large."""


class _Generation(jinja2.ext.Extension):
    """{% generation %} ... {% endgeneration %} marks the assistant's text for training; here its body is simply
    rendered.
    """

    tags = {"generation"}  # noqa: RUF012 - jinja's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        """The body, in a scope of its own."""
        lineno = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=lineno)


class _Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox with bounds; see the top of the file."""

    intercepted_binops = frozenset(("*", "**", "+", "%"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An arithmetic operator, its result bounded."""
        _check_time()
        if operator == "*":
            _check_size(_length(left) * right if isinstance(right, int) else 0)
            _check_size(_length(right) * left if isinstance(left, int) else 0)
            _check_bits(_bits(left) + _bits(right))
        elif operator == "**":
            _check_bits(_bits(left) * right if isinstance(right, int) else 0)
        elif operator == "+":
            _check_size(_length(left) + _length(right))
        elif isinstance(left, str):
            _check_format(left)
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """A call from the template."""
        _check_time()
        if isinstance(getattr(obj, "__self__", None), str) and getattr(obj, "__name__", "") in _PADDING_METHODS:
            _check_size(max((value for value in args if isinstance(value, int)), default=0))
        return super().call(context, obj, *args, **kwargs)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """An attribute, in the template's sense."""
        _check_time()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """An item, in the template's sense."""
        _check_time()
        return super().getitem(obj, argument)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        _BoundConcatenation().visit(tree)
        return tree


class _BoundConcatenation(jinja2.visitor.NodeTransformer):
    """Turns a ~ b into a call of a filter that checks the size of the result."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        """One chain of ~."""
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno)
        bounded = nodes.Filter(parts, "_concatenate", [], [], None, None, lineno=node.lineno)
        assert node.environment is not None
        bounded.set_environment(node.environment)
        return bounded


def _concatenate(parts: list[Any]) -> str:
    texts = [str(part) for part in parts]
    _check_size(sum(map(len, texts)))
    return "".join(texts)


def _check_time() -> None:
    if time.monotonic() > getattr(_running, "deadline", float("inf")):
        raise TemplateLimit(f"it ran for more than {MAX_RENDER_S:g} s")


def _check_size(size: int) -> None:
    if size > MAX_RENDERED_CHARS:
        raise TemplateLimit(f"it built a value of {size} characters or items; the limit is {MAX_RENDERED_CHARS}")


def _check_bits(bits: int) -> None:
    if bits > _MAX_POWER_BITS:
        raise TemplateLimit(f"it built a number of {bits} bits; the limit is {_MAX_POWER_BITS}")


def _length(value: Any) -> int:
    return len(value) if isinstance(value, str | list | tuple) else 0


def _bits(value: Any) -> int:
    return value.bit_length() if isinstance(value, int) else 0


def _check_format(pattern: str) -> None:
    """Refuse a %-format whose width is large or comes from outside."""
    if _WIDE_FORMAT.search(pattern):
        raise TemplateLimit(f"it formats with the pattern {pattern[:40]!r}; widths may have 3 digits at most")


def _format(pattern: Any, *args: Any, **kwargs: Any) -> str:
    _check_format(str(pattern))
    return str(pattern) % (kwargs or args)


def _bounded_filter(function: Callable[..., Any], position: int) -> Callable[..., Any]:
    """A filter whose width argument is checked."""

    def checked(value: Any, *args: Any, **kwargs: Any) -> Any:
        width = kwargs.get("width", args[position] if len(args) > position else 0)
        _check_size(width * max(1, str(value).count("\n")) if isinstance(width, int) else _length(width))
        return function(value, *args, **kwargs)

    return checked


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as Hugging Face's filter writes it: not escaped for HTML."""
    if isinstance(indent, int):
        _check_size(indent * 1024)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _environment() -> _Sandbox:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    filters = environment.filters
    filters["tojson"] = _tojson
    filters["_concatenate"] = _concatenate
    filters["center"] = _bounded_filter(filters["center"], 0)
    filters["indent"] = _bounded_filter(filters["indent"], 0)
    filters["format"] = _format
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    del environment.globals["lipsum"]
    return environment


def compile_template(text: str) -> jinja2.Template:
    """Compile a template. Raises jinja2.TemplateSyntaxError."""
    return _environment().from_string(text)


def render_bounded(template: jinja2.Template, names: dict[str, Any]) -> str:
    """Render a compiled template. Raises TemplateLimit, jinja2.TemplateError and what the template's own mistakes
    raise.
    """
    _running.deadline = time.monotonic() + MAX_RENDER_S
    try:
        pieces, size = [], 0
        for piece in template.generate(**names):
            size += len(piece)
            _check_size(size)
            _check_time()
            pieces.append(piece)
        return "".join(pieces)
    finally:
        del _running.deadline
