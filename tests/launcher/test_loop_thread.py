"""LoopThread: results, errors, timeouts and interrupts between a loop's thread and the others."""

import asyncio
import os
import signal
import threading
from collections.abc import AsyncGenerator

import pytest

from shoal.launcher.loop_thread import LoopThread


@pytest.fixture
def loop():
    thread = LoopThread("test")
    yield thread
    thread.stop()


async def value_of(value: int) -> int:
    await asyncio.sleep(0)
    return value


def test_results_and_errors_come_back(loop: LoopThread) -> None:
    async def fail() -> None:
        raise ValueError("mine")

    assert loop.run(value_of(3)) == 3
    with pytest.raises(ValueError, match="mine"):
        loop.run(fail())


def test_a_timeout_cancels(loop: LoopThread) -> None:
    ended = threading.Event()

    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    with pytest.raises(TimeoutError):
        loop.run(wait(), timeout_s=0.01)
    assert ended.is_set()


def test_an_interrupt_cancels_and_waits_for_the_end(loop: LoopThread) -> None:
    ended = threading.Event()

    async def wait() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)
            ended.set()

    with pytest.raises(KeyboardInterrupt):
        loop.run(wait())
    assert ended.is_set()
    assert loop.run(value_of(1)) == 1


def test_iterating_closes_the_generator(loop: LoopThread) -> None:
    closed = []

    async def count() -> AsyncGenerator[int]:
        try:
            for number in range(5):
                yield number
        finally:
            await asyncio.sleep(0)
            closed.append(True)

    assert list(loop.iterate(count())) == [0, 1, 2, 3, 4] and len(closed) == 1
    some = loop.iterate(count())
    assert next(some) == 0
    some.close()
    assert len(closed) == 2


def test_stop_ends_what_runs_and_may_be_called_twice() -> None:
    loop = LoopThread("test")
    ended = threading.Event()

    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def start() -> None:
        loop.task = asyncio.ensure_future(wait())  # type: ignore[attr-defined]
        await asyncio.sleep(0)

    loop.run(start())
    loop.stop()
    loop.stop()
    assert ended.is_set()
    coroutine = value_of(1)
    with pytest.raises(RuntimeError, match="closed"):
        loop.run(coroutine)
