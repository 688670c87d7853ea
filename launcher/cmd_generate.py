"""shoal generate: prompts from the command line or a file, text to the terminal or JSON Lines to a file.

    shoal generate demo -p "def add(a, b):"
    shoal generate MODEL --prompts prompts.jsonl --output out.jsonl

One prompt without --output is streamed. Everything beside the text (memory table, progress, summary) goes to standard
error.
"""

import argparse
import asyncio
import json
import os
import sys
import time
from contextlib import AbstractContextManager, aclosing, nullcontext
from typing import Any, TextIO

from shoal.configs.checks import is_torchrun
from shoal.configs.resolved import DEFAULT, ResolvedConfig
from shoal.configs.sampling import SamplingParams
from shoal.launcher.command import EXIT_TERMINATED
from shoal.launcher.draining import Drain
from shoal.launcher.progress import BatchProgress
from shoal.launcher.prompt_file import PromptLine, read_prompt_file
from shoal.launcher.session import Session, open_session_shown
from shoal.server.front_end import PreparedRequest
from shoal.server.outputs import CompletionOutput, Logprob, RequestOutput

DEFAULT_MAX_TOKENS = 256
"""Most tokens per output when nothing says otherwise."""


def run(args: argparse.Namespace, resolved: ResolvedConfig) -> int:
    """Generate; returns 0, or 143 when SIGTERM left prompts without their whole output. Raises ValueError and
    EngineError; an interrupt ends the ranks.
    """
    lines = _read_lines(args, resolved)
    with _open_output(args.output) as output:
        return asyncio.run(_run(lines, output, resolved))


def _open_output(name: str | None) -> AbstractContextManager[TextIO | None]:
    if name is None:
        return nullcontext()
    try:
        return open(name, "w", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--output {name}: cannot be written: {error.strerror or error}") from error


def _read_lines(args: argparse.Namespace, resolved: ResolvedConfig) -> list[PromptLine]:
    lines = [PromptLine("-p", text, None, {}) for text in args.prompt or []]
    if args.prompts is not None:
        lines += read_prompt_file(args.prompts, resolved)
    if not lines:
        raise ValueError('no prompt: give -p "text" or --prompts FILE')
    if args.output is None:
        asked = [name for name in ("logprobs", "prompt_logprobs") if resolved.config.sampling.get(name) is not None]
        asked += [
            name for line in lines for name in ("logprobs", "prompt_logprobs") if line.changes.get(name) is not None
        ]
        if asked:
            raise ValueError(f"{asked[0]} are written to --output only: give --output FILE.jsonl")
    return lines


async def _run(lines: list[PromptLine], output: TextIO | None, resolved: ResolvedConfig) -> int:
    session = await open_session_shown(resolved, drains=True)
    drain = Drain(resolved.config.launcher.drain_timeout_s)
    try:
        if not is_torchrun(os.environ):  # which ends the ranks as well, at once
            drain.listen()
        requests = [_prepare(session, line, number) for number, line in enumerate(lines)]
        if output is None and len(requests) == 1 and requests[0].sampling.n == 1 and session.front_end.tokenizer:
            done = await _stream_one(session, requests[0], drain)
        else:
            done = await _batch(session, lines, requests, output, drain)
    finally:
        await session.close()
    if done < len(requests):
        print(f"shoal: ended by SIGTERM, {len(requests) - done} prompts have no output", file=sys.stderr)
        return EXIT_TERMINATED
    return 0


def _prepare(session: Session, line: PromptLine, number: int) -> PreparedRequest:
    """A checked request for a line. Raises ValueError that names the line."""
    try:
        prompt: Any = line.prompt
        if line.messages is not None:
            prompt = session.front_end.chat_prompt(line.messages)
        return session.front_end.prepare(
            prompt,
            _sampling(session, line.changes),
            f"prompt-{number}",
            priority=line.priority,
            special_tokens=line.messages is None,
        )
    except ValueError as error:
        raise ValueError(f"{line.where}: {error}") from error


def _sampling(session: Session, changes: dict[str, Any]) -> SamplingParams:
    """The settings' sampling parameters with a line's changes; max_tokens has a default of its own here."""
    if session.resolved.sources["sampling.max_tokens"] == DEFAULT:
        longest = min(DEFAULT_MAX_TOKENS, session.front_end.max_model_len - 1)
        changes = {"max_tokens": longest, **changes}
    return session.resolved.sampling_params(**changes)


async def _stream_one(session: Session, request: PreparedRequest, drain: Drain) -> int:
    """Print one output as it comes; how many came to their end."""
    done = 0

    async def stream(request: PreparedRequest) -> None:
        nonlocal done
        await _stream(session, request)
        done = 1

    await drain.feed([request], 1, stream, lambda request: session.front_end.has_begun(request.request_id))
    return done


async def _stream(session: Session, request: PreparedRequest) -> None:
    """Print one output as it comes."""
    started, generated = time.monotonic(), 0
    async with aclosing(session.front_end.run(request, "delta")) as outputs:
        async for output in outputs:
            for completion in output.outputs:
                generated += len(completion.token_ids)
                print(completion.text, end="", flush=True)
    print(flush=True)
    elapsed_s = time.monotonic() - started
    print(f"{generated} tokens in {elapsed_s:.2f} s, {generated / elapsed_s:.1f} tokens/s", file=sys.stderr)


async def _batch(
    session: Session,
    lines: list[PromptLine],
    requests: list[PreparedRequest],
    output: TextIO | None,
    drain: Drain,
) -> int:
    """Run the requests; write them in the order of the input, each as soon as those before it are done, or will not
    be. Returns how many are done.
    """
    waiting: dict[int, RequestOutput] = {}
    written = 0
    progress = BatchProgress(len(requests))

    async def complete(number: int) -> None:
        nonlocal written
        waiting[number] = await session.front_end.complete(requests[number])
        progress.finished(waiting[number])
        while written in waiting:
            _write(output, lines[written], written, len(requests), waiting.pop(written))
            written += 1

    def begun(number: int) -> bool:
        return session.front_end.has_begun(requests[number].request_id)

    try:
        with progress:
            await drain.feed(range(len(requests)), session.window, complete, begun)
        for number in sorted(waiting):  # after one that was ended
            _write(output, lines[number], number, len(requests), waiting[number])
    finally:
        print(progress.summary(), file=sys.stderr)
    return progress.done


def _write(output: TextIO | None, line: PromptLine, number: int, total: int, result: RequestOutput) -> None:
    """One request's outputs: as JSON Lines to a file, as text with headings to standard output."""
    for completion in result.outputs:
        if output is not None:
            print(json.dumps(_record(line, number, result, completion), ensure_ascii=False), file=output, flush=True)
            continue
        if total > 1 or len(result.outputs) > 1:
            which = f" ({completion.index + 1}/{len(result.outputs)})" if len(result.outputs) > 1 else ""
            print(f"--- {number + 1}/{total}{which}: {_shortened(result)}")
        print(completion.text or " ".join(map(str, completion.token_ids)), flush=True)


def _record(line: PromptLine, number: int, result: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
    """The JSON object of one output."""
    record: dict[str, Any] = {
        "id": line.id if line.id is not None else str(number),
        "prompt": result.prompt if result.prompt is not None else result.prompt_token_ids,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
        "usage": {
            "prompt_tokens": len(result.prompt_token_ids),
            "completion_tokens": len(completion.token_ids),
            "cached_tokens": result.num_cached_tokens,
        },
    }
    if len(result.outputs) > 1:
        record["index"] = completion.index
    if completion.logprobs is not None:
        record["logprobs"] = [_position(entry) for entry in completion.logprobs]
        record["cumulative_logprob"] = completion.cumulative_logprob
    if result.prompt_logprobs is not None:
        record["prompt_logprobs"] = [None if entry is None else _position(entry) for entry in result.prompt_logprobs]
    return record


def _position(entry: dict[int, Logprob]) -> list[dict[str, Any]]:
    """Log-probabilities of one position, the chosen token first."""
    return [
        {"token_id": token_id, "token": found.decoded_token, "logprob": found.logprob, "rank": found.rank}
        for token_id, found in entry.items()
    ]


def _shortened(result: RequestOutput) -> str:
    text = result.prompt if result.prompt is not None else f"{len(result.prompt_token_ids)} token ids"
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:57] + "..."
