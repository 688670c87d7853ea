"""Workloads of `shoal bench`: random token ids with fixed or ShareGPT-like lengths, and the clients that send them.

ShareGPT-like: log-normal lengths with the medians and spreads of the ShareGPT conversations that serving papers replay
(prompts about 90 tokens in the median with a long tail, answers about 160), cut to what the model's context holds.
"""

import asyncio
import random
import time
from collections.abc import Sequence

import msgspec

from shoal.configs.sampling import SamplingParams
from shoal.engine.client import EngineClient
from shoal.engine.messages import Request

SHAREGPT_PROMPT = (90.0, 1.2)  # median, sigma of the logarithm
SHAREGPT_OUTPUT = (160.0, 0.9)


class Work(msgspec.Struct, frozen=True):
    """One request to send: prompt ids and the exact number of tokens to generate."""

    prompt_token_ids: list[int]
    output_len: int


class Trace(msgspec.Struct):
    """When the tokens of one request came: seconds on one clock. token_times: one entry per token, grouped as they
    arrived."""

    prompt_len: int
    sent: float
    token_times: list[float] = []
    num_cached_tokens: int = 0


def make_workload(
    dataset: str, num_prompts: int, input_len: int, output_len: int, vocab_size: int, max_model_len: int, seed: int
) -> list[Work]:
    """Requests of the data set `fixed` or `sharegpt-like`. Raises ValueError when fixed lengths exceed the context."""
    if dataset == "fixed" and input_len + output_len > max_model_len:
        raise ValueError(
            f"--input-len {input_len} plus --output-len {output_len} exceed "
            f"max_model_len {max_model_len}; lower one of them"
        )
    rng = random.Random(seed)
    work = []
    for _ in range(num_prompts):
        if dataset == "fixed":
            prompt_len, answer_len = input_len, output_len
        else:
            prompt_len = min(max(4, round(log_normal(rng, *SHAREGPT_PROMPT))), max_model_len // 2)
            answer_len = min(max(4, round(log_normal(rng, *SHAREGPT_OUTPUT))), max_model_len - prompt_len)
        work.append(Work([rng.randrange(vocab_size) for _ in range(prompt_len)], answer_len))
    return work


def log_normal(rng: random.Random, median: float, sigma: float) -> float:
    """A draw whose logarithm is normal around log(median)."""
    return median * rng.lognormvariate(0.0, sigma)


async def run_one(client: EngineClient, name: str, work: Work) -> Trace:
    """Send one request and note when its tokens come. Raises RuntimeError when it ends in an error."""
    sampling = SamplingParams(temperature=0.0, max_tokens=work.output_len, ignore_eos=True, seed=0)
    request = Request(
        request_id=name, prompt_token_ids=work.prompt_token_ids, sampling=sampling, arrival=time.time(), cache_salt=name
    )
    trace = Trace(len(work.prompt_token_ids), time.perf_counter())
    async for delta in client.submit(request):
        now = time.perf_counter()
        trace.token_times += [now] * len(delta.token_ids)
        trace.num_cached_tokens = max(trace.num_cached_tokens, delta.num_cached_tokens)
        if delta.finish_reason == "error":
            raise RuntimeError(f"request {name} failed: {delta.error}")
    return trace


async def run_in_turn(client: EngineClient, work: Sequence[Work], prefix: str) -> list[Trace]:
    """One request at a time: latency without queueing."""
    return [await run_one(client, f"{prefix}-{index}", item) for index, item in enumerate(work)]


async def run_together(client: EngineClient, work: Sequence[Work], prefix: str) -> list[Trace]:
    """All requests at once: throughput."""
    return list(await asyncio.gather(*(run_one(client, f"{prefix}-{i}", item) for i, item in enumerate(work))))
