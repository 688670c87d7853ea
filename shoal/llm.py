"""LLM: a model from ordinary Python, for batches.

    with LLM("path", tensor_parallel_size=2) as llm:
        outputs = llm.generate(["text", {"prompt_token_ids": [1, 2, 3]}], SamplingParams(temperature=0, max_tokens=32))
        outputs[0].outputs[0].text

The engine runs on an event loop in one background thread. Needs no `__main__` guard; what it started ends with
`shutdown()`, the `with` block, the object's end or the interpreter's, whichever comes first.
"""

import asyncio
import concurrent.futures.thread
import contextlib
import gc
import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from shoal.async_llm import AsyncLLM
from shoal.configs.resolved import ResolvedConfig
from shoal.configs.sampling import SamplingParams
from shoal.launcher.loop_thread import LoopThread
from shoal.launcher.progress import BatchProgress
from shoal.launcher.session import gather_all
from shoal.server.front_end import PreparedRequest
from shoal.server.outputs import RequestOutput
from shoal.server.prompts import Prompt
from shoal.server.tokenizer import Tokenizer

_STOP_SLACK_S = 10.0

Messages = Sequence[dict[str, Any]]


class LLM:
    """A model, ready when the constructor returns.

    model: a folder, a hub id or "demo". config: a YAML file or the name of a shipped layout. keywords: every setting
    under its Python keyword (tensor_parallel_size, pipeline_parallel_size, data_parallel_size, dtype, max_model_len,
    ...; docs/configuration.md lists them). Raises ConfigError or ValueError for what cannot be used, before a process
    starts, and EngineError when the start fails. May be used from several threads; not in a forked child.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        config: str | os.PathLike[str] | None = None,
        **keywords: Any,
    ) -> None:
        engine = AsyncLLM(model, config=config, **keywords)
        self._runtime = _Runtime(engine)
        self._finalizer = weakref.finalize(self, self._runtime.close)
        try:
            self._runtime.loop.run(engine.start())
        except BaseException:
            self.shutdown()
            raise
        _keep_heap()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts; returns one output per prompt, in their order.

        prompts: a text, a list of token ids, {"prompt" | "prompt_token_ids": ..., "cache_salt": ...}, or a list of
        those. sampling_params: for all prompts, or one per prompt; the settings' defaults (with the checkpoint's
        generation_config) when None. use_tqdm: show a progress bar when standard error is a terminal. priority: one
        number per prompt, lower runs first.

        All prompts are checked before the first runs: ValueError names the prompt. Waits while the engine's queue is
        full. Raises EngineError when the engine fails. Ctrl-C ends the requests and is raised; the model stays usable.
        """
        runtime = self._usable()
        front_end = runtime.engine.front_end
        given = _as_list(prompts)
        params = _per_prompt("sampling_params", sampling_params, SamplingParams, len(given))
        priorities = _per_prompt("priority", priority if priority is not None else 0, int, len(given))
        requests = []
        for number, prompt in enumerate(given):
            with _naming(number, len(given)):
                requests.append(front_end.prepare(prompt, params[number], priority=priorities[number]))
        return self._complete(runtime, requests, use_tqdm)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        tools: Sequence[dict[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer conversations; returns one output per conversation, in their order.

        messages: a list of {"role": ..., "content": ...}, or a list of such lists. chat_template: a template, or the
        name of one of the checkpoint's. continue_final_message: go on with the last message (with
        add_generation_prompt=False). chat_template_kwargs: variables of the template. The rest is as in `generate`;
        ValueError also when the model has no chat template.
        """
        runtime = self._usable()
        front_end = runtime.engine.front_end
        conversations: list[Any] = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        params = _per_prompt("sampling_params", sampling_params, SamplingParams, len(conversations))
        options = {
            **(chat_template_kwargs or {}),
            "tools": tools,
            "chat_template": chat_template,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
        }
        requests = []
        for number, conversation in enumerate(conversations):
            with _naming(number, len(conversations)):
                prompt = front_end.chat_prompt(conversation, **options)
                requests.append(front_end.prepare(prompt, params[number], special_tokens=False))
        return self._complete(runtime, requests, use_tqdm)

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises ValueError with skip_tokenizer_init."""
        return self._usable().engine.get_tokenizer()

    def get_default_sampling_params(self) -> SamplingParams:
        """What a request without sampling parameters gets."""
        return self._usable().engine.front_end.default_sampling

    @property
    def resolved(self) -> ResolvedConfig:
        """The settings and where each came from."""
        return self._runtime.engine.resolved

    @property
    def report(self) -> str:
        """The memory table of the ranks."""
        return self._usable().engine.report

    def shutdown(self) -> None:
        """End the engine and every rank. May be called twice."""
        self._finalizer()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()

    def _usable(self) -> "_Runtime":
        if not self._runtime.loop.in_creator_process:
            raise RuntimeError(
                "this LLM belongs to the parent process; make one in the child, or use the spawn start method"
            )
        if not self._finalizer.alive:
            raise RuntimeError("this LLM was shut down; make a new one")
        return self._runtime

    def _complete(self, runtime: "_Runtime", requests: list[PreparedRequest], use_tqdm: bool) -> list[RequestOutput]:
        """Run prepared requests, as many at once as the queues hold."""
        engine = runtime.engine
        outputs: dict[int, RequestOutput] = {}
        progress = BatchProgress(len(requests))

        async def run_all() -> None:
            limit = asyncio.Semaphore(engine.max_in_flight)

            async def complete(number: int) -> None:
                async with limit:
                    outputs[number] = await engine.front_end.complete(requests[number])
                progress.finished(outputs[number])

            await gather_all([complete(number) for number in range(len(requests))])

        with progress if use_tqdm else contextlib.nullcontext():
            runtime.loop.run(run_all())
        return [outputs[number] for number in range(len(requests))]


class _Runtime:
    """What an LLM started; ends it without a reference to the LLM, so that the garbage collector and the exit can."""

    def __init__(self, engine: AsyncLLM) -> None:
        self.engine = engine
        self.loop = LoopThread("shoal-llm")
        self._lock = threading.Lock()
        self._open = True
        _running.add(self)

    def close(self) -> None:
        """End the engine and the thread, once; nothing in a forked child, whose parent owns them."""
        if not self.loop.in_creator_process:
            return
        if self.loop.is_current_thread:  # collected there: waiting for itself would never end
            threading.Thread(target=self.close, name="shoal-close", daemon=True).start()
            return
        with self._lock:
            is_open, self._open = self._open, False
        if not is_open:
            return
        _running.discard(self)
        _release_heap()
        launcher = self.engine.resolved.config.launcher
        try:
            self.loop.run(self.engine.shutdown(), launcher.stop_timeout_s + _STOP_SLACK_S)
        finally:
            self.loop.stop()


_running: "weakref.WeakSet[_Runtime]" = weakref.WeakSet()


_kept_heap = False


def _keep_heap() -> None:
    """Have the garbage collector leave alone what is there, while there is an LLM: going through all that was imported
    holds every step up for a quarter of a second at a time. Not where somebody else has done so.
    """
    global _kept_heap
    if not gc.get_freeze_count():
        gc.collect()
        gc.freeze()
        _kept_heap = True


def _release_heap() -> None:
    """When the last LLM is gone."""
    global _kept_heap
    if _kept_heap and not _running:
        gc.unfreeze()
        _kept_heap = False


def _close_all() -> None:
    """The interpreter ends: end what is still running."""
    with contextlib.ExitStack() as stack:  # one that fails does not keep the others
        for runtime in list(_running):
            stack.callback(runtime.close)


# Exit functions of `threading` run last come, first served, before those of atexit: what is registered here runs while
# the thread pools, which the engine's end uses, still take work. They register theirs when they are imported.
assert concurrent.futures.thread
threading._register_atexit(_close_all)  # type: ignore[attr-defined]


def _as_list(prompts: Any) -> list[Any]:
    """Prompts as a list: one prompt alone is a text, an object or a list of token ids."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise ValueError(f"prompts must be a prompt or a list of prompts, found {type(prompts).__name__}")
    if prompts and all(isinstance(token_id, int) for token_id in prompts):
        return [prompts]
    return list(prompts)


def _per_prompt(name: str, given: Any, kind: type, count: int) -> list[Any]:
    """One value per prompt, from one for all, or a sequence of as many."""
    if given is None or isinstance(given, kind):
        return [given] * count
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise ValueError(f"{name} must be a {kind.__name__} or a list of them, found {type(given).__name__}")
    if len(given) != count:
        raise ValueError(f"{name} has {len(given)} entries for {count} prompts; give one for all, or one per prompt")
    return list(given)


@contextlib.contextmanager
def _naming(number: int, count: int) -> Any:
    """Says which of several prompts an error is about."""
    try:
        yield
    except ValueError as error:
        if count == 1:
            raise
        raise ValueError(f"prompt {number} of {count}: {error}") from error
