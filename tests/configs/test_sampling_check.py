"""Every field of SamplingParams is honoured or refused."""

import math
from typing import Any

import pytest

from shoal.configs.sampling import SamplingParams
from shoal.configs.sampling_check import check_sampling

BAD = [
    ({"temperature": -0.1}, "temperature = -0.1: must be a number of at least 0"),
    ({"temperature": math.nan}, "temperature = nan: must be a finite number"),
    ({"temperature": math.inf}, "temperature = inf: must be a finite number"),
    ({"temperature": 1e-6}, r"temperature = 1e-06: must be 0 \(greedy\) or at least 1e-05"),
    ({"temperature": True}, "temperature = true: .* not a truth value"),
    ({"top_p": 0.0}, "top_p = 0.0: must be a number above 0 and at most 1"),
    ({"top_p": math.nan}, "top_p"),
    ({"top_k": -2}, "top_k = -2"),
    ({"top_k": 1.5}, "top_k = 1.5"),
    ({"min_p": 1.1}, "min_p = 1.1"),
    ({"presence_penalty": 2.1}, "presence_penalty"),
    ({"frequency_penalty": -2.1}, "frequency_penalty"),
    ({"repetition_penalty": 0.0}, "repetition_penalty"),
    ({"max_tokens": 0}, "max_tokens = 0"),
    ({"max_tokens": True}, "max_tokens = true"),
    ({"max_tokens": 50}, "max_tokens = 50: must be at most 49"),
    ({"min_tokens": 17}, "min_tokens = 17: must be at most max_tokens = 16"),
    ({"logit_bias": {3: 101.0}}, "logit_bias"),
    ({"logit_bias": {3: math.nan}}, "logit_bias"),
    ({"logit_bias": {32: 1.0}}, "logit_bias = 32: token ids must be at most 31"),
    ({"logit_bias": {"3": 1.0}}, "logit_bias"),
    ({"allowed_token_ids": []}, "at least one token id"),
    ({"allowed_token_ids": [1, 1]}, "twice"),
    ({"allowed_token_ids": [32]}, "at most 31"),
    ({"allowed_token_ids": [-1]}, "allowed_token_ids"),
    ({"stop_token_ids": [32]}, "at most 31"),
    ({"stop": ""}, "not empty"),
    ({"stop": ["a", ""]}, "not empty"),
    ({"stop": [1]}, "stop"),
    ({"stop": "a", "detokenize": False}, "detokenize is false"),
    ({"bad_words": [""]}, "not empty"),
    ({"n": 0}, "n = 0: must be an integer from 1 to 128"),
    ({"n": 2, "temperature": 0}, "n = 2: must be 1 with temperature = 0"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**63}, "seed"),
    ({"logprobs": 65}, "logprobs = 65: must be an integer from 0 to 64"),
    ({"logprobs": 33}, "at most the vocabulary's size, 32"),
    ({"prompt_logprobs": -1}, "prompt_logprobs"),
    ({"ignore_eos": 1}, "ignore_eos = 1: must be true or false"),
    ({"min_tokens": 1, "allowed_token_ids": [3], "stop_token_ids": [3, 4]}, "none is left"),
]


@pytest.mark.parametrize(("fields", "words"), BAD)
def test_bad_parameters_are_refused_by_name(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_sampling(SamplingParams(**fields), vocab_size=32, max_model_len=50)


def test_all_bad_fields_are_named_at_once() -> None:
    with pytest.raises(ValueError) as refused:
        check_sampling(SamplingParams(top_p=0.0, temperature=-1.0))
    assert [line.partition(" ")[0] for line in str(refused.value).splitlines()] == ["temperature", "top_p"]


def test_good_parameters_come_back_in_one_spelling() -> None:
    assert check_sampling(SamplingParams()) == SamplingParams()
    found = check_sampling(SamplingParams(top_k=-1, stop="a", stop_token_ids=[], bad_words=[], logit_bias={}))
    assert found == SamplingParams(stop=["a"])
    assert check_sampling(SamplingParams(temperature=0, max_tokens=None), 32, 50).temperature == 0.0
    assert type(check_sampling(SamplingParams(temperature=0)).temperature) is float


def test_something_else_is_refused() -> None:
    with pytest.raises(ValueError, match="must be a SamplingParams, not dict"):
        check_sampling({"temperature": 0})  # type: ignore[arg-type]
