"""Flags made from the declaration of the settings, and what was given on the command line as `section.key` -> value.

A flag's text is read as YAML reads a plain scalar (`null`, `1e-5`), text settings are taken as they stand, lists are
`2,1,1`. Values are not checked here: the loader does, together with those of the file.
"""

import argparse
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from msgspec import inspect as msgspec_inspect

from shoal.configs.fields import Field, sampling_settings, section_types, settings
from shoal.configs.problems import nearest
from shoal.configs.yaml import YamlError, parse_yaml, resolve_scalar

_REPEATED = ("sampling.stop", "sampling.bad_words")
_MODEL_KEY = "model.path"
_SEED_KEY = "runtime.seed"
_HELP_WIDTH = 100


class UsageError(Exception):
    """The command line cannot be understood; usage is the line that shows how it goes."""

    def __init__(self, message: str, usage: str = "") -> None:
        self.usage = usage
        super().__init__(message)


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations of any kind, raising UsageError instead of ending the process."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", _Formatter)
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raise UsageError; the caller shows it."""
        raise UsageError(message, self.format_usage().removeprefix("usage: ").strip())

    def flags(self) -> list[str]:
        """Every flag this parser knows."""
        return list(self._option_string_actions)

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        """No prefix of a flag stands for it: allow_abbrev alone still takes `-t` for `-tp` and `-pp2` for `-p p2`."""
        return []


class Once(argparse.Action):
    """Stores a flag's text and refuses the flag a second time: the first would be ignored."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Store the value. Raises UsageError when there is one."""
        _first_time(self, namespace)
        setattr(namespace, self.dest, values)


class _OnceBoolean(argparse.BooleanOptionalAction):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        _first_time(self, namespace)
        super().__call__(parser, namespace, values, option_string)


def _first_time(action: argparse.Action, namespace: argparse.Namespace) -> None:
    if getattr(namespace, action.dest, None) is not None:
        raise UsageError(f"{'/'.join(action.option_strings)} is given twice; keep one of them")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=_HELP_WIDTH)


def add_settings(
    parser: argparse.ArgumentParser, sections: Iterable[str], sampling: Iterable[str], defaults: Mapping[str, str]
) -> None:
    """Add --config, --set, the flags of the sampling fields named, and those of whole sections, in groups.

    defaults: texts for help instead of the declared defaults, by key. A command that samples has --seed (runtime.seed)
    among its sampling flags.
    """
    group = parser.add_argument_group("configuration", "See docs/configuration.md; `shoal explain` shows the result.")
    group.add_argument(
        "--config", action=Once, metavar="PATH|NAME", help="A YAML file, or a shipped layout such as tp2_pp2."
    )
    group.add_argument(
        "--set",
        dest="assignments",
        action="append",
        metavar="SECTION.KEY=VALUE",
        help="Any setting, its value as in YAML: --set cache.block_size=32. May be repeated.",
    )
    chosen = [sampling_settings()[f"sampling.{name}"] for name in sampling]
    if chosen:
        chosen.insert(1, settings()[_SEED_KEY])
        _add_group(parser, "sampling", "How each token is chosen.", chosen, defaults)
    for section in sections:
        fields = [field for field in settings().values() if field.section == section and field not in chosen]
        _add_group(parser, section, (section_types()[section].__doc__ or "").splitlines()[0], fields, defaults)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the positional MODEL."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="A local folder, a Hugging Face hub id, or `demo`.")


def overrides_from(args: argparse.Namespace) -> dict[str, Any]:
    """`section.key` -> value of everything set on the command line. Raises UsageError when a setting is given twice."""
    fields = settings() | sampling_settings()
    overrides = {key: _value(fields[key], given) for key, given in vars(args).items() if key in fields}
    if getattr(args, "model", None) is not None:
        _once(overrides, _MODEL_KEY, args.model, "by MODEL and by --model")
    for assignment in getattr(args, "assignments", None) or []:
        key, equals, text = assignment.partition("=")
        if not equals or "." not in key:
            raise UsageError(f"--set {assignment}: must be SECTION.KEY=VALUE, such as cache.block_size=32")
        try:
            value = parse_yaml(text)
        except YamlError as error:
            raise UsageError(f"--set {assignment}: {error}") from None
        _once(overrides, key.strip(), value, "by --set and by another flag, or by --set twice")
    return overrides


def unknown_arguments(extras: Iterable[str], flags: Iterable[str]) -> str:
    """One line for each argument nobody knows, with the nearest flag."""
    lines = []
    for extra in extras:
        name = extra.partition("=")[0]
        if not name.startswith("-"):
            lines.append(f"unexpected argument {extra}")
            continue
        near = nearest(name, flags)
        lines.append(f"unknown flag {name}" + (f"; did you mean {near}?" if near else ""))
    return "\n".join(lines)


def _once(overrides: dict[str, Any], key: str, value: Any, how: str) -> None:
    if key in overrides:
        raise UsageError(f"{key} is given twice, {how}; keep one of them")
    overrides[key] = value


def _add_group(
    parser: argparse.ArgumentParser, title: str, description: str, fields: list[Field], defaults: Mapping[str, str]
) -> None:
    group = parser.add_argument_group(title, description)
    for field in fields:
        text = _help(field, defaults.get(field.key))
        options: dict[str, Any] = {"dest": field.key, "default": argparse.SUPPRESS, "help": text}
        if isinstance(field.info, msgspec_inspect.BoolType):
            options["action"] = _OnceBoolean
        else:
            options["metavar"] = _metavar(field)
            options["action"] = "append" if field.key in _REPEATED else Once
        group.add_argument(*field.flags, **options)


def _help(field: Field, default: str | None) -> str:
    text = field.description
    if field.key in _REPEATED:
        text += " May be repeated."
    if default is not None or field.default is not None:
        text += f" (default: {default or field.default_text})"
    return text.replace("%", "%%")


def _metavar(field: Field) -> str:
    info = field.info
    if field.choices:
        return "{" + ",".join(field.choices) + "}"
    if field.size:
        return "SIZE"
    if isinstance(info, msgspec_inspect.ListType) and field.key not in _REPEATED:
        return "N,N,..."
    if isinstance(info, msgspec_inspect.DictType):
        return "'{ID: BIAS, ...}'"
    return {msgspec_inspect.IntType: "N", msgspec_inspect.FloatType: "X"}.get(type(info), "TEXT")


def _value(field: Field, given: Any) -> Any:
    """A flag's text as the value the loader checks; text that cannot be read stays text, which the loader refuses."""
    if not isinstance(given, str) or field.choices or isinstance(field.info, msgspec_inspect.StrType):
        return given
    is_flow = given.lstrip().startswith(("[", "{"))
    if is_flow:
        try:
            return parse_yaml(given)
        except YamlError:
            return given
    if isinstance(field.info, msgspec_inspect.ListType) and resolve_scalar(given) is not None:
        return [resolve_scalar(item.strip()) for item in given.split(",")]
    return resolve_scalar(given)
