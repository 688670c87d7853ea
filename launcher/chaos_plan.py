"""What a fault drill does, from its seed alone: the requests, and the faults with their victims and pauses."""

import random
from typing import Literal

import msgspec

from shoal.configs.sampling import SamplingParams
from shoal.engine.messages import Request

FaultKind = Literal["kill rank", "kill engine", "stop rank", "stop engine", "lose host"]
KINDS: tuple[FaultKind, ...] = ("kill rank", "kill engine", "stop rank", "stop engine")
"""What a drill can do by itself; the loss of a host (the rank's) it asks for."""
WEIGHTS: dict[FaultKind, int] = {"kill rank": 6, "kill engine": 2, "stop rank": 1, "stop engine": 1, "lose host": 1}


class PlannedFault(msgspec.Struct, frozen=True, kw_only=True):
    """One fault. pause_s: after the last one was mended. replica, rank: whom it hits (rank is not used for engines)."""

    pause_s: float
    kind: FaultKind
    replica: int
    rank: int


class LoadShape(msgspec.Struct, frozen=True, kw_only=True):
    """The drill's requests. pool: how many different ones there are. Lengths in tokens, evenly spread up to these."""

    pool: int = 64
    max_prompt: int = 48
    max_output: int = 96
    max_model_len: int = 512
    vocab_size: int = 4096


def plan_faults(
    seed: int, count: int, replicas: int, ranks: int, kinds: tuple[FaultKind, ...], mean_pause_s: float
) -> list[PlannedFault]:
    """`count` faults over replicas of `ranks` ranks."""
    choose = random.Random(f"faults {seed}")
    weights = [WEIGHTS[kind] for kind in kinds]
    return [
        PlannedFault(
            pause_s=round(choose.uniform(0.2, 1.8) * mean_pause_s, 3),
            kind=choose.choices(kinds, weights)[0],
            replica=choose.randrange(replicas),
            rank=choose.randrange(ranks),
        )
        for _ in range(count)
    ]


def plan_requests(seed: int, shape: LoadShape) -> list[Request]:
    """The pool: greedy and sampled, with and without penalties, logprobs, minimum lengths, shared prefixes."""
    choose = random.Random(f"requests {seed}")
    common = [choose.randrange(shape.vocab_size) for _ in range(shape.max_prompt // 2)]
    return [_request(number, choose, common, shape) for number in range(shape.pool)]


def _request(number: int, choose: random.Random, common: list[int], shape: LoadShape) -> Request:
    shared = common if choose.random() < 0.5 else []
    own = choose.randint(1, shape.max_prompt - len(shared))
    prompt = shared + [choose.randrange(shape.vocab_size) for _ in range(own)]
    room = shape.max_model_len - len(prompt)
    longest = max(1, min(shape.max_output, room))
    penalised = choose.random() < 0.25
    sampling = SamplingParams(
        max_tokens=choose.randint(max(1, longest // 4), longest),
        min_tokens=choose.choice((0, min(4, longest // 4))),
        temperature=choose.choice((0.0, 1.0)),
        top_p=choose.choice((1.0, 0.9)),
        seed=choose.getrandbits(50),
        presence_penalty=0.5 if penalised else 0.0,
        frequency_penalty=0.3 if penalised else 0.0,
        repetition_penalty=1.1 if penalised else 1.0,
        logprobs=choose.choice((None, None, 2)),
        ignore_eos=True,
    )
    return Request(request_id=f"pool-{number}", prompt_token_ids=prompt, sampling=sampling)
