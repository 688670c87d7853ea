"""A replica of several processes: its answers, its failures and their first causes, and that nothing is left of it."""

import asyncio
import os
import signal
import time

import msgspec
import pytest

from shoal.configs.schema import SchedulerConfig
from shoal.engine.client import EngineError, QueueFull
from shoal.engine.messages import OutputDelta
from shoal.engine.rank_messages import TO_RANK, Hello
from shoal.launcher.bootstrap import versions
from shoal.launcher.processes import Zygote
from shoal.parallel.control_connect import connect
from tests.launcher.fake_worker import CRASH, FAIL, HANG, LEAVE, SLOW, config
from tests.launcher.harness import (
    collect,
    expected,
    group_of,
    prepare,
    processes_tagged,
    replica,
    request,
    run,
    until,
)


def test_four_ranks_answer_many_requests_as_one_model_would(zygote: Zygote, tag: str) -> None:
    async def body() -> None:
        async with replica(zygote, config(2, 2)) as handle:
            names = sorted(group_of(tag))
            assert names == ["shoal-engine-0", *(f"shoal-rank-{rank}" for rank in range(4))]
            prompts = [[1, 2, 3, number] for number in range(20)]
            streams = [collect(handle.submit(request(p, 12, f"r{n}"))) for n, p in enumerate(prompts)]
            for prompt, (tokens, last) in zip(prompts, await asyncio.gather(*streams), strict=True):
                assert tokens == expected(prompt, 12)
                assert last.finish_reason == "length"
            (stats,) = await handle.client.stats()
            assert stats.generated_tokens == 20 * 12 and stats.num_running == 0
            await handle.health()
        assert group_of(tag) == {}

    run(body())


def test_the_zygote_has_one_thread_whatever_it_has_imported(zygote: Zygote) -> None:
    assert len(os.listdir(f"/proc/{zygote.pid}/task")) == 1


def test_requests_are_refused_aborted_and_drained_as_in_one_process(zygote: Zygote) -> None:
    async def body() -> None:
        async with replica(zygote, config(2)) as handle:
            with pytest.raises(ValueError, match="vocabulary"):
                await collect(handle.submit(request([1, 100_000])))
            with pytest.raises(ValueError, match="max_model_len 512"):
                await collect(handle.submit(request([1] * 600)))
            long = handle.submit(request([SLOW, 0], 500, "long"))
            assert (await anext(long)).token_ids == expected([SLOW, 0], 1)
            with pytest.raises(ValueError, match="'long' is already in use"):
                await anext(handle.submit(request([3], 5, "long")))
            await handle.client.abort(["long", "unknown"])
            _, last = await collect_rest(long)
            assert last.finish_reason == "abort"
            closed = handle.submit(request([SLOW, 0], 500, "closed"))
            await anext(closed)
            await closed.aclose()  # type: ignore[attr-defined]
            assert await handle.drain(10) == []
            with pytest.raises(EngineError, match="draining"):
                await anext(handle.submit(request([1])))

    run(body())


def test_an_id_is_free_again_when_the_engine_has_ended_its_closed_stream(zygote: Zygote) -> None:
    async def body() -> None:
        async with replica(zygote, config(2)) as handle:
            closed = handle.submit(request([SLOW, 0], 500, "r"))
            await anext(closed)
            await closed.aclose()  # type: ignore[attr-defined]
            refusals = 0
            while True:
                try:
                    tokens, last = await collect(handle.submit(request([3], 5, "r")))
                    break
                except ValueError as error:
                    assert "'r' is already in use" in str(error)
                    refusals += 1
                    await handle.client.stats()
            assert refusals > 0
            assert (tokens, last.finish_reason) == (expected([3], 5), "length")

    run(body())


async def collect_rest(stream: object) -> tuple[int, OutputDelta]:
    """Tokens and last delta of a stream under way."""
    count = 0
    async for delta in stream:  # type: ignore[attr-defined]
        count += len(delta.token_ids)
    return count, delta


def test_a_drain_names_what_it_could_not_wait_for(zygote: Zygote) -> None:
    async def body() -> None:
        async with replica(zygote, config(2)) as handle:
            streams = [handle.submit(request([SLOW, 0, number], 400, f"r{number}")) for number in range(8)]
            await asyncio.gather(*(anext(stream) for stream in streams))
            unfinished = await handle.drain(0.0)
            assert set(unfinished) <= {f"r{number}" for number in range(8)} and unfinished

    run(body())


def test_a_full_queue_is_told_apart(zygote: Zygote) -> None:
    async def body() -> None:
        settings = config(2)
        full = msgspec.structs.replace(settings, scheduler=SchedulerConfig(max_num_seqs=1, max_queued_requests=1))
        async with replica(zygote, full) as handle:
            streams = [handle.submit(request([number], 300, f"r{number}")) for number in range(6)]
            results = await asyncio.gather(*(collect(stream) for stream in streams), return_exceptions=True)
            refused = [result for result in results if isinstance(result, QueueFull)]
            assert refused and all(result.retry_after_s > 0 for result in refused)
            assert any(isinstance(result, tuple) for result in results)

    run(body())


@pytest.mark.parametrize(
    ("order", "words"),
    [
        (FAIL, ["rank 1: RuntimeError while in step", "a planned fault", "Traceback", "fake_worker.py"]),
        (LEAVE, ["rank 1: ended with exit code 3", "leaving without a word"]),
        (CRASH, ["rank 1: killed by SIGSEGV", "Fatal Python error: Segmentation fault"]),
    ],
    ids=["exception", "exit", "segmentation fault"],
)
def test_a_rank_that_fails_is_named_with_its_cause(zygote: Zygote, tag: str, order: int, words: list[str]) -> None:
    async def body() -> None:
        async with replica(zygote, config(2, 2)) as handle:
            _, last = await collect(handle.submit(request([order, 1], 500)))
            assert last.finish_reason == "error" and last.error is not None
            for word in words:
                assert word in last.error
            with pytest.raises(EngineError, match="rank 1: "):
                await handle.health()
            with pytest.raises(EngineError, match="rank 1: "):
                await anext(handle.submit(request([1])))
            await until(lambda: group_of(tag) == {}, "the group to end", 3.0)

    run(body())


@pytest.mark.parametrize("busy", [True, False], ids=["in a stream", "while idle"])
def test_a_killed_rank_is_named_and_ends_its_group(zygote: Zygote, tag: str, busy: bool) -> None:
    async def body() -> None:
        async with replica(zygote, config(2, 2)) as handle:
            stream = handle.submit(request([SLOW, 0], 500))
            if busy:
                await anext(stream)
            os.kill(group_of(tag)["shoal-rank-2"], signal.SIGKILL)
            if busy:
                _, last = await collect_rest(stream)
                assert last.finish_reason == "error"
                assert "rank 2: killed by SIGKILL" in (last.error or "")
            await until(lambda: group_of(tag) == {}, "the group to end", 3.0)
            await until(lambda: handle.client.failure is not None, "the front end to be told")
            with pytest.raises(EngineError, match="rank 2: killed by SIGKILL"):
                await handle.health()

    run(body())


def test_a_killed_engine_ends_its_ranks_and_streams(zygote: Zygote, tag: str) -> None:
    async def body() -> None:
        async with replica(zygote, config(2)) as handle:
            stream = handle.submit(request([SLOW, 0], 500))
            first = await anext(stream)
            os.kill(group_of(tag)["shoal-engine-0"], signal.SIGKILL)
            count, last = await collect_rest(stream)
            assert last.finish_reason == "error" and last.start == len(first.token_ids) + count
            assert "the engine process killed by SIGKILL" in (last.error or "")
            await until(lambda: group_of(tag) == {}, "the ranks to end", 3.0)

    run(body())


def test_a_hanging_step_is_ended_and_tells_what_each_rank_did(zygote: Zygote, tag: str) -> None:
    async def body() -> None:
        async with replica(zygote, config(2, step_timeout_s=2.5)) as handle:
            _, last = await collect(handle.submit(request([HANG, 0], 500)))
            assert last.error is not None
            assert last.error.startswith("step 0 gave no result within 2.5 s (launcher.step_timeout_s)")
            assert "rank 0: in step 0 since" in last.error and "rank 1: waiting for a plan since" in last.error
            await until(lambda: group_of(tag) == {}, "the group to end", 3.0)

    run(body())


def test_a_stopped_rank_is_named_by_its_silence(zygote: Zygote, tag: str) -> None:
    async def body() -> None:
        async with replica(zygote, config(2, step_timeout_s=5.0)) as handle:
            stream = handle.submit(request([SLOW, 0], 500))
            await anext(stream)
            os.kill(group_of(tag)["shoal-rank-0"], signal.SIGSTOP)
            _, last = await collect_rest(stream)
            assert "rank 0: step" in (last.error or "") and "gave no result within 5 s" in (last.error or "")
            await until(lambda: group_of(tag) == {}, "the group to end", 3.0)

    run(body())


@pytest.mark.parametrize(
    ("path", "error", "words"),
    [
        ("refuse 1", ValueError, r"rank 1: model-1\.safetensors: tensor x\.weight is missing$"),
        ("leave 1", EngineError, "rank 1: ended with exit code 5"),
        ("hang 1", EngineError, r"launcher\.start_timeout_s = 2: rank 1 is not through with loading"),
    ],
)
def test_a_start_that_fails_says_why_and_leaves_nothing(
    zygote: Zygote, tag: str, path: str, error: type[Exception], words: str
) -> None:
    async def body() -> None:
        with pytest.raises(error, match=words):
            async with replica(zygote, config(2, path=path, start_timeout_s=2.0 if "hang" in path else 60.0)):
                pass
        await until(lambda: group_of(tag) == {}, "the group to end", 3.0)

    run(body())


def test_a_rank_that_stops_while_it_loads_tells_its_stack_at_the_end_of_the_start(zygote: Zygote, tag: str) -> None:
    async def body() -> None:
        processes, (handle,) = prepare(zygote, config(2, path="hang 1", start_timeout_s=8.0))
        await processes.loaded()
        await handle.start()
        starting = asyncio.create_task(handle.ready(8.0))
        await until(lambda: "shoal-rank-1" in group_of(tag), "the rank")
        os.kill(group_of(tag)["shoal-rank-1"], signal.SIGSTOP)
        # 0 too where it waits for 1
        words = r"(?s)launcher\.start_timeout_s = 8: rank (0, )?1 .*rank 1 wrote:.*line \d+ in "
        with pytest.raises(EngineError, match=words):
            await starting
        await handle.stop()
        await until(lambda: group_of(tag) == {}, "the group to end", 3.0)

    run(body())


def test_a_cancelled_start_leaves_nothing(zygote: Zygote, tag: str) -> None:
    async def body() -> None:
        processes, (handle,) = prepare(zygote, config(2, path="hang 0"))
        await processes.loaded()
        await handle.start()
        starting = asyncio.create_task(handle.ready(60))
        await until(lambda: "shoal-rank-1" in group_of(tag), "the ranks to be started")
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await handle.stop()
        await until(lambda: group_of(tag) == {}, "the group to end", 3.0)

    run(body())


def test_a_rank_that_does_not_stop_is_killed_in_time(zygote: Zygote, tag: str) -> None:
    async def body() -> None:
        async with replica(zygote, config(2, stop_timeout_s=0.5)) as handle:
            stream = handle.submit(request([HANG, 0], 500))
            waiting = asyncio.create_task(collect(stream))
            await until(lambda: group_of(tag) != {}, "the group")
            await asyncio.sleep(0)
            started = time.monotonic()
            await handle.stop()
            assert time.monotonic() - started < 4.0
            _, last = await waiting
            assert last.finish_reason == "error" and "closed" in (last.error or "")
        await until(lambda: group_of(tag) == {}, "the group to end", 3.0)

    run(body())


def test_two_models_live_side_by_side_and_end_apart(zygote: Zygote, tag: str) -> None:
    async def body() -> None:
        async with replica(zygote, config(2)) as first:
            async with replica(zygote, config(1, 2)) as second:
                assert len(processes_tagged(tag)) == 1 + 2 * 3
                both = await asyncio.gather(*(collect(h.submit(request([4, 5]))) for h in (first, second)))
                assert [tokens for tokens, _ in both] == [expected([4, 5])] * 2
            assert len(processes_tagged(tag)) == 1 + 3
            assert (await collect(first.submit(request([6]))))[0] == expected([6])

    run(body())


def test_a_rank_with_other_settings_is_refused(zygote: Zygote) -> None:
    """Rank 1 is played by the test, as if another host had joined."""

    async def body() -> None:
        processes, (handle,) = prepare(zygote, config(2))
        await processes.loaded()
        handle.bootstrap = msgspec.structs.replace(handle.bootstrap, devices={0: "cpu"})
        listening: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        handle._on_listening = listening.set_result
        await handle.start()
        starting = asyncio.create_task(handle.ready(30))
        address = await listening
        channel = await asyncio.to_thread(connect, address, handle.bootstrap.key, TO_RANK, "the engine", 10)
        channel.send(Hello(rank=1, pid=1, host="elsewhere", versions=versions(), config="other", native=""))
        with pytest.raises(EngineError, match=r"rank 1: was given other settings or another model .* on elsewhere"):
            await starting
        channel.close()
        await handle.stop()

    run(body())
