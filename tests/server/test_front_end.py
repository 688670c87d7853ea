"""FrontEnd: prompts to requests, deltas to outputs, stop strings, fan-out, aborts; against a scripted engine."""

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from tokenizers import Tokenizer as Backend

from shoal.configs.sampling import SamplingParams
from shoal.engine.client import EngineError
from shoal.engine.messages import OutputDelta, Request, TokenLogprobs
from shoal.server.front_end import FrontEnd
from shoal.server.outputs import Logprob, RequestOutput
from shoal.server.tokenizer import Tokenizer
from tests.server.front_ends import EOS, TEXT, TOKENIZER, client_of, collect, front_end, says
from tests.server.scripted_client import Script, ScriptedClient, in_chunks
from tests.server.tiny_tokenizers import built, with_bos


@pytest.mark.parametrize("sizes", [(1,), (3,), (100,), (2, 1)])
def test_streams_cumulative_text_and_ends_with_the_whole(sizes: tuple[int, ...]) -> None:
    outputs = collect(front_end(says(TEXT, sizes)), "a prompt", SamplingParams(max_tokens=64), "r")
    texts = [output.outputs[0].text for output in outputs]
    assert texts[-1] == TEXT and all(TEXT.startswith(text) for text in texts)
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    last = outputs[-1]
    assert (last.request_id, last.prompt, last.prompt_token_ids) == ("r", "a prompt", TOKENIZER.encode("a prompt"))
    assert last.outputs[0].token_ids == TOKENIZER.encode(TEXT)
    assert (last.outputs[0].finish_reason, last.outputs[0].stop_reason) == ("length", None)
    assert last.num_cached_tokens == 3
    assert last.metrics is not None and last.metrics.finished_time is not None
    assert last.metrics.time_to_first_token_s is not None


def test_deltas_join_to_the_whole() -> None:
    outputs = collect(front_end(), "p", SamplingParams(logprobs=1), output_kind="delta")
    assert "".join(output.outputs[0].text for output in outputs) == TEXT
    assert [token for output in outputs for token in output.outputs[0].token_ids] == TOKENIZER.encode(TEXT)
    assert sum(len(output.outputs[0].logprobs or []) for output in outputs) == len(TOKENIZER.encode(TEXT))


def test_final_outputs_come_once() -> None:
    outputs = collect(front_end(), "p", output_kind="final")
    assert len(outputs) == 1 and outputs[0].outputs[0].text == TEXT


@pytest.mark.parametrize("sizes", [(1,), (4,), (100,)])
def test_a_stop_string_ends_the_request_at_the_engine(sizes: tuple[int, ...]) -> None:
    end = front_end(says(TEXT, sizes, finish_reason=None))
    output = collect(end, "p", SamplingParams(stop=["\n\nUser:", "xyz"], max_tokens=64), "r")[-1].outputs[0]
    assert output.text == "the quick brown fox 😀 jumps"
    assert (output.finish_reason, output.stop_reason) == ("stop", "\n\nUser:")
    kept = TOKENIZER.decode(output.token_ids)
    assert "\n\nUser:" in kept and not TOKENIZER.decode(output.token_ids[:-1]).endswith("\n\nUser:")
    assert client_of(end).aborted == ["r"] and client_of(end).closed_streams == ["r"]


def test_a_stop_string_is_kept_when_asked_for() -> None:
    sampling = SamplingParams(stop="\n\nUs", include_stop_str_in_output=True, max_tokens=64)
    assert collect(front_end(), "p", sampling)[-1].outputs[0].text == "the quick brown fox 😀 jumps\n\nUs"


def test_tokens_behind_a_stop_string_are_not_counted() -> None:
    sampling = SamplingParams(stop="quick", max_tokens=64)
    ids = {
        tuple(collect(front_end(says(TEXT, sizes)), "p", sampling)[-1].outputs[0].token_ids)
        for sizes in ((1,), (2,), (7,), (100,))
    }
    assert len(ids) == 1


def test_a_stop_string_within_min_tokens_does_not_count() -> None:
    before = len(TOKENIZER.encode("the the quick"))
    sampling = SamplingParams(stop="the", min_tokens=before, max_tokens=64)
    assert collect(front_end(says("the the quick the")), "p", sampling)[-1].outputs[0].text == "the the quick "


def test_an_end_token_gives_no_text_and_no_stop_reason() -> None:
    script: Script = lambda request: in_chunks(request, [*TOKENIZER.encode("hi"), EOS], (2,), "stop", EOS)  # noqa: E731
    output = collect(front_end(script), "p", SamplingParams(skip_special_tokens=False))[-1].outputs[0]
    assert (output.text, output.finish_reason, output.stop_reason) == ("hi", "stop", None)
    assert output.token_ids[-1] == EOS
    included = SamplingParams(skip_special_tokens=False, include_stop_str_in_output=True)
    assert collect(front_end(script), "p", included)[-1].outputs[0].text == "hi</s>"


def test_a_stop_token_is_the_stop_reason_and_gives_no_text() -> None:
    x = TOKENIZER.encode("x")[0]
    script: Script = lambda request: in_chunks(request, [*TOKENIZER.encode("hi"), x], (1,), "stop", x)  # noqa: E731
    output = collect(front_end(script), "p", SamplingParams(stop_token_ids=[x]))[-1].outputs[0]
    assert (output.text, output.finish_reason, output.stop_reason) == ("hi", "stop", x)


def test_an_unfinished_character_at_the_end_is_replaced() -> None:
    half = TOKENIZER.encode("😀")[:-1]
    output = collect(front_end(lambda request: in_chunks(request, half, (1,))), "p")[-1].outputs[0]
    assert output.text == TOKENIZER.backend.decode(half) == "\ufffd"


def test_repeated_deltas_change_nothing() -> None:
    def script(request: Request) -> list[OutputDelta]:
        deltas = in_chunks(request, TOKENIZER.encode(TEXT), (3,))
        overlap = msgspec.structs.replace(
            deltas[1], start=0, token_ids=deltas[0].token_ids + deltas[1].token_ids, logprobs=None
        )
        return [deltas[0], deltas[0], overlap, deltas[1], *deltas[2:]]

    output = collect(front_end(script), "p")[-1].outputs[0]
    assert (output.text, output.token_ids) == (TEXT, TOKENIZER.encode(TEXT))


def test_a_gap_in_the_stream_is_an_error() -> None:
    with pytest.raises(EngineError, match="tokens 1 to 1 of the output never arrived"):
        collect(front_end(lambda request: [d for d in in_chunks(request, [1, 2, 3], (1,)) if d.start != 1]), "p")


def test_errors_of_the_engine_are_raised() -> None:
    def failing(request: Request) -> list[OutputDelta]:
        return [
            OutputDelta(
                request_id=request.request_id, start=0, token_ids=[], finish_reason="error", error="rank 1: gone"
            )
        ]

    with pytest.raises(EngineError, match="rank 1: gone"):
        collect(front_end(failing), "p")
    with pytest.raises(EngineError, match="ended without a finish reason"):
        collect(front_end(says("hello", finish_reason=None)), "p")


def test_logprobs_have_vllms_shape() -> None:
    def script(request: Request) -> list[OutputDelta]:
        first = in_chunks(request, TOKENIZER.encode("hi"), (1,))
        entry = TokenLogprobs([5, 5, 6], [-0.25, -0.25, -2.0], [1, 1, 2])
        prompt = [None, *[entry] * (len(request.prompt_token_ids) - 1)]
        return [msgspec.structs.replace(first[0], prompt_logprobs=prompt), *first[1:]]

    output = collect(front_end(script), "the fox", SamplingParams(logprobs=1, prompt_logprobs=2))[-1]
    token = output.outputs[0].token_ids[0]
    logprobs = output.outputs[0].logprobs
    assert logprobs is not None and logprobs[0][token] == Logprob(-0.5, 1, TOKENIZER.token_text(token))
    assert list(logprobs[0]) == [token, token + 1]
    assert output.outputs[0].cumulative_logprob == -0.5 * len(output.outputs[0].token_ids)
    assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
    assert output.prompt_logprobs[1] is not None and list(output.prompt_logprobs[1]) == [5, 6]
    assert collect(front_end(), "p")[-1].outputs[0].logprobs is None


def test_the_engine_gets_a_seed_a_length_and_no_strings() -> None:
    end = front_end()
    sampling = SamplingParams(max_tokens=None, stop=["a"], bad_words=["fox"])
    part = end.prepare("hello", sampling, priority=2, deadline_s=5.0).parts[0]
    length = len(TOKENIZER.encode("hello"))
    assert part.sampling.max_tokens == 128 - length
    assert part.sampling.stop is None and part.sampling.bad_words is None
    assert part.bad_words_token_ids == TOKENIZER.bad_word_ids(["fox"])
    assert part.eos_token_ids == [EOS] and (part.priority, part.deadline_s) == (2, 5.0)
    assert end.prepare([5] * 100, SamplingParams(max_tokens=100)).parts[0].sampling.max_tokens == 28
    again = front_end().prepare("hello", sampling).parts[0]
    assert part.sampling.seed == again.sampling.seed is not None
    assert end.prepare("hello").parts[0].sampling.seed != part.sampling.seed


def test_prompts_come_in_four_forms() -> None:
    end = front_end()
    ids = TOKENIZER.encode("fox")
    for prompt in ("fox", ids, tuple(ids), {"prompt": "fox"}, {"prompt_token_ids": ids, "cache_salt": "a"}):
        assert end.prepare(prompt).parts[0].prompt_token_ids == ids
    assert end.prepare({"prompt_token_ids": ids, "cache_salt": "a"}).parts[0].cache_salt == "a"
    assert end.prepare(ids).prompt.text is None


def test_special_tokens_are_added_to_text_unless_a_template_wrote_them() -> None:
    end = front_end(tokenizer=Tokenizer(Backend.from_str(with_bos(built("byte_level")))))
    bos = TOKENIZER.bos_token_id
    assert end.prepare("fox").parts[0].prompt_token_ids == [bos, *TOKENIZER.encode("fox")]
    assert end.prepare("fox", special_tokens=False).parts[0].prompt_token_ids == TOKENIZER.encode("fox")
    assert end.prepare("").parts[0].prompt_token_ids == [bos]


@pytest.mark.parametrize(
    ("prompt", "sampling", "text"),
    [
        ("", None, "the prompt is empty"),
        ([], None, "the prompt is empty"),
        ([1, 10**6], None, r"holds 1000000; the vocabulary's ids are 0 to \d+"),
        ([1, -1], None, "holds -1"),
        ([1, "a"], None, "must be a list of integers"),
        ([1.5], None, "must be a list of integers"),
        ([1] * 128, None, "has 128 tokens and max_model_len is 128: at most 127 leave room"),
        (5, None, "must be text or a list of token ids, found int"),
        (b"abc", None, "found bytes"),
        ("\ud800", None, "lone surrogate at character 0"),
        ({"prompt": "a", "promt": 1}, None, "no key 'promt'"),
        ({"prompt": "a", "prompt_token_ids": [1]}, None, "either prompt .* or prompt_token_ids"),
        ({"cache_salt": "a"}, None, "either prompt"),
        ({"prompt": [1]}, None, "must be text, found list"),
        ({"prompt": "a", "cache_salt": ""}, None, "cache_salt must be a string that is not empty"),
        ({"prompt": "a", "cache_salt": "a\ud800"}, None, "cache_salt is not valid Unicode: .* at character 1"),
        ("a", SamplingParams(temperature=-1), "temperature"),
        ("a", SamplingParams(n=2, temperature=0), "n = 2: must be 1"),
        ("a", SamplingParams(max_tokens=500), "max_tokens = 500: must be at most 127"),
        ([1] * 100, SamplingParams(min_tokens=60, max_tokens=None), "min_tokens = 60 does not fit: .*leaves 28"),
        ("a", SamplingParams(logit_bias={10**6: 1.0}), "logit_bias"),
        ("a", SamplingParams(bad_words=[" "]), "has no tokens"),
        ("a", {"temperature": 0}, "must be a SamplingParams, not dict"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_sent(prompt: Any, sampling: Any, text: str) -> None:
    end = front_end()
    with pytest.raises(ValueError, match=text):
        collect(end, prompt, sampling)
    assert client_of(end).submitted == []


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"request_id": 7}, "request_id must be a string that is not empty, found 7"),
        ({"request_id": ""}, "request_id must be a string"),
        ({"request_id": "\udfff"}, "request_id is not valid Unicode"),
        ({"priority": "high"}, "priority must be an integer between .*, found 'high'"),
        ({"priority": 2**63}, "priority must be an integer"),
        ({"deadline_s": "soon"}, "deadline_s must be a moment of time.time.*found 'soon'"),
        ({"deadline_s": float("nan")}, "deadline_s must be a moment"),
    ],
)
def test_options_an_engine_cannot_take_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        front_end().prepare("a", **options)


def test_without_a_tokenizer_token_ids_work_and_text_does_not() -> None:
    end = front_end(says("fox"), tokenizer=None)
    output = collect(end, [1, 2], SamplingParams(logprobs=0))[-1].outputs[0]
    assert (output.text, output.token_ids) == ("", TOKENIZER.encode("fox"))
    assert output.logprobs is not None and output.logprobs[0][output.token_ids[0]].decoded_token is None
    for prompt, sampling in (("a", None), ([1], SamplingParams(stop="a")), ([1], SamplingParams(bad_words=["a"]))):
        with pytest.raises(ValueError, match=r"skip_tokenizer_init"):
            end.prepare(prompt, sampling)
    with pytest.raises(ValueError, match="skip_tokenizer_init"):
        end.chat_prompt([{"role": "user", "content": "a"}])


def test_detokenize_false_gives_no_text() -> None:
    output = collect(front_end(), "p", SamplingParams(detokenize=False))[-1].outputs[0]
    assert output.text == "" and output.token_ids == TOKENIZER.encode(TEXT)


def test_abort_ends_the_stream_with_what_there_is() -> None:
    async def scenario(n: int) -> tuple[RequestOutput, ScriptedClient]:
        end = front_end(says("a b c"), hold=True)
        last = None
        async for last in end.generate("p", SamplingParams(n=n), "r"):
            if all(len(output.token_ids) == 2 for output in last.outputs) and not last.finished:
                await end.abort("r")
                await end.abort("unknown")
        assert last is not None
        return last, client_of(end)

    for n in (1, 2):
        last, client = asyncio.run(asyncio.wait_for(scenario(n), 30))
        assert last.finished and {output.finish_reason for output in last.outputs} == {"abort"}
        assert len(client.aborted) >= n


def test_closing_the_stream_closes_the_engines() -> None:
    async def scenario(n: int) -> ScriptedClient:
        end = front_end(hold=True)
        stream = end.generate("p", SamplingParams(n=n), "r")
        await anext(stream)
        await stream.aclose()
        assert [output.finished async for output in _again(end)] != []  # the id is free
        return client_of(end)

    async def _again(end: FrontEnd) -> Any:
        client_of(end).hold = False
        async for output in end.generate("p", None, "r"):
            yield output

    for n in (1, 3):
        client = asyncio.run(asyncio.wait_for(scenario(n), 30))
        assert len(client.closed_streams) == n + 1


def test_a_running_id_cannot_be_used_twice() -> None:
    async def scenario() -> None:
        end = front_end(hold=True)
        stream = end.generate("p", None, "r")
        await anext(stream)
        with pytest.raises(ValueError, match="'r' is running already"):
            await anext(end.generate("p", None, "r"))
        await stream.aclose()

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_a_long_text_is_tokenised_off_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    end = front_end()
    threads = []
    prepare: Callable[..., Any] = end.prepare
    monkeypatch.setattr(end, "prepare", lambda *a, **o: threads.append(threading.current_thread()) or prepare(*a, **o))
    with pytest.raises(ValueError, match="max_model_len"):
        collect(end, "a" * 40000)
    with pytest.raises(ValueError, match="max_model_len"):
        collect(end, {"prompt": "a" * 400})
    assert threads[0] is not threading.main_thread() and threads[1] is threading.main_thread()
