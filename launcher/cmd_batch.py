"""shoal batch: requests in OpenAI's batch format in, answers out; killed and started again it goes on.

    shoal batch in.jsonl -o out.jsonl --config tp2_dp2 --model demo

Answers are appended as they come, in whatever order; custom_id says which is whose. Lines are read as there is room for
them. SIGTERM and Ctrl-C finish what runs, at most launcher.drain_timeout_s; a second one ends at once. A line whose
replica is far slower than the others goes on elsewhere.
"""

import argparse
import asyncio
import signal
import sys
from typing import Any

from shoal.configs.resolved import ResolvedConfig
from shoal.engine.client import EngineError
from shoal.launcher.batch_file import AnswerFile, BatchInput
from shoal.launcher.batch_format import CHAT, BatchLine, answer_line, failure_line, request_name
from shoal.launcher.command import EXIT_TERMINATED
from shoal.launcher.controller import Controller
from shoal.launcher.draining import Drain
from shoal.launcher.progress import BatchProgress
from shoal.launcher.session import Session, open_session_shown
from shoal.launcher.stragglers import Stragglers
from shoal.server.front_end import PreparedRequest
from shoal.server.outputs import RequestOutput


def run(args: argparse.Namespace, resolved: ResolvedConfig) -> int:
    """Answer what has no answer yet; returns 0, or 143 when told to end before all were. Raises ValueError,
    EngineError.
    """
    model = resolved.config.model
    names = tuple(name for name in (model.served_model_name, model.path) if name)
    source = BatchInput(args.input, names)
    try:
        answers = AnswerFile(args.output)
        try:
            left = sum(custom_id not in answers.done for custom_id in source.ids)
            if left < len(source.ids):
                print(f"{len(source.ids) - left} of {len(source.ids)} lines have their answer already", file=sys.stderr)
            return asyncio.run(_Batch(source, answers, resolved, names[0]).run(left)) if left else 0
        finally:
            answers.close()
    finally:
        source.close()


class _Batch:
    """One run over the lines that have no answer yet, which are read as there is room for them."""

    def __init__(self, source: BatchInput, answers: AnswerFile, resolved: ResolvedConfig, model: str) -> None:
        self._source, self._answers, self._resolved, self._model = source, answers, resolved, model
        self._drain = Drain(resolved.config.launcher.drain_timeout_s, (signal.SIGTERM, signal.SIGINT))
        self._failed = 0

    async def run(self, count: int) -> int:
        """Start the engine, answer `count` lines, end it."""
        session = await open_session_shown(self._resolved, drains=True)
        progress = self._progress = BatchProgress(count)
        watcher = asyncio.ensure_future(self._watch(session))
        self._drain.listen()
        try:
            with progress:
                await self._answer_all(session)
        finally:
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)
            await session.close()
            print(progress.summary(), file=sys.stderr)
        if self._failed:
            print(f"{self._failed} lines were answered with an error", file=sys.stderr)
        if progress.done < count:
            print(f"{count - progress.done} lines have no answer yet: start the same command again", file=sys.stderr)
            return EXIT_TERMINATED
        return 0

    async def _watch(self, session: Session) -> None:
        """Move lines off slow replicas, where there are several."""
        client = session.front_end.client
        if isinstance(client, Controller):
            await Stragglers(client).run()

    async def _answer_all(self, session: Session) -> None:
        front_end = session.front_end

        def begun(line: BatchLine) -> bool:
            return any(map(front_end.has_begun, request_ids(line)))

        lines = (line for line in self._source.lines() if line.custom_id not in self._answers.done)
        await self._drain.feed(lines, session.window, lambda line: self._answer(session, line), begun)

    async def _answer(self, session: Session, line: BatchLine) -> None:
        """Answer one line. Raises EngineError when the engine, and not the line, is at fault."""
        try:
            if line.problem is not None:
                return self._add(failure_line(line, *line.problem))
            requests = prepare(session, line, self._resolved)
            outputs: list[RequestOutput] = await asyncio.gather(*map(session.front_end.complete, requests))
        except ValueError as error:
            return self._add(failure_line(line, 400, str(error)))
        except EngineError as error:
            await session.front_end.client.health()
            return self._add(failure_line(line, 500, str(error)))
        self._answers.add(answer_line(line, outputs, self._model))
        for output in outputs[:-1]:
            self._progress.prompt_tokens += len(output.prompt_token_ids)
            self._progress.generated_tokens += sum(len(completion.token_ids) for completion in output.outputs)
        self._progress.finished(outputs[-1])

    def _add(self, answer: dict[str, Any]) -> None:
        self._failed += 1
        self._progress.done += 1
        self._answers.add(answer)


def prepare(session: Session, line: BatchLine, resolved: ResolvedConfig) -> list[PreparedRequest]:
    """The requests of a line, one per prompt. Raises ValueError."""
    front_end, changes = session.front_end, dict(line.changes)
    if line.url == CHAT and changes.get("max_tokens", 0) is None and "max_tokens" in resolved.config.sampling:
        del changes["max_tokens"]
    sampling = resolved.sampling_params(**changes)
    prompts: list[Any] = line.prompts
    if line.messages is not None:
        prompts = [front_end.chat_prompt(line.messages, **line.options)]
    return [
        front_end.prepare(prompt, sampling, name, priority=line.priority, special_tokens=line.messages is None)
        for name, prompt in zip(request_ids(line), prompts, strict=True)
    ]


def request_ids(line: BatchLine) -> list[str]:
    """What the requests of a line are called: one per prompt, of a chat one."""
    name = request_name(line.custom_id)
    return [f"{name}-{index}" for index in range(1 if line.messages is not None else len(line.prompts))]
