"""Rotary frequencies against transformers' own, for every kind of scaling, and the table they are looked up in."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from shoal.model.rotary import FIRST_POSITIONS, RotaryTable, rope_angles
from shoal.model.spec import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rope,
    RopeScaling,
    YarnScaling,
)

SHORT, LONG = [1.0 + 0.1 * i for i in range(8)], [2.0 + 0.5 * i for i in range(8)]
MSCALE = {"mscale": 0.7, "mscale_all_dim": 1.3}
CASES: dict[str, tuple[RopeScaling, dict[str, Any]]] = {
    "linear": (LinearScaling(factor=3.0), {"factor": 3.0}),
    "llama3": (
        Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=64),
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    ),
    "yarn": (
        YarnScaling(factor=4.0, original_max_position=128),
        {"factor": 4.0, "original_max_position_embeddings": 128},
    ),
    "yarn-mscale": (
        YarnScaling(factor=4.0, original_max_position=64, beta_fast=20.0, beta_slow=2.0, truncate=False, **MSCALE),
        {
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 20.0,
            "beta_slow": 2.0,
            "truncate": False,
            **MSCALE,
        },
    ),
    "yarn-given": (
        YarnScaling(factor=40.0, original_max_position=4096, attention_factor=0.9),
        {"factor": 40.0, "original_max_position_embeddings": 4096, "attention_factor": 0.9},
    ),
    "dynamic": (DynamicScaling(factor=4.0, original_max_position=256), {"factor": 4.0}),
    "longrope": (
        LongRopeScaling(short_factor=SHORT, long_factor=LONG, original_max_position=64, attention_factor=1.19),
        {
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "short_factor": SHORT,
            "long_factor": LONG,
            "attention_factor": 1.19,
        },
    ),
}


def theirs(name: str, fields: dict[str, Any], seq_len: int | None = None) -> tuple[torch.Tensor, float]:
    """transformers' frequencies and attention factor for head_dim 16, context length 256."""
    kind = name.split("-")[0]
    config = LlamaConfig(
        head_dim=16, max_position_embeddings=256, rope_parameters={"rope_type": kind, "rope_theta": 500.0, **fields}
    )
    length = None if seq_len is None else torch.tensor(seq_len)
    return ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)


def rope(scaling: RopeScaling | None) -> Rope:
    """A Rope of the sizes above."""
    return Rope(theta=500.0, rotary_dim=16, max_position=256, scaling=scaling)


@pytest.mark.parametrize("name", [name for name in CASES if name != "dynamic"])
def test_angles_equal_transformers_to_the_bit(name: str) -> None:
    scaling, fields = CASES[name]
    frequencies, factor = theirs(name, fields)
    positions = torch.tensor([0, 1, 63, 200])
    angles, ours = rope_angles(rope(scaling), positions, max_model_len=64)
    assert torch.equal(angles, positions[:, None].float() * frequencies) and ours == pytest.approx(factor, abs=1e-12)


def test_longrope_takes_the_long_factors_when_sequences_may_exceed_the_original_length() -> None:
    scaling, fields = CASES["longrope"]
    positions = torch.tensor([3, 63, 64, 200])
    for max_model_len, seq_len in [(64, 64), (65, 65), (256, 65)]:
        frequencies, _ = theirs("longrope", fields, seq_len)
        angles, _ = rope_angles(rope(scaling), positions, max_model_len)
        assert torch.equal(angles, positions[:, None].float() * frequencies)


def test_dynamic_ntk_rotates_a_position_as_the_last_of_its_sequence() -> None:
    scaling, fields = CASES["dynamic"]
    positions = torch.tensor([0, 100, 255, 256, 257, 700])
    angles, factor = rope_angles(rope(scaling), positions, max_model_len=1024)
    assert factor == 1.0
    for row, position in enumerate(positions.tolist()):
        frequencies, _ = theirs("dynamic", fields, position + 1)
        torch.testing.assert_close(angles[row], position * frequencies, rtol=1e-6, atol=0)


def test_a_table_grows_without_changing_a_row() -> None:
    limit = FIRST_POSITIONS * 3
    table = RotaryTable(rope(CASES["yarn"][0]), limit, torch.device("cpu"))
    positions = torch.tensor([0, 5, FIRST_POSITIONS - 1])
    before = table.lookup(positions, FIRST_POSITIONS)
    last = table.lookup(torch.tensor([limit - 1]), limit)
    assert torch.equal(table.lookup(positions, FIRST_POSITIONS), before)
    angles, factor = rope_angles(table.rope, torch.tensor([limit - 1]), limit)
    assert torch.equal(last, torch.cat([angles.cos() * factor, angles.sin() * factor], dim=-1))
