"""StepBudget: tokens, prefill share, pipeline slices, the inter-token limit."""

from typing import Any

from shoal.configs.schema import SchedulerConfig
from shoal.engine.cost_model import CostModel, StepLoad
from shoal.engine.step_budget import MIN_PREFILL, MIN_SLICE, PROBE, SLICES, StepBudget


def make(
    *, cost: CostModel | None = None, max_in_flight: int = 1, decoding: bool = True, prefill: int = 0, **config: Any
) -> StepBudget:
    return StepBudget(
        SchedulerConfig(**{"max_num_batched_tokens": 1000, **config}),
        cost or CostModel(),
        max_in_flight,
        decoding=decoding,
        decode_cost=10.0,
        outstanding_prefill=prefill,
    )


def linear_cost(token_s: float = 0.0001, base_s: float = 0.01) -> CostModel:
    cost = CostModel()
    for count in range(400):
        tokens = 40 * (count % 20)
        cost.observe(StepLoad(prefill_tokens=tokens), base_s + token_s * tokens)
    return cost


def test_decode_rows_and_chunks_share_one_budget() -> None:
    budget = make(max_num_batched_tokens=10)
    assert budget.tokens == 10 and budget.share > 0
    budget.take_decode(4, 1 + 2 + 3 + 4)
    assert budget.chunk(100, 0) == 6
    budget.take_prefill(6, 0)
    assert budget.chunk(1, 0) == 0 and budget.tokens == 0
    assert (budget.load.decode_rows, budget.load.prefill_tokens, budget.load.attended) == (4, 6, 10 + 6 * 3.5)


def test_the_prefill_share_holds_only_beside_decoding() -> None:
    assert make(prefill_share=0.25).chunk(10_000, 0) == 250
    assert make(prefill_share=0.25, decoding=False).chunk(10_000, 0) == 1000
    assert make(prefill_share=0.0001).chunk(10_000, 0) == 1, "prompts never starve"


def test_stages_divide_prompts_and_decode_rows() -> None:
    budget = make(max_in_flight=4, prefill=1600)
    assert budget.chunk(1600, 0) == 1600 / (4 * SLICES)
    assert 2.0 < budget.share < 2.5, "a quarter of 10 rows of cost 1: a third row is taken while any is left, no fourth"


def test_slices_are_not_smaller_than_they_are_worth() -> None:
    assert make(max_in_flight=4, prefill=80).chunk(80, 0) == MIN_SLICE
    dear_steps = linear_cost(base_s=0.03)  # as long as 300 prompt tokens take
    assert 290 <= make(cost=dear_steps, max_in_flight=4, prefill=1000).chunk(1000, 0) <= 310


def test_the_time_limit_cuts_prefill_to_what_fits_beside_decoding() -> None:
    budget = make(cost=linear_cost(), inter_token_limit_s=0.03)
    assert 180 <= budget.chunk(900, 0) <= 205
    budget.take_prefill(150, 0)
    assert 30 <= budget.chunk(900, 0) <= 55


def test_plans_in_flight_share_the_time_limit() -> None:
    budget = make(cost=linear_cost(), inter_token_limit_s=0.06, max_in_flight=2, prefill=10_000)
    assert 180 <= budget.chunk(900, 0) <= 205


def test_when_decoding_alone_exceeds_the_limit_prompts_go_on_slowly() -> None:
    budget = make(cost=linear_cost(base_s=0.1), inter_token_limit_s=0.03)
    assert budget.chunk(900, 0) == MIN_PREFILL
    budget.take_prefill(MIN_PREFILL, 0)
    assert budget.chunk(900, 0) == 0


def test_without_data_a_small_probe_runs_beside_decoding() -> None:
    budget = make(inter_token_limit_s=0.03)
    assert budget.chunk(900, 0) == PROBE
    assert make(inter_token_limit_s=0.03, decoding=False).chunk(900, 0) == 900
