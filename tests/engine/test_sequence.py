"""Sequence: where output ends, what may come from the cache, prompt_logprobs over chunks."""

import pytest

from shoal.configs.sampling import SamplingParams
from shoal.engine.messages import Request, TokenLogprobs
from shoal.engine.sequence import Sequence
from tests.engine.harness import make_request


def make(prompt: list[int], output: list[int], max_model_len: int = 64, **fields: object) -> Sequence:
    request = make_request("r", prompt, **fields)  # type: ignore[arg-type]
    seq = Sequence(request, request.sampling, max_model_len, 0)
    seq.tokens += output
    return seq


@pytest.mark.parametrize(
    ("output", "fields", "reason", "stop_reason"),
    [
        ([], {}, None, None),
        ([5], {}, None, None),
        ([1], {}, "stop", None),
        ([1], {"ignore_eos": True}, None, None),
        ([1], {"ignore_eos": True, "stop_token_ids": [1]}, "stop", 1),
        ([7], {"stop_token_ids": [7]}, "stop", 7),
        ([1], {"min_tokens": 2}, None, None),
        ([4, 1], {"min_tokens": 2}, "stop", None),
        ([4] * 8, {}, "length", None),
        ([4] * 7 + [1], {}, "stop", None),
        ([4] * 3, {"max_tokens": None}, None, None),
        ([4] * 62, {"max_tokens": None}, "length", None),
        ([4] * 62, {"max_tokens": 100}, "length", None),
        ([4, 4], {"emitted_token_ids": [4] * 6}, "length", None),
    ],
)
def test_where_output_ends(
    output: list[int], fields: dict[str, object], reason: str | None, stop_reason: int | None
) -> None:
    seq = make([1, 2], output, eos_token_ids=[1], **fields)
    assert (seq.finish_reason(), seq.stop_reason) == (reason, stop_reason)


def test_an_end_token_in_the_prompt_ends_nothing() -> None:
    assert make([1], [], eos_token_ids=[1]).finish_reason() is None


def test_the_last_token_never_comes_from_the_cache() -> None:
    assert make([1, 2, 3], []).max_hit_tokens == 2
    assert make([1, 2, 3], [4]).max_hit_tokens == 3


def test_prompt_logprobs_are_gathered_over_chunks_and_repeated_chunks() -> None:
    entries = [TokenLogprobs([i], [0.0], [1]) for i in range(5)]
    seq = make([1, 2, 3, 4, 5], [], prompt_logprobs=0)
    assert seq.max_hit_tokens == 0, "every position must be computed"
    seq.take_prompt_logprobs(0, entries[:2])
    assert seq.max_hit_tokens == 2, "after a preemption only the missing ones"
    seq.take_prompt_logprobs(1, entries[1:4])
    assert seq.prompt_logprobs == [None, *entries[:4]]
    seq.prompt_logprobs = None
    assert seq.max_hit_tokens == 4


def test_the_announcement_tells_all_tokens() -> None:
    seq = make([1, 2], [3], emitted_token_ids=[9], temperature=1.0, seed=4, sample_index=3)
    new = seq.announcement()
    assert (new.token_ids, new.num_prompt_tokens, new.sample_index) == ([1, 2, 9, 3], 2, 3)
    assert new.sampling == SamplingParams(temperature=1.0, seed=4, max_tokens=8)
    assert seq.num_told == 4


def test_deltas_of_requests_nobody_follows_wait_but_for_the_first() -> None:
    request = Request(
        request_id="a", prompt_token_ids=[1, 2], emitted_token_ids=[9], sampling=SamplingParams(logprobs=0), joined=True
    )
    seq = Sequence(request, request.sampling, 100, 0)
    entries = [TokenLogprobs([token], [-1.0], [1]) for token in (3, 4, 5)]
    for token, entry in zip((3, 4, 5), entries, strict=True):
        seq.tokens.append(token)
        seq.logprobs.append(entry)
        if token == 3:
            assert not seq.may_wait()
            first = seq.take_delta()
            assert seq.may_wait()
    assert (first.start, first.token_ids, first.logprobs) == (1, [3], entries[:1])
    last = seq.take_delta("length")
    assert (last.start, last.token_ids, last.logprobs, last.finish_reason) == (2, [4, 5], entries[1:], "length")
    assert seq.take_delta("abort").token_ids == []


def test_prompt_logprobs_are_told_with_the_first_token_and_not_before() -> None:
    seq = make([1, 2, 3], [], prompt_logprobs=0)
    seq.take_prompt_logprobs(0, [TokenLogprobs([2], [-1.0], [1])])
    assert seq.take_delta("abort").prompt_logprobs is None
    seq.tokens.append(7)
    given = seq.take_delta()
    assert given.prompt_logprobs is not None and len(given.prompt_logprobs) == 2
