"""CostModel: learns what steps cost, never extrapolates to a gain, shrugs off outliers."""

import random

import pytest

from shoal.engine.cost_model import MIN_OBSERVATIONS, CostModel, StepLoad


def seconds(load: StepLoad) -> float:
    return 0.004 + 0.0001 * load.decode_rows + 0.00002 * load.prefill_tokens + 1e-8 * load.attended


def random_load(rng: random.Random) -> StepLoad:
    load = StepLoad()
    for _ in range(rng.randrange(0, 40)):
        load.add(1, rng.randrange(2000))
    for _ in range(rng.randrange(0, 3)):
        load.add(rng.randrange(2, 500), rng.randrange(2000))
    return load


def taught(num_steps: int = 1000) -> tuple[CostModel, random.Random]:
    rng, model = random.Random(0), CostModel()
    for _ in range(num_steps):
        load = random_load(rng)
        model.observe(load, seconds(load) * rng.uniform(0.97, 1.03))
    return model, rng


def test_it_counts_what_attention_reads() -> None:
    load = StepLoad()
    load.add(1, 10)
    load.add(3, 4)
    assert (load.decode_rows, load.prefill_tokens, load.attended) == (1, 3, 11 + 5 + 6 + 7)


def test_it_learns_the_cost_of_steps() -> None:
    model, rng = taught()
    for _ in range(100):
        load = random_load(rng)
        assert model.seconds(load) == pytest.approx(seconds(load), rel=0.15)


def test_it_is_not_ready_without_data() -> None:
    model = CostModel()
    assert not model.ready
    assert model.row_cost(5, 100) == 5.0
    for _ in range(MIN_OBSERVATIONS):
        model.observe(StepLoad(decode_rows=1), 0.01)
    assert model.ready


def test_costs_are_never_negative() -> None:
    rng, model = random.Random(1), CostModel()
    for _ in range(200):
        model.observe(random_load(rng), rng.random())
        load = random_load(rng)
        assert model.seconds(load) >= 0.0
        assert model.row_cost(1, 500) > 0.0


def test_prefill_within_a_time_takes_that_time() -> None:
    model, _ = taught()
    for num_computed in (0, 1000, 50_000):
        count = model.prefill_tokens_within(0.01, num_computed)
        load = StepLoad()
        load.add(count, num_computed)
        assert model.seconds(load) - model.seconds(StepLoad()) == pytest.approx(0.01, rel=0.05)
        assert model.prefill_tokens_within(0.0, num_computed) == 0
    assert model.prefill_tokens_within(1.0, 0) > model.prefill_tokens_within(1.0, 50_000)


def test_a_model_that_saw_no_prefill_does_not_limit_it() -> None:
    model = CostModel()
    model.observe(StepLoad(decode_rows=4), 0.01)
    assert model.prefill_tokens_within(0.001, 0) >= 0


def test_one_outlier_changes_little() -> None:
    model, rng = taught()
    load = random_load(rng)
    before = model.seconds(load)
    model.observe(load, 100.0)
    assert model.seconds(load) < 2 * before


def test_it_follows_a_machine_that_becomes_slower() -> None:
    model, rng = taught()
    for _ in range(300):
        load = random_load(rng)
        model.observe(load, 5 * seconds(load))
    load = random_load(rng)
    assert model.seconds(load) == pytest.approx(5 * seconds(load), rel=0.3)
