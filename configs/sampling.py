"""SamplingParams: how one request's tokens are chosen; field names and meanings as vLLM users know them."""

from typing import Annotated

import msgspec
from msgspec import Meta

MAX_LOGPROBS = 64
MAX_LOGIT_BIAS = 100.0
MIN_TEMPERATURE = 1e-5
"""Smallest temperature but 0: dividing float32 logits by less would overflow."""

Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Text = Annotated[str, Meta(min_length=1)]
Bias = Annotated[float, Meta(ge=-MAX_LOGIT_BIAS, le=MAX_LOGIT_BIAS)]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]
LogprobsCount = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How to choose the tokens of one request.

    Constructors of msgspec structs do not validate; `shoal.configs.sampling_check.check_sampling` does, and every entry
    point calls it before a request is accepted. Greedy decoding is `temperature=0`.
    """

    max_tokens: Annotated[Count | None, Meta(description="Most tokens to generate; null: up to max_model_len.")] = 16
    min_tokens: Annotated[
        int, Meta(ge=0, le=2**31 - 1, description="End tokens and stop ids are masked before this many tokens.")
    ] = 0
    temperature: Annotated[
        float, Meta(ge=0.0, description="0 is greedy; logits are divided by it otherwise (then at least 1e-5).")
    ] = 1.0
    top_k: Annotated[
        int, Meta(ge=-1, le=2**31 - 1, description="Keep the k most probable tokens; 0 or -1 keeps all.")
    ] = 0
    top_p: Annotated[float, Meta(gt=0.0, le=1.0, description="Keep the smallest set with this probability mass.")] = 1.0
    min_p: Annotated[float, Meta(ge=0.0, le=1.0, description="Drop tokens below min_p times the best probability.")] = (
        0.0
    )
    presence_penalty: Annotated[
        float, Meta(ge=-2.0, le=2.0, description="Subtracted once from tokens in the output.")
    ] = 0.0
    frequency_penalty: Annotated[
        float, Meta(ge=-2.0, le=2.0, description="Subtracted per occurrence in the output.")
    ] = 0.0
    repetition_penalty: Annotated[
        float,
        Meta(
            ge=0.01,
            le=100.0,
            description="Divides positive and multiplies negative logits of tokens in prompt or output.",
        ),
    ] = 1.0
    logit_bias: Annotated[dict[TokenId, Bias] | None, Meta(description="Added to the logits of these token ids.")] = (
        None
    )
    allowed_token_ids: Annotated[list[TokenId] | None, Meta(description="Only these token ids may be chosen.")] = None
    bad_words: Annotated[list[Text] | None, Meta(description="Words whose completing token is masked.")] = None
    stop: Annotated[Text | list[Text] | None, Meta(description="Strings that end the output.")] = None
    stop_token_ids: Annotated[list[TokenId] | None, Meta(description="Token ids that end the output.")] = None
    include_stop_str_in_output: Annotated[bool, Meta(description="Keep the stop string in the text.")] = False
    ignore_eos: Annotated[bool, Meta(description="Go on after the end-of-sequence token.")] = False
    n: Annotated[int, Meta(ge=1, le=128, description="Outputs per prompt.")] = 1
    seed: Annotated[
        Seed | None, Meta(description="Makes the sampling reproducible; drawn at admission when absent.")
    ] = None
    logprobs: Annotated[
        LogprobsCount | None, Meta(description="Log-probabilities of this many best tokens per position.")
    ] = None
    prompt_logprobs: Annotated[LogprobsCount | None, Meta(description="The same for every prompt position.")] = None
    detokenize: Annotated[bool, Meta(description="Produce text; false gives token ids only.")] = True
    skip_special_tokens: Annotated[bool, Meta(description="Leave special tokens out of the text.")] = True
    spaces_between_special_tokens: Annotated[bool, Meta(description="Put spaces between special tokens.")] = True
