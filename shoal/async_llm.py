"""AsyncLLM: a model served inside an asyncio program, one stream of outputs per request.

async with AsyncLLM("path", tensor_parallel_size=2) as llm:
    async for output in llm.generate("text", SamplingParams(max_tokens=32), "request-1"):
        print(output.outputs[0].text)
"""

import asyncio
import os
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any

from shoal.configs.loader import load_config
from shoal.configs.resolved import ResolvedConfig
from shoal.configs.sampling import SamplingParams
from shoal.engine.messages import EngineStats
from shoal.launcher.session import Session, open_session
from shoal.server.front_end import FrontEnd, OutputKind
from shoal.server.outputs import RequestOutput
from shoal.server.prompts import Prompt
from shoal.server.tokenizer import Tokenizer


class AsyncLLM:
    """A model, started by `start()`, `async with` or the first request, in the event loop that does so.

    model: a folder, a hub id or "demo". config: a YAML file or the name of a shipped layout. keywords: every setting
    under its Python keyword (tensor_parallel_size, dtype, max_model_len, ...; docs/configuration.md lists them). The
    constructor checks all of them and starts nothing; it raises ConfigError.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        config: str | os.PathLike[str] | None = None,
        **keywords: Any,
    ) -> None:
        if model is not None:
            keywords = {"model": os.fspath(model), **keywords}
        self._resolved = load_config(config, keywords=keywords)
        self._session: Session | None = None
        self._starting: asyncio.Lock | None = None
        self._closed = False

    @property
    def resolved(self) -> ResolvedConfig:
        """The settings and where each came from; with the checkpoint's sampling defaults once started."""
        return self._resolved if self._session is None else self._session.resolved

    @property
    def report(self) -> str:
        """The memory table of the ranks. Raises RuntimeError before the start."""
        return self._started().report

    @property
    def front_end(self) -> FrontEnd:
        """What serves the requests. Raises RuntimeError before the start."""
        return self._started().front_end

    @property
    def max_in_flight(self) -> int:
        """Requests worth submitting at once. Raises RuntimeError before the start."""
        return self._started().max_in_flight

    async def start(self) -> None:
        """Read the tokenizer and start the engine, once. Raises ConfigError or ValueError (what cannot be used) and
        EngineError.
        """
        if self._starting is None:
            self._starting = asyncio.Lock()
        async with self._starting:
            if self._closed:
                raise RuntimeError("this model was shut down; make a new one")
            if self._session is None:
                self._session = await open_session(self._resolved)

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        deadline_s: float | None = None,
        output_kind: OutputKind = "cumulative",
    ) -> AsyncGenerator[RequestOutput]:
        """Stream a request's outputs. Closing the stream aborts the request.

        prompt: text, token ids, or {"prompt" | "prompt_token_ids": ..., "cache_salt": ...}. sampling_params: the
        settings' defaults when None. priority: lower runs first. deadline_s: absolute time.time() that ends the
        request. output_kind: "cumulative" outputs hold everything so far, "delta" what is new, "final" comes once.
        Raises ValueError (bad request), QueueFull (try again after retry_after_s) and EngineError.
        """
        await self.start()
        stream = self.front_end.generate(
            prompt, sampling_params, request_id, priority=priority, deadline_s=deadline_s, output_kind=output_kind
        )
        async with aclosing(stream) as outputs:
            async for output in outputs:
                yield output

    async def chat(
        self,
        messages: Sequence[dict[str, Any]],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        deadline_s: float | None = None,
        output_kind: OutputKind = "cumulative",
        **template_options: Any,
    ) -> AsyncGenerator[RequestOutput]:
        """Stream the answer to a conversation: [{"role": "user", "content": "..."}, ...].

        template_options: tools, documents, chat_template, add_generation_prompt, continue_final_message, and variables
        of the template. The rest is as in `generate`.
        """
        await self.start()
        prompt = self.front_end.chat_prompt(messages, **template_options)
        stream = self.front_end.generate(
            prompt,
            sampling_params,
            request_id,
            priority=priority,
            deadline_s=deadline_s,
            special_tokens=False,
            output_kind=output_kind,
        )
        async with aclosing(stream) as outputs:
            async for output in outputs:
                yield output

    async def abort(self, request_id: str) -> None:
        """End a request; its stream gets a last output with finish_reason "abort". Unknown ids are no error."""
        await self.front_end.abort(request_id)

    async def stats(self) -> list[EngineStats]:
        """Counters and gauges, one entry per replica."""
        return await self.front_end.client.stats()

    async def check_health(self) -> None:
        """Raise EngineError with the first cause when the engine cannot serve."""
        await self.front_end.client.health()

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises RuntimeError before the start, ValueError with skip_tokenizer_init."""
        tokenizer = self.front_end.tokenizer
        if tokenizer is None:
            raise ValueError("there is no tokenizer: the model was started with skip_tokenizer_init=True")
        return tokenizer

    async def shutdown(self) -> None:
        """End the engine and every rank. May be called twice; the model cannot be started again."""
        self._closed = True
        if self._starting is None:
            return
        async with self._starting:
            session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def __aenter__(self) -> "AsyncLLM":
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.shutdown()

    def _started(self) -> Session:
        if self._session is None:
            state = "was shut down" if self._closed else "has not been started: await start(), or use async with"
            raise RuntimeError(f"this model {state}")
        return self._session
