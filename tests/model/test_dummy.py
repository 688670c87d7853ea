"""Dummy weights: one model whatever the layout, and one the decoder computes finite logits with."""

import pytest
import torch

from shoal.configs.schema import ParallelConfig
from shoal.model.dummy import SLAB_ELEMENTS, dummy_parameters
from shoal.model.parameters import local_parameters
from shoal.model.shard import shard_model
from shoal.model.spec import Attention, DecoderSpec, GatedFfn, Layer, MoeFfn, Norm, QkNorm

NORM = Norm(kind="rms", eps=1e-6)
OFFSET = Norm(kind="rms", eps=1e-6, unit_offset=True)
CPU = torch.device("cpu")


def make_spec() -> DecoderSpec:
    """Two layers, one of them with experts; 6 query heads on 2."""
    mixer = Attention(
        num_heads=6,
        num_kv_heads=2,
        head_dim=8,
        scale=0.3,
        qkv_bias=True,
        sinks=True,
        qk_norm=QkNorm(norm=NORM, per_head=False),
    )
    gated = GatedFfn(intermediate_size=40, activation="silu", bias=True)
    moe = MoeFfn(
        num_experts=7,
        top_k=2,
        intermediate_size=24,
        activation="silu",
        normalize_top_k=True,
        shared=GatedFfn(intermediate_size=16, activation="silu"),
        shared_gate=True,
    )
    layers = [Layer(mixer=mixer, ffn=ffn, pre_mixer_norm=NORM, pre_ffn_norm=OFFSET) for ffn in (gated, moe)]
    return DecoderSpec(
        family="test",
        vocab_size=50,
        hidden_size=32,
        layers=layers,
        final_norm=NORM,
        max_position=64,
        dtype="float32",
        tie_embeddings=True,
    )


def logical_values(spec: DecoderSpec, parallel: ParallelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """The logical parameters put together from all ranks; every rank that holds an element must agree."""
    whole: dict[str, torch.Tensor] = {}
    for shard in shard_model(spec, parallel):
        params = dummy_parameters(spec, shard, torch.float32, CPU, seed)
        for parameter in local_parameters(spec, shard):
            for part in parameter.parts:
                stops = [stop for _, stop in part.source]
                known = whole.get(part.logical)
                shape = stops if known is None else [max(a, b) for a, b in zip(stops, known.shape)]
                grown = torch.full(shape, float("nan"))
                if known is not None:
                    grown[tuple(slice(0, size) for size in known.shape)] = known
                target = grown[tuple(slice(*bounds) for bounds in part.source)]
                values = params[parameter.name][tuple(slice(*bounds) for bounds in part.dest)].reshape(target.shape)
                assert torch.equal(target[~target.isnan()], values[~target.isnan()]), part.logical
                target.copy_(values)
                whole[part.logical] = grown
    return whole


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(tensor=2),
        ParallelConfig(tensor=4, pipeline=2),
        ParallelConfig(tensor=3, tensor_weights=[2.0, 1.0, 1.0]),
        ParallelConfig(tensor=2, expert=True),
    ],
)
def test_every_layout_holds_slices_of_one_model(parallel: ParallelConfig) -> None:
    spec = make_spec()
    one, many = logical_values(spec, ParallelConfig()), logical_values(spec, parallel)
    assert one.keys() == many.keys()
    for name, values in one.items():
        assert torch.equal(many[name], values) and values.isfinite().all(), name


def test_values_depend_on_seed_and_name_and_are_of_unit_gain() -> None:
    spec = make_spec()
    first, other = logical_values(spec, ParallelConfig()), logical_values(spec, ParallelConfig(), seed=7)
    name = "layers.0.ffn.up.weight"
    assert not torch.equal(first[name], other[name])
    assert not torch.equal(first[name], first["layers.0.ffn.gate.weight"])
    assert first[name].std() * spec.hidden_size**0.5 == pytest.approx(1.0, abs=0.1)
    assert first[name].unique(dim=0).shape[0] == first[name].shape[0]
    assert (first["layers.0.pre_mixer_norm.weight"] == 1).all() and (first["layers.0.pre_ffn_norm.weight"] == 0).all()


def test_slabs_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = make_spec()
    whole = logical_values(spec, ParallelConfig())
    assert SLAB_ELEMENTS > 64
    monkeypatch.setattr("shoal.model.dummy.SLAB_ELEMENTS", 64)
    sliced = logical_values(spec, ParallelConfig())
    assert all(torch.equal(whole[name], sliced[name]) for name in whole)
