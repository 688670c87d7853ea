"""FrontEnd: requests of several outputs, full queues, request ids; against a scripted engine."""

import asyncio
from collections.abc import AsyncGenerator

import msgspec
import pytest

from shoal.configs.sampling import SamplingParams
from shoal.engine.client import EngineError, QueueFull
from shoal.engine.messages import OutputDelta, Request
from shoal.server.outputs import RequestOutput
from tests.server.front_ends import ANSWER, TEXT, TOKENIZER, client_of, collect, front_end
from tests.server.scripted_client import ScriptedClient, in_chunks


def test_n_outputs_are_n_requests_with_one_seed() -> None:
    end = front_end(lambda request: in_chunks(request, TOKENIZER.encode(TEXT)[: 3 + request.sample_index], (1,)))
    outputs = collect(end, "p", SamplingParams(n=3, seed=7), "r")
    parts = client_of(end).submitted
    assert [(part.request_id, part.sample_index) for part in parts] == [("r#0", 0), ("r#1", 1), ("r#2", 2)]
    assert all(part.sampling.n == 1 and part.sampling.seed == 7 for part in parts)
    assert [len(output.token_ids) for output in outputs[-1].outputs] == [3, 4, 5]
    assert [output.index for output in outputs[-1].outputs] == [0, 1, 2]
    assert [output.finished for output in outputs].count(True) == 1 and outputs[-1].finished


def test_delta_outputs_of_n_hold_what_is_new_only() -> None:
    end = front_end(lambda request: in_chunks(request, TOKENIZER.encode(TEXT)[: 3 + request.sample_index], (1,)))
    texts = {0: "", 1: ""}
    finishes = []
    for output in collect(end, "p", SamplingParams(n=2), "r", output_kind="delta"):
        for part in output.outputs:
            texts[part.index] += part.text
            finishes += [part.index] if part.finished() else []
    ids = TOKENIZER.encode(TEXT)
    assert texts == {0: TOKENIZER.decode(ids[:3]), 1: TOKENIZER.decode(ids[:4])}
    assert sorted(finishes) == [0, 1]


def test_one_failing_output_of_n_ends_the_others() -> None:
    def script(request: Request) -> list[OutputDelta]:
        if request.sample_index == 1:
            return [
                OutputDelta(request_id=request.request_id, start=0, token_ids=[], finish_reason="error", error="no")
            ]
        return in_chunks(request, TOKENIZER.encode(TEXT), (1,))

    end = front_end(script, hold=True)
    with pytest.raises(EngineError, match="no"):
        collect(end, "p", SamplingParams(n=3), "r")
    assert sorted(client_of(end).closed_streams) == ["r#0", "r#1", "r#2"]


@pytest.mark.parametrize("fails", [False, True])
def test_what_ends_while_the_reader_is_busy_is_not_lost(fails: bool) -> None:
    def script(request: Request) -> list[OutputDelta]:
        deltas = in_chunks(request, TOKENIZER.encode(TEXT)[: 2 + request.sample_index], (1,))
        if fails and request.sample_index == 1:
            deltas[-1] = msgspec.structs.replace(deltas[-1], finish_reason="error", error="no")
        return deltas

    end = front_end(script)

    async def read() -> list[RequestOutput]:
        outputs = []
        async for output in end.generate("p", SamplingParams(n=2), "r"):
            outputs.append(output)
            for _ in range(40):  # all streams have ended when the next output is asked for
                await asyncio.sleep(0)
        return outputs

    if fails:
        with pytest.raises(EngineError, match="no"):
            asyncio.run(asyncio.wait_for(read(), 30))
    else:
        last = asyncio.run(asyncio.wait_for(read(), 30))[-1]
        assert last.finished and [len(output.token_ids) for output in last.outputs] == [2, 3]


@pytest.mark.parametrize("n", [1, 2])
def test_a_full_queue_is_surfaced_by_generate_and_waited_for_by_complete(n: int) -> None:
    with pytest.raises(QueueFull):
        collect(front_end(refusals=1), "p", SamplingParams(n=n))

    async def scenario() -> RequestOutput:
        end = front_end(refusals=3)
        return await end.complete(end.prepare("p", SamplingParams(n=n)))

    assert asyncio.run(asyncio.wait_for(scenario(), 30)).outputs[-1].text == TEXT


def test_more_outputs_than_the_queue_holds_take_turns() -> None:
    class OneAtATime(ScriptedClient):
        busy = False

        async def submit(self, request: Request) -> AsyncGenerator[OutputDelta]:
            if self.busy:
                raise QueueFull("the queue is full", 0.01)
            self.busy = True
            try:
                async for delta in super().submit(request):
                    yield delta
            finally:
                self.busy = False

    end = front_end()
    end.client = OneAtATime(ANSWER)
    output = asyncio.run(asyncio.wait_for(end.complete(end.prepare("p", SamplingParams(n=4))), 30))
    assert [part.text for part in output.outputs] == [TEXT] * 4


def test_its_own_request_ids_are_not_what_a_user_would_choose() -> None:
    ends = front_end(), front_end()
    ids = [end.prepare("p").request_id for end in ends for _ in range(3)]
    assert len(set(ids)) == 6 and not {"request-0", "request-1", "request-2"} & set(ids)
