"""What a user asked for carries over deaths of replicas: n outputs, stop strings, log-probabilities, penalties."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from shoal.configs.sampling import SamplingParams
from shoal.launcher.controller import Controller
from shoal.launcher.fake_replica import VOCAB_SIZE, FakeReplicas
from shoal.server.front_end import FrontEnd
from shoal.server.outputs import CompletionOutput
from shoal.server.tokenizer import Tokenizer
from tests.launcher.controllers import fakes
from tests.launcher.harness import run, until
from tests.shoal.fake_engine import DEMO


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(DEMO)


def front_of(controller: Controller, tokenizer: Tokenizer) -> FrontEnd:
    """A front end over a controller of fake replicas."""
    return FrontEnd(controller, tokenizer=tokenizer, vocab_size=VOCAB_SIZE, max_model_len=512)


async def complete(
    controller: Controller, factory: FakeReplicas, front_end: FrontEnd, kills: int, **sampling: Any
) -> list[CompletionOutput]:
    """One request's outputs, with so many deaths while they stream."""
    params = SamplingParams(**{"max_tokens": 120, "seed": 11, "ignore_eos": True, **sampling})
    texts: dict[int, str] = {}

    async def read() -> list[CompletionOutput]:
        async for output in front_end.generate("a prompt", params):
            for completion in output.outputs:
                assert completion.text.startswith(texts.get(completion.index, "")), "text that was given has changed"
                texts[completion.index] = completion.text
        return [replace(completion) for completion in output.outputs]

    reading = asyncio.create_task(read())
    slot = controller._slots[0]
    for _ in range(kills):
        await until(lambda: slot.served or reading.done(), "tokens")
        assert not reading.done(), "the request ended before its replica could be killed"
        life = slot.life
        factory.lives[0][-1].kill()
        await until(lambda life=life: slot.life > life, "the death")
    return await reading


def test_outputs_are_those_of_an_undisturbed_run(tokenizer: Tokenizer) -> None:
    async def body() -> None:
        kinds: list[dict[str, Any]] = [
            {"temperature": 1.0, "n": 3, "logprobs": 2},
            {
                "temperature": 0.0,
                "min_tokens": 100,
                "stop_token_ids": list(range(0, VOCAB_SIZE, 7)),
                "prompt_logprobs": 1,
            },
            {"temperature": 1.0, "presence_penalty": 0.5, "repetition_penalty": 1.2},
        ]
        async with fakes(1, step_s=0.003) as (controller, factory):
            front = front_of(controller, tokenizer)
            for kind in kinds:
                undisturbed = await complete(controller, factory, front, 0, **kind)
                assert await complete(controller, factory, front, 2, **kind) == undisturbed

    run(body())


def test_a_stop_string_is_found_across_a_death(tokenizer: Tokenizer) -> None:
    """The string is cut out of an undisturbed run, so that its tokens are spread over two lives."""

    async def body() -> None:
        async with fakes(1, step_s=0.003) as (controller, factory):
            front = front_of(controller, tokenizer)
            (whole,) = await complete(controller, factory, front, 0, temperature=1.0)
            stop = whole.text[len(whole.text) * 3 // 4 :][:12]
            (calm,) = await complete(controller, factory, front, 0, temperature=1.0, stop=[stop])
            (disturbed,) = await complete(controller, factory, front, 2, temperature=1.0, stop=[stop])
            assert disturbed == calm and calm.stop_reason == stop and whole.text.startswith(calm.text)

    run(body())
