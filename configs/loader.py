"""Reads the configuration: a YAML file or shipped layout, overrides from the command line, Python keywords.

    resolved = load_config("tp2", {"cache.block_size": 32})      # command line > keywords > YAML > defaults
    resolved.config.cache.block_size, resolved.sources["cache.block_size"]

Everything wrong is collected and raised at once as a ConfigError, before a process starts.
"""

import os
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec

from shoal.configs.checks import check_together
from shoal.configs.fields import SAMPLING, convert, sampling_settings, section_types, settings, settings_by_keyword
from shoal.configs.problems import ConfigError, Problem, nearest, show, suggest
from shoal.configs.resolved import COMMAND_LINE, DEFAULT, KEYWORD, ResolvedConfig
from shoal.configs.sampling_check import contradictions, convert_sampling
from shoal.configs.schema import ShoalConfig
from shoal.configs.yaml import YamlError, YamlMapping, parse_yaml, read_yaml

_YAML_SUFFIXES = (".yaml", ".yml")


class _Given(msgspec.Struct, frozen=True):
    """A value somebody set, and where it stands."""

    value: Any
    source: str


def load_config(
    file: str | os.PathLike[str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    keywords: Mapping[str, Any] | None = None,
    *,
    environ: Mapping[str, str] | None = None,
) -> ResolvedConfig:
    """All settings, checked, and where each came from.

    file: a YAML file's path or the name of a shipped layout. overrides: `section.key` -> value, from the command line.
    keywords: Python keywords as LLM(...) takes them. environ: the process environment unless given.

    Precedence: overrides, keywords, file, (the checkpoint, later, by `with_generation_config`), defaults. Raises
    ConfigError with every mistake.
    """
    problems: list[Problem] = []
    given: dict[str, _Given] = {}
    if file is not None:
        given |= _from_file(file, problems)
    for name, value in (keywords or {}).items():
        if name in settings_by_keyword():
            given[settings_by_keyword()[name].key] = _Given(value, KEYWORD)
        else:
            problems.append(_unknown_keyword(name))
    for key, value in (overrides or {}).items():
        given[key] = _Given(value, COMMAND_LINE)

    values = _typed(given, problems)
    sampling = _sampling(given, problems)
    config = _build(values, sampling)
    wrong = {problem.key for problem in problems}
    environment = os.environ if environ is None else environ
    problems += [
        msgspec.structs.replace(problem, source=_source(given, problem.key))
        for problem in check_together(config, set(values), wrong, environment)
    ]
    if problems:
        raise ConfigError(_in_order(problems))
    sources = dict.fromkeys([*settings(), *sampling_settings()], DEFAULT)
    sources.update({key: entry.source for key, entry in given.items()})
    return ResolvedConfig(config=config, sources=sources)


def shipped_layouts() -> list[str]:
    """Names of the layouts that come with the package, sorted."""
    entries = resources.files("shoal.configs.layouts").iterdir()
    return sorted(entry.name.removesuffix(".yaml") for entry in entries if entry.name.endswith(".yaml"))


def _unknown_keyword(name: str) -> Problem:
    hint = suggest(name, settings_by_keyword())
    by_key = [field.keyword for field in settings().values() if field.name == name]
    if by_key:
        hint = f"; did you mean {by_key[0]}?"
    return Problem(key=name, source=KEYWORD, message=f"unknown keyword{hint}")


def _from_file(file: str | os.PathLike[str], problems: list[Problem]) -> dict[str, _Given]:
    """`section.key` -> value of a YAML file; what cannot be used is added to problems."""
    name = os.fspath(file)
    label = Path(name).name
    try:
        content, label = _read(name, is_path=not isinstance(file, str))
    except YamlError as error:
        problems.append(Problem(key="--config", value=name, source=f"{label}:{error.line}", message=str(error)))
        return {}
    except OSError as error:
        problems.append(Problem(key="--config", value=name, message=f"cannot be read: {error.strerror or error}"))
        return {}
    except ValueError as error:
        problems.append(Problem(key="--config", value=name, message=str(error)))
        return {}
    if content is None:
        return {}
    if not isinstance(content, YamlMapping):
        problems.append(
            Problem(key="--config", value=name, message="must be a mapping of sections such as `parallel:`")
        )
        return {}
    return _flatten(content, label, problems)


def _read(name: str, is_path: bool) -> tuple[Any, str]:
    """Content and short name of a path or a shipped layout. A word without separator and suffix is a layout's name."""
    is_path = is_path or os.sep in name or name.startswith("~") or name.endswith(_YAML_SUFFIXES)
    if is_path:
        path = Path(name).expanduser()
        return read_yaml(path), path.name
    layouts = shipped_layouts()
    if name in layouts:
        text = resources.files("shoal.configs.layouts").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
        return parse_yaml(text), f"{name}.yaml"
    fix = f"; for the file write ./{name}" if Path(name).exists() else suggest(name, layouts)
    raise ValueError(f"is no shipped layout ({', '.join(layouts)}) and no path of a .yaml file{fix}")


def _flatten(content: YamlMapping, label: str, problems: list[Problem]) -> dict[str, _Given]:
    given: dict[str, _Given] = {}
    for section, entries in content.items():
        source = f"{label}:{content.lines[section]}"
        if section != SAMPLING and section not in section_types():
            problems.append(Problem(key=str(section), source=source, message=_unknown_section(str(section))))
        elif entries is None:
            continue
        elif not isinstance(entries, YamlMapping):
            message = "must be a mapping of settings, such as `parallel:` with `tensor: 2` below it"
            problems.append(Problem(key=section, value=show(entries), source=source, message=message))
        else:
            for name, value in entries.items():
                given[f"{section}.{name}"] = _Given(value, f"{label}:{entries.lines[name]}")
    return given


def _unknown_section(section: str) -> str:
    for field in settings().values():
        if section in (field.name, field.keyword):
            return f"is no section; in a file this setting is {field.key}"
    return f"unknown section{suggest(section, [*section_types(), SAMPLING])}"


def _typed(given: Mapping[str, _Given], problems: list[Problem]) -> dict[str, Any]:
    """The legal values of all sections but sampling, converted."""
    fields = settings()
    values: dict[str, Any] = {}
    for key, entry in given.items():
        if key.startswith(f"{SAMPLING}."):
            continue
        if key not in fields:
            problems.append(Problem(key=key, source=entry.source, message=_unknown_key(key)))
            continue
        try:
            values[key] = convert(fields[key], entry.value)
        except ValueError as error:
            problems.append(Problem(key=key, value=show(entry.value), source=entry.source, message=str(error)))
    return values


def _unknown_key(key: str) -> str:
    """What to write instead: the nearest key of the same section, the same name elsewhere, or what the section has."""
    section, _, name = key.partition(".")
    fields = settings() | sampling_settings()
    for field in fields.values():
        if name in (field.name, field.keyword):
            return f"unknown key; did you mean {field.key}?"
    names = [field.name for field in fields.values() if field.section == section]
    if not names:
        return f"unknown section{suggest(section, [*section_types(), SAMPLING])}"
    near = nearest(name, names)
    return f"unknown key; did you mean {section}.{near}?" if near else f"unknown key; {section} has {', '.join(names)}"


def _sampling(given: Mapping[str, _Given], problems: list[Problem]) -> dict[str, Any]:
    """What was given of the sampling section, converted."""
    prefix = f"{SAMPLING}."
    chosen = {key.removeprefix(prefix): entry.value for key, entry in given.items() if key.startswith(prefix)}
    values, found = convert_sampling(chosen)
    if not found:
        found = contradictions(values)
    problems += [msgspec.structs.replace(problem, source=_source(given, problem.key)) for problem in found]
    return values


def _build(values: Mapping[str, Any], sampling: dict[str, Any]) -> ShoalConfig:
    sections: dict[str, Any] = {}
    for section, kind in section_types().items():
        prefix = f"{section}."
        chosen = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
        sections[section] = kind(**chosen)
    return ShoalConfig(**sections, sampling=sampling)


def _source(given: Mapping[str, _Given], key: str) -> str | None:
    return given[key].source if key in given else None


def _in_order(problems: list[Problem]) -> list[Problem]:
    """In the order of the declaration; what is no key (the file, unknown names) first."""
    order = {key: place for place, key in enumerate([*settings(), *sampling_settings()])}
    return sorted(problems, key=lambda problem: order.get(problem.key, -1))
