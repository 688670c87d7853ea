"""Session: one started engine with its front end; what LLM, AsyncLLM and the commands run on.

session = await open_session(resolved)
async for output in session.front_end.generate("text"): ...
await session.close()
"""

import asyncio
import gc
import sys
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.configs.model_path import resolve_model_path
from shoal.configs.resolved import ResolvedConfig
from shoal.launcher.idle_settings import DETACHED, DRAINING, check_idle
from shoal.launcher.progress import StartLine
from shoal.launcher.replica_messages import Starting
from shoal.model.families import load_spec
from shoal.server.eos_tokens import read_eos_token_ids
from shoal.server.front_end import FrontEnd
from shoal.server.tokenizer import Tokenizer


@dataclass(slots=True)
class Session:
    """A started engine.

    resolved: the settings, with the checkpoint's sampling defaults. model_dir: the checkpoint's folder, None when there
    is none. report: the memory table of the ranks.
    """

    resolved: ResolvedConfig
    model_dir: Path | None
    front_end: FrontEnd
    report: str

    @property
    def max_in_flight(self) -> int:
        """Requests worth submitting at once: what the queues of all replicas hold."""
        config = self.resolved.config
        return config.scheduler.max_queued_requests * config.parallel.data

    @property
    def window(self) -> int:
        """Requests that keep every replica busy: as many as run at once, and as many again for their places."""
        scheduler = self.resolved.config.scheduler
        per_replica = scheduler.max_num_seqs + min(scheduler.max_num_seqs, scheduler.max_queued_requests)
        return per_replica * self.resolved.config.parallel.data

    async def close(self) -> None:
        """End the engine and its ranks. May be called twice."""
        await self.front_end.client.close()


async def open_session(
    resolved: ResolvedConfig,
    on_progress: Callable[[Starting], None] | None = None,
    check_tokenizer: Callable[[Tokenizer | None], None] | None = None,
    *,
    drains: bool = False,
) -> Session:
    """Find the checkpoint, read its tokenizer, start the engine.

    on_progress: told what the start is doing. check_tokenizer: raises ValueError for one that will not do (None with
    skip_tokenizer_init), before the engine is started. drains: the caller keeps launcher.drain_timeout_s when it is
    told to end.

    Raises ConfigError or ValueError for what cannot be used, before a process starts; EngineError when the start fails.
    """
    from shoal.launcher.bring_up import start_engine

    check_idle(resolved, DETACHED, "it is about detached models, which `shoal up` starts")
    if not drains:
        check_idle(resolved, DRAINING, "nothing here waits for what runs when it is told to end")
    model = resolved.config.model
    model_dir = None
    if model.path is not None:
        model_dir = await asyncio.to_thread(resolve_model_path, model.path, model.revision)
        resolved = resolved.with_generation_config(model_dir)
        await asyncio.to_thread(load_spec, model_dir)  # a model Shoal does not run is refused as such
    tokenizer = None
    if not model.skip_tokenizer_init:
        tokenizer = await asyncio.to_thread(_read_tokenizer, model.tokenizer, model_dir)
    if check_tokenizer is not None:
        check_tokenizer(tokenizer)
    eos_token_ids = read_eos_token_ids(model_dir, tokenizer)
    started = await start_engine(resolved, model_dir, on_progress)
    try:
        front_end = FrontEnd(
            started.client,
            tokenizer=tokenizer,
            vocab_size=started.vocab_size,
            max_model_len=started.max_model_len,
            eos_token_ids=[token_id for token_id in eos_token_ids if token_id < started.vocab_size],
            default_sampling=resolved.sampling_params(),
            seed=resolved.config.runtime.seed,
        )
    except BaseException:
        await started.client.close()
        raise
    return Session(resolved, model_dir, front_end, started.report)


async def open_session_shown(
    resolved: ResolvedConfig,
    check_tokenizer: Callable[[Tokenizer | None], None] | None = None,
    *,
    drains: bool = False,
) -> Session:
    """`open_session` for a command: its progress, then the choices made and the memory table, on standard error."""
    line = StartLine()
    try:
        session = await open_session(resolved, line, check_tokenizer, drains=drains)
    finally:
        line.clear()
    keep_heap()
    print(session.report, file=sys.stderr)
    return session


def keep_heap() -> None:
    """Have the garbage collector leave alone what is there now, for a process that serves and does nothing else: going
    through all that was imported held its event loop up for a tenth of a second at a time, and every stream with it.
    What is garbage by now stays, which is little.
    """
    gc.freeze()


async def gather_all(coroutines: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run all at once; the first failure, or a cancellation, ends the others before it is raised."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _read_tokenizer(folder: str | None, model_dir: Path | None) -> Tokenizer:
    chosen = Path(folder).expanduser() if folder is not None else model_dir
    if chosen is None:
        raise ValueError('no model is named: give its folder, a Hugging Face hub id, or "demo"')
    return Tokenizer.from_folder(chosen)
