"""Lines of OpenAI's batch format (chat and completions): a request line in, its answer line out.

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"model": ..., "messages": [...], ...}}
    {"id": ..., "custom_id": "a", "response": {"status_code": 200, "request_id": ..., "body": {...}}, "error": null}

A body may hold SamplingParams' own fields too. What cannot take effect is refused, with status 400 in the answer.
"""

import hashlib
import json
import time
from dataclasses import dataclass
from typing import Any

from shoal.configs.problems import suggest
from shoal.configs.sampling import SamplingParams
from shoal.server.outputs import CompletionOutput, Logprob, RequestOutput

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_LINE_FIELDS = ("custom_id", "method", "url", "body")
_SAMPLING = tuple(name for name in SamplingParams.__struct_fields__ if name not in ("logprobs", "prompt_logprobs"))
_COMMON = ("model", "logprobs", "stream", "user", "priority", *_SAMPLING)
_FIELDS = {
    CHAT: (*_COMMON, "messages", "max_completion_tokens", "top_logprobs", "tools", "add_generation_prompt"),
    COMPLETIONS: (*_COMMON, "prompt", "echo", "suffix", "best_of"),
}
_REFUSED = {"stream": False, "echo": False, "suffix": None, "best_of": 1}
"""Fields of OpenAI's that are taken only with the value that changes nothing."""


@dataclass(slots=True, frozen=True)
class BatchLine:
    """A request. prompts: of a completion, each as FrontEnd.prepare takes it; messages and tools: of a chat. changes:
    sampling parameters. problem: why it is answered with an error, as (status, text).
    """

    custom_id: str
    url: str
    prompts: list[Any]
    messages: list[dict[str, Any]] | None
    options: dict[str, Any]
    changes: dict[str, Any]
    priority: int = 0
    problem: tuple[int, str] | None = None


def parse_line(text: str, model_names: tuple[str, ...]) -> BatchLine:
    """A line of the input. model_names: what `model` may say.

    Raises ValueError when it has no custom_id to answer under; everything else becomes the line's `problem`.
    """
    try:
        line = json.loads(text)
    except ValueError as error:
        raise ValueError(f"is not valid JSON: {error}") from None
    if not isinstance(line, dict) or not isinstance(line.get("custom_id"), str) or not line["custom_id"]:
        raise ValueError("must be a JSON object with a custom_id, a text that is not empty")
    custom_id, url = line["custom_id"], line.get("url")
    try:
        _check_fields(line, _LINE_FIELDS, "")
        if line.get("method", "POST") != "POST" or url not in _FIELDS:
            raise ValueError(f"must be a POST to {CHAT} or {COMPLETIONS}, not {line.get('method')} {url}")
        if not isinstance(line.get("body"), dict):
            raise ValueError("body must be a JSON object")
        return _parse_body(custom_id, url, line["body"], model_names)
    except _NoSuchModel as error:
        return _failed(custom_id, str(url), (404, str(error)))
    except ValueError as error:
        return _failed(custom_id, str(url), (400, str(error)))


class _NoSuchModel(ValueError):
    pass


def _failed(custom_id: str, url: str, problem: tuple[int, str]) -> BatchLine:
    return BatchLine(custom_id, url, [], None, {}, {}, problem=problem)


def _check_fields(given: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in given:
        if key not in known:
            raise ValueError(f"unknown field {where}{key}{suggest(key, known)}")


def _parse_body(custom_id: str, url: str, body: dict[str, Any], model_names: tuple[str, ...]) -> BatchLine:
    """Raises ValueError."""
    _check_fields(body, _FIELDS[url], "body.")
    if body.get("model") is not None and body["model"] not in model_names:
        raise _NoSuchModel(f"model {body['model']!r} is not served here; this is {' or '.join(model_names)}")
    for name, harmless in _REFUSED.items():
        if body.get(name, harmless) not in (harmless, None):
            raise ValueError(f"{name} = {body[name]!r} is not supported in a batch; leave it out")
    priority = body.get("priority", 0)
    if not isinstance(priority, int) or isinstance(priority, bool):
        raise ValueError(f"priority must be an integer, found {priority!r}")
    changes = {name: body[name] for name in _SAMPLING if body.get(name) is not None}
    if isinstance(changes.get("logit_bias"), dict):  # JSON has strings as keys only
        changes["logit_bias"] = {int(k) if k.isdecimal() else k: v for k, v in changes["logit_bias"].items()}
    changes.setdefault("seed", _seed_of(custom_id))
    if url == COMPLETIONS:
        if body.get("logprobs") is not None:
            changes["logprobs"] = body["logprobs"]
        return BatchLine(custom_id, url, _prompts(body.get("prompt")), None, {}, changes, priority)
    if not isinstance(body.get("messages"), list):
        raise ValueError("messages must be a list of objects")
    _chat_changes(body, changes)
    options = {name: body[name] for name in ("tools", "add_generation_prompt") if body.get(name) is not None}
    return BatchLine(custom_id, url, [], body["messages"], options, changes, priority)


def _chat_changes(body: dict[str, Any], changes: dict[str, Any]) -> None:
    """A chat's own spellings."""
    limit = body.get("max_completion_tokens")
    if limit is not None and changes.setdefault("max_tokens", limit) != limit:
        raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
    if "max_tokens" not in changes:
        changes["max_tokens"] = None
    wanted, count = body.get("logprobs") or False, body.get("top_logprobs")
    if not isinstance(wanted, bool):
        raise ValueError("logprobs must be true or false in a chat; top_logprobs says how many")
    if count is not None and not wanted:
        raise ValueError("top_logprobs needs logprobs = true")
    if wanted:
        changes["logprobs"] = count or 0


def _prompts(given: Any) -> list[Any]:
    """A text, token ids, or a list of either, as a list of prompts."""
    is_text = isinstance(given, str)
    if is_text or (isinstance(given, list) and given and all(isinstance(item, int) for item in given)):
        return [given]
    if not isinstance(given, list) or not given:
        raise ValueError("prompt must be a text, a list of token ids, or a list of those")
    return given


def _seed_of(custom_id: str) -> int:
    """The seed of a line that has none: of its id, so that a line that is run again gives the same."""
    return int.from_bytes(hashlib.blake2b(custom_id.encode(), digest_size=7).digest(), "big")


def request_name(custom_id: str) -> str:
    """What a line's ids are made of."""
    return hashlib.blake2b(custom_id.encode(), digest_size=12).hexdigest()


def failure_line(line: BatchLine, status: int, text: str) -> dict[str, Any]:
    """The answer to a line that cannot be served."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return _answer(line, status, {"error": {"message": text, "type": kind, "param": None, "code": None}})


def answer_line(line: BatchLine, outputs: list[RequestOutput], model: str) -> dict[str, Any]:
    """The answer to a line: one output per prompt, n choices each."""
    chat, top = line.url == CHAT, line.changes.get("logprobs") or 0
    completions = [completion for output in outputs for completion in output.outputs]
    prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    generated = sum(len(completion.token_ids) for completion in completions)
    body = {
        "id": ("chatcmpl-" if chat else "cmpl-") + request_name(line.custom_id),
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [_choice(index, completion, chat, top) for index, completion in enumerate(completions)],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": prompt_tokens + generated,
            "prompt_tokens_details": {"cached_tokens": sum(output.num_cached_tokens for output in outputs)},
        },
    }
    return _answer(line, 200, body)


def _answer(line: BatchLine, status: int, body: dict[str, Any]) -> dict[str, Any]:
    name = request_name(line.custom_id)
    response = {"status_code": status, "request_id": f"req_{name}", "body": body}
    return {"id": f"batch_req_{name}", "custom_id": line.custom_id, "response": response, "error": None}


def _choice(index: int, completion: CompletionOutput, chat: bool, top: int) -> dict[str, Any]:
    said: dict[str, Any] = {"index": index, "finish_reason": completion.finish_reason}
    if chat:
        said["message"] = {"role": "assistant", "content": completion.text}
        said["logprobs"] = (
            None if completion.logprobs is None else {"content": _chat_logprobs(completion.logprobs, top)}
        )
    else:
        said["text"] = completion.text
        said["logprobs"] = None if completion.logprobs is None else _text_logprobs(completion.logprobs)
    return said


def _entry(token_id: int, found: Logprob) -> dict[str, Any]:
    text = _text(token_id, found)
    return {"token": text, "logprob": found.logprob, "bytes": list(text.encode())}


def _text(token_id: int, found: Logprob) -> str:
    return f"token_id:{token_id}" if found.decoded_token is None else found.decoded_token


def _chat_logprobs(positions: list[dict[int, Logprob]], count: int) -> list[dict[str, Any]]:
    """Per position: the chosen token, and the `count` best ones."""
    entries = []
    for position in positions:
        chosen = next(iter(position.items()))
        best = sorted(position.items(), key=lambda item: item[1].rank or 0)[:count]
        entries.append({**_entry(*chosen), "top_logprobs": [_entry(*item) for item in best]})
    return entries


def _text_logprobs(positions: list[dict[int, Logprob]]) -> dict[str, Any]:
    """The older form: parallel lists."""
    chosen = [next(iter(position.items())) for position in positions]
    tokens = [_text(*item) for item in chosen]
    offsets, length = [], 0
    for token in tokens:
        offsets.append(length)
        length += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [found.logprob for _, found in chosen],
        "top_logprobs": [{_text(*item): item[1].logprob for item in position.items()} for position in positions],
        "text_offset": offsets,
    }
