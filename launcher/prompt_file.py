"""Prompt files of `shoal generate --prompts`: text, one prompt a line, or JSON Lines with sampling parameters per
prompt.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.configs.problems import suggest
from shoal.configs.resolved import ResolvedConfig
from shoal.configs.sampling import SamplingParams

_KINDS = ("prompt", "prompt_token_ids", "messages")
_OTHERS = ("id", "cache_salt", "priority")
_MAX_SHOWN = 20


@dataclass(slots=True, frozen=True)
class PromptLine:
    """One prompt to run. prompt: as `FrontEnd.prepare` takes it, or None with `messages`. where: file and line, for
    errors. changes: sampling parameters that this line sets.
    """

    where: str
    prompt: Any
    messages: list[dict[str, Any]] | None
    changes: dict[str, Any]
    id: str | None = None
    priority: int = 0


def read_prompt_file(name: str, resolved: ResolvedConfig) -> list[PromptLine]:
    """The prompts of a file; "-" is standard input, as text.

    A name that ends in .jsonl or .ndjson holds JSON objects, one a line: one of prompt (text), prompt_token_ids and
    messages; if wanted id, cache_salt, priority and any field of SamplingParams. Other files hold text. Blank lines are
    skipped. Raises ValueError with file and line of every mistake (the first 20).
    """
    lines = _lines(name)
    if not name.endswith((".jsonl", ".ndjson")):
        return [PromptLine(f"{name}:{number}", text, None, {}) for number, text in lines]
    found, mistakes = [], []
    for number, text in lines:
        where = f"{name}:{number}"
        try:
            found.append(_parse(where, text, resolved))
        except ValueError as error:
            mistakes += [f"{where}: {line}" for line in str(error).splitlines()]
    if mistakes:
        more = len(mistakes) - _MAX_SHOWN
        raise ValueError("\n".join(mistakes[:_MAX_SHOWN] + ([f"and {more} more"] if more > 0 else [])))
    return found


def _lines(name: str) -> list[tuple[int, str]]:
    """The lines that are not blank, numbered from 1."""
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"--prompts {name}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts {name}: is not UTF-8: {error.reason} at byte {error.start}") from error
    numbered = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not numbered:
        raise ValueError(f"--prompts {name}: holds no prompt")
    return [(number, line.removesuffix("\r")) for number, line in numbered]


def _parse(where: str, text: str, resolved: ResolvedConfig) -> PromptLine:
    """One line of JSON."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"must be a JSON object, found {type(content).__name__}")
    known = (*_KINDS, *_OTHERS, *SamplingParams.__struct_fields__)
    unknown = [key for key in content if key not in known]
    if unknown:
        raise ValueError("\n".join(f"unknown field {key!r}{suggest(key, known)}" for key in unknown))
    kinds = [kind for kind in _KINDS if kind in content]
    if len(kinds) != 1:
        raise ValueError(f"must have exactly one of {', '.join(_KINDS)}; it has {', '.join(kinds) or 'none'}")
    changes = {key: value for key, value in content.items() if key in SamplingParams.__struct_fields__}
    if isinstance(changes.get("logit_bias"), dict):  # JSON has strings as keys only
        changes["logit_bias"] = {int(k) if k.isdecimal() else k: bias for k, bias in changes["logit_bias"].items()}
    resolved.sampling_params(**changes)
    priority = content.get("priority", 0)
    if not isinstance(priority, int) or isinstance(priority, bool):
        raise ValueError(f"priority must be an integer, found {priority!r}")
    identifier = content.get("id")
    if identifier is not None and not isinstance(identifier, str | int):
        raise ValueError(f"id must be a string or an integer, found {identifier!r}")
    messages = content.get("messages")
    if messages is not None and (not isinstance(messages, list) or "cache_salt" in content):
        raise ValueError("messages must be a list of objects, without cache_salt")
    prompt = {key: content[key] for key in ("prompt", "prompt_token_ids", "cache_salt") if key in content}
    return PromptLine(
        where=where,
        prompt=None if messages is not None else prompt,
        messages=messages,
        changes=changes,
        id=None if identifier is None else str(identifier),
        priority=priority,
    )
