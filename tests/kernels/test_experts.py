"""Routed experts in C: near the float32 reference, independent of the other tokens, right about absent experts."""

import pytest
import torch

from shoal.kernels import experts as module
from shoal.kernels.build import native_library
from shoal.kernels.experts import NativeExperts, experts_reference
from shoal.kernels.weight import PackedWeight

EXPERTS, TOP_K, HIDDEN, INNER = 7, 3, 45, 27
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def draw(tokens: int, dtype: torch.dtype):
    """x, weights, ids, gate_up and down of every expert."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
    scores = torch.rand(tokens, EXPERTS, generator=generator)
    weights, ids = scores.topk(TOP_K, dim=-1)
    gate_up = (torch.randn(EXPERTS, 2 * INNER, HIDDEN, generator=generator) * 0.15).to(dtype)
    down = (torch.randn(EXPERTS, HIDDEN, INNER, generator=generator) * 0.2).to(dtype)
    return x, weights, ids, gate_up, down


def make(gate_up: torch.Tensor, down: torch.Tensor, first: int = 0, stop: int = EXPERTS) -> NativeExperts:
    library = native_library()
    if library is None:
        pytest.skip("no C compiler here")
    packed = ([PackedWeight(library, weight) for weight in stack[first:stop]] for stack in (gate_up, down))
    return NativeExperts(library, *packed, first, "silu")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("tokens", [0, 1, 2, 50])
def test_equals_the_reference(dtype, tokens):
    x, weights, ids, gate_up, down = draw(tokens, dtype)
    got = make(gate_up, down)(x, weights, ids)
    want = experts_reference(x, weights, ids, list(gate_up), list(down), "silu")
    assert got.dtype == dtype and torch.allclose(got.float(), want, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_ranges_of_experts_add_up():
    x, weights, ids, gate_up, down = draw(20, torch.float32)
    whole = make(gate_up, down)(x, weights, ids)
    parts = [make(gate_up, down, first, stop)(x, weights, ids) for first, stop in ((0, 2), (2, 3), (3, EXPERTS))]
    assert torch.allclose(sum(parts), whole, atol=1e-5)
    nowhere = (ids >= 2).all(-1)
    assert nowhere.any() and (parts[0][nowhere] == 0).all()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_tokens_bits_depend_on_nothing_but_the_token(dtype, monkeypatch):
    x, weights, ids, gate_up, down = draw(40, dtype)
    experts = make(gate_up, down)
    whole = experts(x, weights, ids)
    assert torch.equal(torch.cat([experts(x[i : i + 1], weights[i : i + 1], ids[i : i + 1]) for i in range(40)]), whole)
    order = torch.randperm(TOP_K)
    assert torch.equal(experts(x, weights[:, order], ids[:, order]), whole)
    monkeypatch.setattr(module, "SLICE_PAIRS", 20)
    assert torch.equal(experts(x, weights, ids), whole)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(experts(x, weights, ids), whole)
    finally:
        torch.set_num_threads(before)
