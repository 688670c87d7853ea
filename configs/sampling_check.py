"""Checks SamplingParams before a request is accepted: types, ranges, and fields that contradict each other.

Every field is honoured or refused; nothing is clipped in silence.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from shoal.configs.fields import SAMPLING, convert, sampling_settings
from shoal.configs.problems import Problem, show, suggest
from shoal.configs.sampling import MIN_TEMPERATURE, SamplingParams


def check_sampling(
    params: SamplingParams, vocab_size: int | None = None, max_model_len: int | None = None
) -> SamplingParams:
    """The same parameters in one spelling: `stop` a list or None, `top_k` 0 when it keeps all, empty lists None.

    vocab_size and max_model_len, when given, bound token ids, logprobs and lengths. Raises ValueError with one line per
    wrong field, naming the field, its value and what is legal.
    """
    if not isinstance(params, SamplingParams):
        raise ValueError(f"sampling parameters must be a SamplingParams, not {type(params).__name__}")
    values, problems = convert_sampling(msgspec.structs.asdict(params))
    if not problems:
        params = SamplingParams(**values)
        problems = [*_contradictions(params), *_limits(params, vocab_size, max_model_len)]
    if problems:
        raise ValueError("\n".join(str(problem).removeprefix(f"{SAMPLING}.") for problem in problems))
    return _normalised(params)


def convert_sampling(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Each field as its declared type, and a problem (key `sampling.<field>`) for every unknown or illegal one."""
    fields = sampling_settings()
    values: dict[str, Any] = {}
    problems = []
    for name, value in given.items():
        key = f"{SAMPLING}.{name}"
        if key not in fields:
            hint = suggest(str(name), SamplingParams.__struct_fields__)
            problems.append(Problem(key=key, message=f"unknown sampling parameter{hint}"))
            continue
        try:
            values[name] = _checked(name, convert(fields[key], value))
        except ValueError as error:
            problems.append(Problem(key=key, value=show(value), message=str(error)))
    return values, problems


def contradictions(values: Mapping[str, Any]) -> list[Problem]:
    """Problems between fields that are legal each on its own; absent fields count with their defaults."""
    return list(_contradictions(SamplingParams(**values)))


def _checked(name: str, value: Any) -> Any:
    if name == "temperature" and 0 < value < MIN_TEMPERATURE:
        raise ValueError(f"must be 0 (greedy) or at least {MIN_TEMPERATURE:g}")
    if name == "allowed_token_ids" and value is not None:
        if not value:
            raise ValueError("must name at least one token id, or be null to allow all")
        if len(set(value)) != len(value):
            raise ValueError("must not name a token id twice")
    return value


def _contradictions(params: SamplingParams) -> Iterator[Problem]:
    if params.max_tokens is not None and params.min_tokens > params.max_tokens:
        yield _problem("min_tokens", params.min_tokens, f"must be at most max_tokens = {params.max_tokens}")
    if params.n > 1 and params.temperature == 0:
        yield _problem("n", params.n, "must be 1 with temperature = 0: greedy outputs would all be the same")
    if params.stop and not params.detokenize:
        yield _problem("stop", show(params.stop), "stop strings need text, and detokenize is false; use stop_token_ids")
    allowed, stops = params.allowed_token_ids, params.stop_token_ids
    if params.min_tokens and allowed and stops and set(allowed) <= set(stops):
        yield _problem(
            "allowed_token_ids",
            show(allowed),
            f"are all in stop_token_ids, so none is left for the first min_tokens = {params.min_tokens} tokens",
        )


def _limits(params: SamplingParams, vocab_size: int | None, max_model_len: int | None) -> Iterator[Problem]:
    if max_model_len is not None:
        for name in ("max_tokens", "min_tokens"):
            value = getattr(params, name)
            if value is not None and value >= max_model_len:
                null = "; null means as many as fit" if name == "max_tokens" else ""
                yield _problem(
                    name,
                    value,
                    f"must be at most {max_model_len - 1}: max_model_len = {max_model_len} less a prompt of one "
                    f"token{null}",
                )
    if vocab_size is None:
        return
    for name in ("allowed_token_ids", "stop_token_ids", "logit_bias"):
        outside = [token_id for token_id in getattr(params, name) or () if token_id >= vocab_size]
        if outside:
            yield _problem(name, outside[0], f"token ids must be at most {vocab_size - 1} (vocabulary of {vocab_size})")
    for name in ("logprobs", "prompt_logprobs"):
        value = getattr(params, name)
        if value is not None and value > vocab_size:
            yield _problem(name, value, f"must be at most the vocabulary's size, {vocab_size}")


def _normalised(params: SamplingParams) -> SamplingParams:
    changes: dict[str, Any] = {"stop": [params.stop] if isinstance(params.stop, str) else params.stop or None}
    for name in ("logit_bias", "bad_words", "stop_token_ids"):
        changes[name] = getattr(params, name) or None
    if params.top_k == -1:
        changes["top_k"] = 0
    return msgspec.structs.replace(params, **changes)


def _problem(name: str, value: object, message: str) -> Problem:
    return Problem(key=f"{SAMPLING}.{name}", value=str(value), message=message)
