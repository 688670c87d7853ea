"""The jinja sandbox of chat templates: no way to Python, and bounds on time, size and repetition.

    render_bounded(compile_template(text), {"messages": [...]})

The environment is jinja's immutable sandbox (no attributes with underscores, no mutation of what is passed in, ranges
up to 100,000) with what Hugging Face templates expect. Beyond it, every operator, method and filter that can blow up
a value is checked, and a deadline is looked at on every call, attribute, turn of a loop and piece of output.
"""

import functools
import json
import re
import threading
import time
from collections.abc import Callable, Generator, Iterator
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.filters
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_RENDERED_CHARS = 16 << 20
MAX_RENDER_S = 10.0
_MAX_POWER_BITS = 4096
_MAX_SUMMED_LISTS = 10_000
_WIDE_FORMAT = re.compile(r"%[^a-zA-Z%]*(?:\*|\d{4})")
_WIDE_FIELD = re.compile(r"\{[^{}]*(?:\d{4}|\{)")

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
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str):
            args = tuple(list(value) if isinstance(value, Generator) else value for value in args)  # to be weighed
            _check_method(owner, getattr(obj, "__name__", ""), args, kwargs)
        return super().call(context, obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """What a template gets for the method `format` of a text; None for anything else."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> str:
            _check_method(value.__self__, value.__name__, args, kwargs)
            return wrapped(*args, **kwargs)

        return checked

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
        _Bounds().visit(tree)
        return tree


class _Bounds(jinja2.visitor.NodeTransformer):
    """Turns a ~ b into a call of a filter that checks the size of the result, and lets loops look at the deadline."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        """One loop."""
        self.generic_visit(node)
        timed = nodes.Filter(node.iter, "_timed", [], [], None, None, lineno=node.lineno)
        assert node.environment is not None
        timed.set_environment(node.environment)
        node.iter = timed
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        """One chain of ~."""
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno)
        bounded = nodes.Filter(parts, "_concatenate", [], [], None, None, lineno=node.lineno)
        assert node.environment is not None
        bounded.set_environment(node.environment)
        return bounded


def _timed(items: Any) -> Iterator[Any]:
    for item in items:
        _check_time()
        yield item


def _concatenate(parts: list[Any]) -> str:
    _check_size(_weight(parts))
    return "".join(map(str, parts))


def _check_time() -> None:
    if time.monotonic() > getattr(_running, "deadline", float("inf")):
        raise TemplateLimit(f"it ran for more than {MAX_RENDER_S:g} s")


def _check_size(size: int) -> None:
    if size > MAX_RENDERED_CHARS:
        raise TemplateLimit(f"it built a value of {size} characters or items; the limit is {MAX_RENDERED_CHARS}")


def _check_bits(bits: int) -> None:
    if bits > _MAX_POWER_BITS:
        raise TemplateLimit(f"it built a number of {bits} bits; the limit is {_MAX_POWER_BITS}")


def _weight(value: Any, limit: int = MAX_RENDERED_CHARS) -> int:
    """About how many characters a value is as text, counted up to a little over limit."""
    if isinstance(value, str):
        return len(value)
    if not isinstance(value, list | tuple | dict):
        return 8
    total = 2
    for item in value.items() if isinstance(value, dict) else value:
        total += _weight(item, limit - total) + 2
        if total > limit:
            break
    return total


def _check_method(text: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse a call of a method of a text whose result could be too long."""
    numbers = [value for value in args if isinstance(value, int)]
    if name in ("center", "ljust", "rjust", "zfill"):
        _check_size(max(numbers, default=0))
    elif name == "expandtabs":
        _check_size(len(text) + text.count("\t") * max([8, *numbers, *kwargs.values()]))
    elif name == "replace" and len(args) >= 2:
        _check_replace(text, args[0], args[1])
    elif name == "join" and args:
        _check_size(_weight(args[0]) + _length(args[0]) * len(text))
    elif name in ("format", "format_map"):
        if _WIDE_FIELD.search(text):
            raise TemplateLimit(f"it formats with {text[:40]!r}; widths may have 3 digits at most")
        _check_size(len(text) + (text.count("{") + 1) * (_weight(list(args)) + _weight(kwargs)))


def _check_replace(text: str, old: Any, new: Any) -> None:
    _check_size(len(text) + text.count(str(old)) * _length(new))


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


def _checked(function: Callable[..., Any], check: Callable[..., None]) -> Callable[..., Any]:
    """A filter whose arguments are checked first, jinja's own context included where the filter takes it."""

    def checked(*args: Any, **kwargs: Any) -> Any:
        _check_time()
        check(*args, **kwargs)
        return function(*args, **kwargs)

    return functools.update_wrapper(checked, function)


@jinja2.pass_eval_context
def _join(context: nodes.EvalContext, value: Any, d: str = "", attribute: str | None = None) -> str:
    items = list(value)
    _check_size(_weight(items) + len(items) * len(str(d)))
    return jinja2.filters.do_join(context, items, d, attribute)


@jinja2.pass_environment
def _sum(environment: jinja2.Environment, value: Any, attribute: Any = None, start: Any = 0) -> Any:
    """Lists are copied for every one that is added: few may be."""
    items = list(value)
    if not isinstance(start, int | float):
        _check_size(_weight(items) + (MAX_RENDERED_CHARS if len(items) > _MAX_SUMMED_LISTS else 0))
    return jinja2.filters.do_sum(environment, items, attribute, start)


def _check_replace_filter(_: Any, value: Any, old: Any, new: Any, count: Any = None) -> None:
    _check_size(_weight(value))
    _check_replace(str(value), old, new)


def _bounded_filter(function: Callable[..., Any], position: int) -> Callable[..., Any]:
    """A filter whose width argument is checked."""

    def checked(value: Any, *args: Any, **kwargs: Any) -> Any:
        width = kwargs.get("width", args[position] if len(args) > position else 0)
        _check_size(_weight(value))
        _check_size((width if isinstance(width, int) else _length(width)) * (1 + str(value).count("\n")))
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
    _check_size(_weight(value) + (indent * 1024 if isinstance(indent, int) else 0))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _environment() -> _Sandbox:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    filters = environment.filters
    filters["tojson"] = _tojson
    filters["_concatenate"], filters["_timed"] = _concatenate, _timed
    filters["join"], filters["sum"] = _join, _sum
    filters["replace"] = _checked(filters["replace"], _check_replace_filter)
    filters["string"] = _checked(filters["string"], lambda value: _check_size(_weight(value)))
    filters["batch"] = _checked(filters["batch"], lambda value, count, fill_with=None: _check_size(count))
    filters["slice"] = _checked(filters["slice"], lambda _, value, count, fill_with=None: _check_size(count))
    for name in ("urlize", "wordwrap", "pprint", "xmlattr"):  # no chat needs them, and they can lengthen texts
        del filters[name]
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
