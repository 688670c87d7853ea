"""Replicas of fake workers for tests: started through one zygote, watched for what they leave behind."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from shoal.configs.sampling import SamplingParams
from shoal.configs.schema import ShoalConfig
from shoal.engine.fake_model import FakeModel
from shoal.engine.messages import OutputDelta, Request
from shoal.launcher.bootstrap import Model, fingerprint
from shoal.launcher.local import LocalProcesses, LocalReplica
from shoal.launcher.local_start import make_replica
from shoal.launcher.processes import Zygote
from shoal.launcher.settle import Host, settle
from tests.launcher.fake_worker import SPEC, VOCAB_SIZE, WORKER

TAG = "SHOAL_TEST_TAG"
LIMIT_S = 30.0


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 10.0) -> None:
    """Wait for a condition, and fail by name when it does not come true."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.01)


async def until(condition: Callable[[], bool], what: str, timeout_s: float = 10.0) -> None:
    """The same on an event loop."""
    await asyncio.to_thread(wait_until, condition, what, timeout_s)


def processes_tagged(tag: str) -> list[tuple[str, int]]:
    """Name (as `ps` shows it) and pid of the living processes whose environment holds TAG=tag."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{TAG}={tag}\0".encode() in (folder / "environ").read_bytes() and alive(int(folder.name)):
                found.append(((folder / "comm").read_text().strip(), int(folder.name)))
        except OSError:
            continue  # it ended, or is another user's
    return sorted(found)


def group_of(tag: str) -> dict[str, int]:
    """The engine and the ranks, when there is one replica."""
    return {name: pid for name, pid in processes_tagged(tag) if name != "shoal-zygote"}


def request(prompt: list[int], max_tokens: int = 8, request_id: str = "a", **sampling: Any) -> Request:
    """A request for fake workers."""
    params = SamplingParams(**{"max_tokens": max_tokens, "seed": 7, "ignore_eos": True, **sampling})
    return Request(request_id=request_id, prompt_token_ids=prompt, sampling=params)


def expected(prompt: list[int], max_tokens: int = 8) -> list[int]:
    """What the ranks must answer."""
    return FakeModel(VOCAB_SIZE).generate(prompt, SamplingParams(max_tokens=max_tokens, seed=7), max_tokens)


async def collect(stream: AsyncIterator[OutputDelta]) -> tuple[list[int], OutputDelta]:
    """All tokens of a stream, and its last delta."""
    tokens: list[int] = []
    async for delta in stream:
        assert delta.start == len(tokens)
        tokens += delta.token_ids
        last = delta
    assert last.finish_reason is not None, "a stream never ends in silence"
    return tokens, last


def run(body: Coroutine[Any, Any, None]) -> None:
    """Run a test's coroutine, with a limit."""

    async def limited() -> None:
        await asyncio.wait_for(body, LIMIT_S)

    asyncio.run(limited())


def prepare(zygote: Zygote, config: ShoalConfig) -> tuple[LocalProcesses, list[LocalReplica]]:
    """Handles of all replicas, nothing started."""
    processes = LocalProcesses(zygote, 60.0)
    settled = settle(config, SPEC, Host(gpus=0, native=True, ranks=config.world_size))
    model = Model(config=settled.config, spec=SPEC, model_dir=None, worker=WORKER)
    return processes, [
        make_replica(number, processes, settled, model, fingerprint(config, SPEC))
        for number in range(config.parallel.data)
    ]


@asynccontextmanager
async def replica(zygote: Zygote, config: ShoalConfig) -> AsyncIterator[LocalReplica]:
    """A started replica, stopped at the end."""
    processes, (handle,) = prepare(zygote, config)
    await processes.loaded()
    try:
        await handle.start()
        await handle.ready(config.launcher.start_timeout_s)
        yield handle
    finally:
        await handle.stop()
