"""LoopInbox hands items to an event loop in order, and says when there is none any more."""

import asyncio
import os
import threading

import pytest

from shoal.engine.loop_inbox import LoopInbox


def test_items_from_a_thread_arrive_in_order() -> None:
    async def main() -> list[int]:
        taken: list[int] = []
        arrived = asyncio.Event()

        def take(item: int) -> None:
            taken.append(item)
            if item == 999:
                arrived.set()

        inbox = LoopInbox(take)
        thread = threading.Thread(target=lambda: [inbox.put(item) for item in range(1000)])
        thread.start()
        await asyncio.wait_for(arrived.wait(), 30)
        thread.join()
        inbox.close()
        return taken

    assert asyncio.run(main()) == list(range(1000))


def test_a_closed_loop_is_told_of() -> None:
    async def main() -> LoopInbox[int]:
        return LoopInbox(lambda item: None)

    inbox = asyncio.run(main())
    with pytest.raises(RuntimeError, match="closed"):
        inbox.put(1)


def test_nothing_stays_open() -> None:
    async def main() -> None:
        for _ in range(3):
            inbox = LoopInbox(lambda item: None)
            inbox.put(1)
            inbox.close()
            inbox.put(2)

    before = len(os.listdir("/proc/self/fd"))
    asyncio.run(main())
    assert len(os.listdir("/proc/self/fd")) <= before
