"""The settings as data: every field of the declaration with its key, flags, keyword, accepted values and description.

Flags, the loader, the documentation table and `explain` read this list, so that each follows the one declaration.
"""

import functools
import math
import typing
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec
from msgspec import inspect as msgspec_inspect

from shoal.configs.problems import show, suggest
from shoal.configs.sampling import SamplingParams
from shoal.configs.schema import Section, ShoalConfig
from shoal.configs.sizes import SIZE_EXAMPLES, format_size, parse_size

SAMPLING = "sampling"


@dataclass(frozen=True, slots=True)
class Field:
    """One setting. key is `section.name`; flags and keyword are what the command line and Python call it.

    type: the declared annotation. size: bytes that may be written as `4GiB`. accepts: the legal values in words.
    """

    section: str
    name: str
    type: Any
    default: Any
    description: str
    flags: tuple[str, ...]
    keyword: str
    size: bool
    accepts: str

    @property
    def key(self) -> str:
        """`section.name`, as in YAML and `--set`."""
        return f"{self.section}.{self.name}"

    @property
    def default_text(self) -> str:
        """The default as a person would write it."""
        if self.size and isinstance(self.default, int):
            return format_size(self.default).replace(" ", "")
        return show(self.default)

    @property
    def info(self) -> msgspec_inspect.Type:
        """The type without null and without its description."""
        return _without_null(msgspec_inspect.type_info(self.type))

    @property
    def choices(self) -> tuple[str, ...]:
        """The words of a Literal, in their declared order; empty for other types."""
        return _choices(self.type)


@functools.cache
def section_types() -> dict[str, type[Section]]:
    """Name and class of every section, in the declared order, without `sampling`."""
    hints = typing.get_type_hints(ShoalConfig)
    return {name: kind for name, kind in hints.items() if isinstance(kind, type) and issubclass(kind, Section)}


@functools.cache
def settings() -> dict[str, Field]:
    """Every setting of every section by its key, in the declared order, without `sampling`."""
    found = [field for section, kind in section_types().items() for field in _fields_of(section, kind)]
    return {field.key: field for field in found}


@functools.cache
def sampling_settings() -> dict[str, Field]:
    """Every field of SamplingParams as a setting of the `sampling` section, by its key."""
    return {field.key: field for field in _fields_of(SAMPLING, SamplingParams)}


@functools.cache
def settings_by_keyword() -> dict[str, Field]:
    """Every setting by its Python keyword, without `sampling`."""
    return {field.keyword: field for field in settings().values()}


def convert(field: Field, value: Any) -> Any:
    """The value as the declared type; only sizes in words and integers for floats are turned into it.

    Raises ValueError saying what is legal.
    """
    if field.size and isinstance(value, str):
        value = parse_size(value)
    check_finite(value)
    try:
        return msgspec.convert(value, field.type, strict=True)
    except msgspec.ValidationError:
        hint = suggest(value, field.choices) if isinstance(value, str) else ""
        raise ValueError(f"must be {field.accepts}{_mismatch(field, value)}{hint}") from None


def check_finite(value: Any) -> None:
    """Raise ValueError when a number in the value, however deep, is NaN or infinite."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("must be a finite number")
    if isinstance(value, dict):
        check_finite(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            check_finite(item)


def _fields_of(section: str, kind: type[msgspec.Struct]) -> list[Field]:
    return [_field(section, info) for info in msgspec.structs.fields(kind)]


def _field(section: str, info: msgspec.structs.FieldInfo) -> Field:
    meta = get_args(info.type)[-1]  # an Annotated of an alias holds the alias's own Meta first
    assert isinstance(meta, msgspec.Meta), f"{section}.{info.name} has no description"
    extra = meta.extra or {}
    size = bool(extra.get("size"))
    return Field(
        section=section,
        name=info.name,
        type=info.type,
        default=info.default,
        description=meta.description or "",
        flags=tuple(extra.get("flags", ["--" + info.name.replace("_", "-")])),
        keyword=extra.get("keyword", info.name),
        size=size,
        accepts=_accepts(info.type, size),
    )


def _accepts(annotation: Any, size: bool) -> str:
    choices = _choices(annotation)
    info = msgspec_inspect.type_info(annotation)
    if choices:
        text = "one of " + ", ".join(choices)
    elif size:
        smallest = _without_null(info)
        assert isinstance(smallest, msgspec_inspect.IntType), f"a size must be declared as int, not {smallest}"
        text = f"a size in bytes of at least {smallest.ge}, such as {SIZE_EXAMPLES},"
    else:
        text = _describe(_without_null(info))
    return text.removesuffix(",") + (", or null" if _is_optional(info) else "")


def _choices(annotation: Any) -> tuple[str, ...]:
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def _describe(info: msgspec_inspect.Type) -> str:
    if isinstance(info, msgspec_inspect.Metadata):
        return _describe(info.type)
    if isinstance(info, msgspec_inspect.IntType):
        return "an integer" + _bounds(info)
    if isinstance(info, msgspec_inspect.FloatType):
        return "a number" + _bounds(info)
    if isinstance(info, msgspec_inspect.BoolType):
        return "true or false"
    if isinstance(info, msgspec_inspect.ListType):
        return f"a list, each item {_describe(info.item_type)}"
    if isinstance(info, msgspec_inspect.DictType):
        return f"a mapping of {_describe(info.key_type)} to {_describe(info.value_type)}"
    if isinstance(info, msgspec_inspect.UnionType):
        return " or ".join(_describe(item) for item in info.types)
    assert isinstance(info, msgspec_inspect.StrType), f"no words for {info}"
    return "a text that is not empty" if info.min_length else "a text"


def _bounds(info: msgspec_inspect.IntType | msgspec_inspect.FloatType) -> str:
    if info.ge is not None and info.le is not None:
        return f" from {_number(info.ge)} to {_number(info.le)}"
    parts = []
    if info.ge is not None:
        parts.append(f"of at least {_number(info.ge)}")
    if info.gt is not None:
        parts.append(f"above {_number(info.gt)}")
    if info.le is not None:
        parts.append(f"at most {_number(info.le)}")
    return " " + " and ".join(parts) if parts else ""


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)


def _without_null(info: msgspec_inspect.Type) -> msgspec_inspect.Type:
    if isinstance(info, msgspec_inspect.Metadata):
        return _without_null(info.type)
    if isinstance(info, msgspec_inspect.UnionType):
        kinds = tuple(kind for kind in info.types if not isinstance(kind, msgspec_inspect.NoneType))
        return kinds[0] if len(kinds) == 1 else msgspec_inspect.UnionType(kinds)
    return info


def _is_optional(info: msgspec_inspect.Type) -> bool:
    if isinstance(info, msgspec_inspect.Metadata):
        return _is_optional(info.type)
    return isinstance(info, msgspec_inspect.UnionType) and info.includes_none


def _mismatch(field: Field, value: Any) -> str:
    """What kind of value stands there, where that is not plain from the value itself."""
    if isinstance(value, str) and not field.choices and "a text" not in field.accepts:
        return ", not a text"
    if isinstance(value, bool):
        return ", not a truth value"
    return ""
