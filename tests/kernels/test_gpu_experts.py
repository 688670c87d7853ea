"""The Triton mixture of experts: routing, alignment, grouped products and their sum, against the loop over experts."""

import pytest
import torch

from shoal.kernels.activation import KINDS, gated_activation_reference
from shoal.kernels.fp8_weight import Fp8ChannelWeight
from shoal.kernels.moe_routing import moe_routing_reference
from shoal.kernels.span_weight import SpanWeight
from tests.kernels.gpu_support import DEVICE, DTYPES, close, poisoned_empty, random  # noqa: F401

from shoal.kernels.gpu.experts import grouped_mm_experts, launch_experts  # isort: skip
from shoal.kernels.gpu.moe_align import launch_moe_align  # isort: skip
from shoal.kernels.gpu.moe_combine import launch_moe_combine  # isort: skip
from shoal.kernels.gpu.moe_routing import launch_moe_routing  # isort: skip

pytestmark = pytest.mark.usefixtures("poisoned_empty")
TOKENS, EXPERTS, TOP_K, HIDDEN, COLUMNS = 21, 7, 3, 40, 18


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def routing(num_tokens: int = TOKENS) -> tuple[torch.Tensor, torch.Tensor]:
    weights, ids = moe_routing_reference(random(num_tokens, EXPERTS).cpu(), TOP_K, normalize=True)
    return weights.to(DEVICE), ids.to(DEVICE)


def expert_weights(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return random(EXPERTS, 2 * COLUMNS, HIDDEN, dtype=dtype) / 8, random(EXPERTS, HIDDEN, COLUMNS, dtype=dtype) / 4


def reference(x, gate_up, down, weights, ids, first: int) -> torch.Tensor:
    out = torch.zeros(x.shape, device=x.device)
    for token, row in enumerate(ids.tolist()):
        for choice, expert in enumerate(row):
            if first <= expert < first + len(gate_up):
                hidden = gated_activation_reference(x[token].float() @ gate_up[expert - first].float().t(), "silu")
                out[token] += weights[token, choice] * (hidden @ down[expert - first].float().t())
    return out


@pytest.mark.parametrize("normalize", [True, False])
def test_routing_takes_the_lowest_expert_among_equals(normalize: bool) -> None:
    logits = random(9, EXPERTS)
    logits[3] = 0.5
    logits[4, :] = torch.tensor([1.0, 3.0, 3.0, 0.0, 3.0, 2.0, 2.0])
    weights, ids = launch_moe_routing(logits, 4, normalize=normalize)
    expected_weights, expected_ids = moe_routing_reference(logits.cpu(), 4, normalize=normalize)
    assert torch.equal(ids.cpu(), expected_ids) and ids[3].tolist() == [0, 1, 2, 3] and ids[4].tolist() == [1, 2, 4, 5]
    close(weights.cpu(), expected_weights)
    assert launch_moe_routing(logits[:0], 2, normalize=normalize)[1].shape == (0, 2)


@pytest.mark.parametrize(("first", "count"), [(0, EXPERTS), (2, 3), (4, 0)])
@pytest.mark.parametrize("block_rows", [1, 16])
def test_alignment_lists_each_experts_assignments_in_rising_order(first: int, count: int, block_rows: int) -> None:
    _, ids = routing()
    order, tile_experts, counts, num_tiles, none, _ = launch_moe_align(ids, first, count, block_rows)
    flat, place, tile = ids.flatten().tolist(), 0, 0
    for expert in range(count):
        mine = [number for number, chosen in enumerate(flat) if chosen == first + expert]
        tiles = -(-len(mine) // block_rows)
        padded = mine + [none] * (tiles * block_rows - len(mine))
        assert order[place : place + len(padded)].tolist() == padded and counts[expert] == len(mine)
        assert tile_experts[tile : tile + tiles].tolist() == [expert] * tiles
        place, tile = place + len(padded), tile + tiles
    assert int(num_tiles) == tile <= len(tile_experts)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("first", "last"), [(0, EXPERTS), (2, 5), (3, 3)])
def test_experts_match_the_loop(dtype: torch.dtype, first: int, last: int) -> None:
    gate_up, down = (weight[first:last] for weight in expert_weights(dtype))
    x, (weights, ids) = random(TOKENS, HIDDEN, dtype=dtype), routing()
    got = launch_experts(x, gate_up, down, weights, ids, first, KINDS["silu"], deterministic=False)
    assert got.dtype == dtype
    close(got, reference(x, gate_up, down, weights, ids, first), times=4)
    assert launch_experts(x[:0], gate_up, down, weights[:0], ids[:0], first, 1, deterministic=True).shape == (0, HIDDEN)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "lead"), [(8, 0), (8, 5), (4, 0), (4, 5)])
def test_experts_of_few_bits_match_the_loop_over_their_values(dtype: torch.dtype, bits: int, lead: int) -> None:
    stacks = []
    for weight, first in zip(expert_weights(dtype), (0, lead), strict=True):
        stack = SpanWeight.zeros(weight.shape, bits, first, dtype=dtype, device=DEVICE)
        for one, values in zip(stack.unstacked(), weight, strict=True):
            one.put(0, torch.nn.functional.pad(values, (first, 0)))
        stacks.append(stack)
    values = [torch.stack([one.rows(torch.arange(one.shape[0])) for one in stack.unstacked()]) for stack in stacks]
    x, (weights, ids) = random(TOKENS, HIDDEN, dtype=dtype), routing()
    for deterministic in (False, True):
        got = launch_experts(x, stacks[0], stacks[1], weights, ids, 0, KINDS["silu"], deterministic=deterministic)
        close(got, reference(x, values[0], values[1], weights, ids, 0), times=6)


@pytest.mark.parametrize("bits", [8, 4])
def test_experts_of_few_bits_and_whole_spans(bits: int) -> None:
    x, (weights, ids), stacks = random(TOKENS, 256), routing(), []
    for shape in ((EXPERTS, 2 * 128, 256), (EXPERTS, 256, 128)):
        stack = SpanWeight.zeros(shape, bits, 0, dtype=torch.float32, device=DEVICE)
        for one in stack.unstacked():
            one.put(0, random(*one.shape) / 16)
        stacks.append(stack)
    values = [torch.stack([one.rows(torch.arange(one.shape[0])) for one in stack.unstacked()]) for stack in stacks]
    got = launch_experts(x, *stacks, weights, ids, 0, KINDS["silu"], deterministic=False)
    close(got, reference(x, *values, weights, ids, 0), times=6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", [0, 3])
def test_experts_in_fp8_match_the_loop_over_rounded_values(dtype: torch.dtype, first: int) -> None:
    stacks: list[Fp8ChannelWeight] = []
    for weight in expert_weights(dtype):
        stack = Fp8ChannelWeight(weight[first:].shape, 0, dtype=dtype, device=DEVICE)
        for one, values in zip(stack.unstacked(), weight[first:], strict=True):
            one.put(0, values)
        stacks.append(stack)
    x, (weights, ids) = random(TOKENS, HIDDEN, dtype=dtype), routing()
    want = torch.zeros(x.shape, device=DEVICE)
    for expert, (up, down) in enumerate(zip(*(stack.unstacked() for stack in stacks), strict=True), first):
        tokens, choices = (ids == expert).nonzero(as_tuple=True)
        hidden = gated_activation_reference(up.multiply(x[tokens], None, deterministic=True).float(), "silu")
        want[tokens] += weights[tokens, choices, None] * down.multiply(hidden.to(dtype), None, deterministic=True)
    got = launch_experts(x, stacks[0], stacks[1], weights, ids, first, KINDS["silu"], deterministic=True)
    assert (got.float() - want).norm() / want.norm() < 0.01  # an input between two codes may go either way


@pytest.mark.usefixtures("dots_in_one_order")
def test_a_tokens_bits_depend_on_nothing_but_the_token() -> None:
    (gate_up, down), x, (weights, ids) = expert_weights(), random(TOKENS, HIDDEN), routing()
    whole = launch_experts(x, gate_up, down, weights, ids, 0, 1, deterministic=True)
    for rows in (slice(0, 1), slice(5, 21)):
        part = launch_experts(x[rows], gate_up, down, weights[rows], ids[rows], 0, 1, deterministic=True)
        assert torch.equal(part, whole[rows])


@pytest.mark.parametrize(("first", "last"), [(0, EXPERTS), (2, 5)])
def test_products_of_grouped_mm(first: int, last: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, (weights, ids) = random(TOKENS, HIDDEN), routing()
    gate_up, down = (weight[first:last] for weight in expert_weights())
    if DEVICE.type == "cpu":
        monkeypatch.setattr(torch.nn.functional, "grouped_mm", grouped_mm_loop)
    else:
        x, gate_up, down = x.bfloat16(), gate_up.bfloat16(), down.bfloat16()
    y = grouped_mm_experts(x, gate_up, down, ids, first, KINDS["silu"])
    got = launch_moe_combine(y, weights, ids, first, last - first)
    close(got, reference(x, gate_up, down, weights, ids, first), times=4)


def test_grouped_mm_does_what_it_documents() -> None:
    x, weights = random(11, 16, dtype=torch.bfloat16), random(3, 8, 16, dtype=torch.bfloat16).transpose(1, 2)
    ends = torch.tensor([4, 4, 9], dtype=torch.int32, device=DEVICE)
    got = torch.nn.functional.grouped_mm(x, weights, offs=ends)[:9]
    torch.testing.assert_close(got, grouped_mm_loop(x, weights, offs=ends)[:9], rtol=1e-2, atol=1e-2)


def grouped_mm_loop(x: torch.Tensor, weights: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
    """What grouped_mm documents: rows up to each end times that weight, rows after the last undefined."""
    assert offs.dtype == torch.int32
    y, start = x.new_full((len(x), weights.shape[2]), float("nan")), 0
    for weight, end in zip(weights, offs.tolist(), strict=True):
        y[start:end] = x[start:end] @ weight
        start = end
    return y
