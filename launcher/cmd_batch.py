"""shoal batch: requests in OpenAI's batch format in, answers out; killed and started again it goes on.

    shoal batch in.jsonl -o out.jsonl --config tp2_dp2 --model demo

Answers are appended as they come, in whatever order; custom_id says which is whose. SIGTERM and Ctrl-C finish what
runs, at most launcher.drain_timeout_s; a second one ends at once. A line whose replica is far slower than the others
goes on elsewhere.
"""

import argparse
import asyncio
import signal
import sys
from typing import Any

from shoal.configs.resolved import ResolvedConfig
from shoal.engine.client import EngineError
from shoal.launcher.batch_file import AnswerFile, read_batch
from shoal.launcher.batch_format import CHAT, BatchLine, answer_line, failure_line, request_name
from shoal.launcher.controller import Controller
from shoal.launcher.progress import BatchProgress
from shoal.launcher.session import Session, gather_all, open_session_shown
from shoal.launcher.stragglers import Stragglers
from shoal.server.front_end import PreparedRequest
from shoal.server.outputs import RequestOutput

EXIT_TERMINATED = 143


def run(args: argparse.Namespace, resolved: ResolvedConfig) -> int:
    """Answer what has no answer yet; returns 0, or 143 when told to end before all were. Raises ValueError,
    EngineError.
    """
    model = resolved.config.model
    names = tuple(name for name in (model.served_model_name, model.path) if name)
    lines = read_batch(args.input, names)
    answers = AnswerFile(args.output)
    try:
        waiting = [line for line in lines if line.custom_id not in answers.done]
        if len(waiting) < len(lines):
            print(f"{len(lines) - len(waiting)} of {len(lines)} lines have their answer already", file=sys.stderr)
        if not waiting:
            return 0
        return asyncio.run(_Batch(waiting, answers, resolved, names[0]).run())
    finally:
        answers.close()


class _Batch:
    """One run over the lines that wait. told_to_end: set by the first signal."""

    def __init__(self, lines: list[BatchLine], answers: AnswerFile, resolved: ResolvedConfig, model: str) -> None:
        self._lines, self._answers, self._resolved, self._model = lines, answers, resolved, model
        self._progress = BatchProgress(len(lines))
        self._told_to_end = asyncio.Event()
        self._failed = 0

    async def run(self) -> int:
        """Start the engine, answer, end it."""
        session = await open_session_shown(self._resolved)
        work = asyncio.ensure_future(self._answer_all(session))
        watcher = asyncio.ensure_future(self._watch(session))
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end, work)
        try:
            with self._progress:
                await work
        except asyncio.CancelledError:
            if not self._told_to_end.is_set():
                raise
        finally:
            watcher.cancel()
            await asyncio.gather(watcher, work, return_exceptions=True)
            await session.close()
            print(self._progress.summary(), file=sys.stderr)
        left = sum(line.custom_id not in self._answers.done for line in self._lines)
        if self._failed:
            print(f"{self._failed} lines were answered with an error", file=sys.stderr)
        if left:
            print(f"{left} lines have no answer yet: start the same command again", file=sys.stderr)
        return EXIT_TERMINATED if left else 0

    def _end(self, work: "asyncio.Future[None]") -> None:
        """The first signal begins no further line and bounds the rest; the second ends now."""
        if self._told_to_end.is_set():
            work.cancel()
            return
        self._told_to_end.set()
        limit_s = self._resolved.config.launcher.drain_timeout_s
        print(f"finishing what runs, at most {limit_s:g} s; once more ends now", file=sys.stderr)
        asyncio.get_running_loop().call_later(limit_s, work.cancel)

    async def _watch(self, session: Session) -> None:
        """Move lines off slow replicas, where there are several."""
        client = session.front_end.client
        if isinstance(client, Controller):
            await Stragglers(client).run()

    async def _answer_all(self, session: Session) -> None:
        limit = asyncio.Semaphore(session.max_in_flight)

        async def answer(line: BatchLine) -> None:
            async with limit:
                if not self._told_to_end.is_set():
                    await self._answer(session, line)

        await gather_all([answer(line) for line in self._lines])

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
    name = request_name(line.custom_id)
    return [
        front_end.prepare(
            prompt, sampling, f"{name}-{index}", priority=line.priority, special_tokens=line.messages is None
        )
        for index, prompt in enumerate(prompts)
    ]
