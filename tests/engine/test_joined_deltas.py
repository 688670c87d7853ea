"""Deltas of requests that nobody follows token by token come joined, the first and the last at once."""

from shoal.engine.joined_deltas import HOLD_S, JoinedDeltas, join
from shoal.engine.messages import FinishReason, OutputDelta, TokenLogprobs


def delta(name: str, start: int, *token_ids: int, reason: FinishReason | None = None) -> OutputDelta:
    return OutputDelta(request_id=name, start=start, token_ids=list(token_ids), finish_reason=reason)


def test_what_is_held_passes_with_the_last_delta() -> None:
    joined = JoinedDeltas()
    joined.add("a")
    assert joined.passing([delta("a", 0, 5)], 0.0) == [delta("a", 0, 5)]
    assert joined.passing([delta("a", 1, 6), delta("b", 0, 1)], 0.01) == [delta("b", 0, 1)]
    assert joined.passing([delta("a", 2, 7)], 0.02) == []
    last = joined.passing([delta("a", 3, 8, reason="length")], 0.03)
    assert last == [delta("a", 1, 6, 7, 8, reason="length")]
    assert joined.passing([delta("a", 0, 1)], 0.04) == [delta("a", 0, 1)], "the id is another request's by now"


def test_what_is_held_passes_after_some_time() -> None:
    joined = JoinedDeltas()
    for name in ("a", "b"):
        joined.add(name)
    assert len(joined.passing([delta("a", 0, 5)], 0.0)) == 1
    assert joined.passing([delta("a", 1, 6), delta("b", 0, 1)], 0.01) == [delta("b", 0, 1)], "a first delta waits"
    later = joined.passing([delta("a", 2, 7), delta("b", 1, 2)], HOLD_S + 0.01)
    assert later == [delta("a", 1, 6, 7), delta("b", 1, 2)]


def test_a_forgotten_request_leaves_nothing() -> None:
    joined = JoinedDeltas()
    joined.add("a")
    joined.passing([delta("a", 0, 5)], 0.0)
    joined.passing([delta("a", 1, 6)], 0.01)
    joined.forget("a")
    joined.add("a")
    assert joined.passing([delta("a", 0, 9)], 0.02) == [delta("a", 0, 9)]


def test_joining_keeps_log_probabilities_and_the_end() -> None:
    entries = [TokenLogprobs([token], [-1.0], [1]) for token in (3, 4)]
    first = OutputDelta(
        request_id="a", start=0, token_ids=[3], logprobs=entries[:1], prompt_logprobs=[None], num_cached_tokens=2
    )
    last = OutputDelta(
        request_id="a", start=1, token_ids=[4], logprobs=entries[1:], finish_reason="stop", stop_reason=4,
        num_cached_tokens=2,
    )  # fmt: skip
    assert join([first, last]) == OutputDelta(
        request_id="a", start=0, token_ids=[3, 4], logprobs=entries, prompt_logprobs=[None], finish_reason="stop",
        stop_reason=4, num_cached_tokens=2,
    )  # fmt: skip
