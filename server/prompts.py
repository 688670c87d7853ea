"""Prompts as users give them, checked and tokenised: text, token ids, or an object with either and a cache salt."""

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shoal.server.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Mapping[str, Any]
"""A text; token ids; or {"prompt": text} or {"prompt_token_ids": ids}, with "cache_salt" if wanted."""

_KEYS = ("prompt", "prompt_token_ids", "cache_salt")


@dataclass(slots=True, frozen=True)
class ReadyPrompt:
    """A prompt to run. text: None when token ids were given."""

    text: str | None
    token_ids: list[int]
    cache_salt: str | None = None


def read_prompt(
    prompt: Prompt, tokenizer: Tokenizer | None, vocab_size: int, max_model_len: int, *, special_tokens: bool = True
) -> ReadyPrompt:
    """Tokenise and check a prompt. special_tokens: text gets those the tokenizer adds (not so behind a chat template).

    Raises ValueError for a prompt that is empty, too long for one token of output, holds ids outside the vocabulary, or
    is no prompt.
    """
    text, ids, salt = _split(prompt)
    if text is not None:
        if tokenizer is None:
            raise ValueError(
                "the prompt is text, and there is no tokenizer (skip_tokenizer_init): give prompt_token_ids"
            )
        token_ids = tokenizer.encode(_checked_text("the prompt", text), add_special_tokens=special_tokens)
    else:
        token_ids = _checked_ids(ids)
    if not token_ids:
        raise ValueError("the prompt is empty: it has no tokens; give at least one")
    highest = max(token_ids)
    if min(token_ids) < 0 or highest >= vocab_size:
        wrong = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
        source = "prompt_token_ids holds" if text is None else "the tokenizer is not the model's: the text has token id"
        raise ValueError(f"{source} {wrong}; the vocabulary's ids are 0 to {vocab_size - 1}")
    if len(token_ids) >= max_model_len:
        raise ValueError(
            f"the prompt has {len(token_ids)} tokens and max_model_len is {max_model_len}: at most {max_model_len - 1} "
            "leave room for one token of output; shorten the prompt, or start with a larger max_model_len"
        )
    return ReadyPrompt(text, token_ids, salt)


def check_options(request_id: Any, priority: Any, deadline_s: Any) -> None:
    """Raise ValueError for a request's options that could not travel to an engine or be compared there."""
    if not (isinstance(request_id, str) and request_id):
        raise ValueError(f"request_id must be a string that is not empty, found {request_id!r}")
    _checked_text("request_id", request_id)
    if not isinstance(priority, int) or abs(priority) >= 2**31:
        raise ValueError(f"priority must be an integer between -2**31 and 2**31, found {priority!r}")
    if deadline_s is not None and not (isinstance(deadline_s, int | float) and math.isfinite(deadline_s)):
        raise ValueError(f"deadline_s must be a moment of time.time() in seconds, or None, found {deadline_s!r}")


def _split(prompt: Prompt) -> tuple[str | None, Any, str | None]:
    """Text, token ids (one of the two is None) and cache salt."""
    if isinstance(prompt, str):
        return prompt, None, None
    if not isinstance(prompt, Mapping):
        return None, prompt, None
    unknown = [key for key in prompt if key not in _KEYS]
    if unknown:
        raise ValueError(f"a prompt has no key {unknown[0]!r}; its keys are {', '.join(_KEYS)}")
    salt = prompt.get("cache_salt")
    if salt is not None and not (isinstance(salt, str) and salt):
        raise ValueError(f"cache_salt must be a string that is not empty, found {salt!r}")
    _checked_text("cache_salt", salt or "")
    text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
    if (text is None) == (ids is None):
        raise ValueError("a prompt holds either prompt (text) or prompt_token_ids")
    if text is not None and not isinstance(text, str):
        raise ValueError(f"prompt must be text, found {type(text).__name__}; token ids go into prompt_token_ids")
    return text, ids, salt


def _checked_text(name: str, text: str) -> str:
    """A text that is Unicode: no lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is not valid Unicode: a lone surrogate at character {error.start}") from error
    return text


def _checked_ids(ids: Any) -> list[int]:
    if isinstance(ids, bytes | Mapping) or not hasattr(ids, "__iter__"):
        raise ValueError(f"a prompt must be text or a list of token ids, found {type(ids).__name__}")
    try:
        return list(map(operator.index, ids))
    except TypeError as error:
        raise ValueError(f"prompt_token_ids must be a list of integers: {error}") from error
