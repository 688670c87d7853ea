"""Frequencies of rotary positions, and the table of cosines and sines a stage looks them up in.

Scaled kinds follow transformers' float32 arithmetic step by step, so that logits agree: linear, dynamic NTK, llama3
(Llama 3.1), yarn (arXiv:2309.00071), longrope (arXiv:2402.13753).

Two of them depend on the sequence's length in transformers, where a forward rotates all its new tokens with the
frequencies of the longest position in it, while cached keys keep the rotation they were written with: results then
depend on how a prompt was cut. Here a position's rotation never depends on the chunk, the batch or a cache hit:
- dynamic: position p uses the frequencies of length p + 1. This is what transformers does for a sequence that starts
  within the original length and grows token by token. A prompt longer than that, which transformers rotates by its
  whole length, differs.
- longrope: the long factors when the engine's longest sequence (max_model_len) exceeds the original length, else the
  short ones. This is what transformers does when max_model_len is at most the original length, and for sequences
  longer than it.
"""

import math

import torch

from shoal.model.spec import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    Rope,
    YarnScaling,
)

FIRST_POSITIONS = 4096  # rows a table starts with; it doubles as longer sequences come


def plain_frequencies(rope: Rope, theta: float | torch.Tensor | None = None) -> torch.Tensor:
    """theta ** -(2i / rotary_dim). theta: another base than the rope's, a number or [n, 1]. Returns float32 [(n,)
    rotary_dim / 2].
    """
    exponents = torch.arange(0, rope.rotary_dim, 2, dtype=torch.int64).float() / rope.rotary_dim
    base = rope.theta if theta is None else theta
    return 1.0 / (base**exponents)


def linear_frequencies(rope: Rope, scaling: LinearScaling) -> torch.Tensor:
    """All frequencies divided by the factor."""
    return plain_frequencies(rope) / scaling.factor


def llama3_frequencies(rope: Rope, scaling: Llama3Scaling) -> torch.Tensor:
    """Long wavelengths divided by the factor, short ones kept, a smooth passage between."""
    plain, old_length = plain_frequencies(rope), scaling.original_max_position
    wavelengths = 2 * math.pi / plain
    longest, shortest = old_length / scaling.low_freq_factor, old_length / scaling.high_freq_factor
    scaled = torch.where(wavelengths > longest, plain / scaling.factor, plain)
    smooth = (old_length / wavelengths - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    between = (1 - smooth) * scaled / scaling.factor + smooth * scaled
    return torch.where(~(wavelengths < shortest) & ~(wavelengths > longest), between, scaled)


def yarn_frequencies(rope: Rope, scaling: YarnScaling) -> torch.Tensor:
    """Interpolated where a dimension turns less than beta_slow times over the original length, kept above beta_fast
    turns.
    """
    dim, base = rope.rotary_dim, rope.theta

    def turning_dim(turns: float) -> float:
        return (dim * math.log(scaling.original_max_position / (turns * 2 * math.pi))) / (2 * math.log(base))

    low, high = turning_dim(scaling.beta_fast), turning_dim(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    kept = 1 - torch.clamp((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1)
    powers = base ** (torch.arange(0, dim, 2).float() / dim)
    return 1.0 / (scaling.factor * powers) * (1 - kept) + 1.0 / powers * kept


def yarn_attention_factor(scaling: YarnScaling) -> float:
    """What cosines and sines are multiplied by: given, or from mscale and mscale_all_dim, or 0.1 ln(factor) + 1."""

    def mscale(weight: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * weight * math.log(scaling.factor) + 1.0

    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return mscale(scaling.mscale) / mscale(scaling.mscale_all_dim)
    return mscale(1.0)


def longrope_frequencies(rope: Rope, scaling: LongRopeScaling, max_model_len: int) -> torch.Tensor:
    """Every frequency divided by its own factor, from the long or the short list."""
    factors = scaling.long_factor if max_model_len > scaling.original_max_position else scaling.short_factor
    exponents = torch.arange(0, rope.rotary_dim, 2, dtype=torch.int64).float() / rope.rotary_dim
    return 1.0 / (torch.tensor(factors, dtype=torch.float32) * rope.theta**exponents)


def dynamic_frequencies(rope: Rope, scaling: DynamicScaling, positions: torch.Tensor) -> torch.Tensor:
    """Row by row those of length position + 1: the base grows beyond the original length. Returns [n, rotary_dim /
    2].
    """
    dim, factor, original = rope.rotary_dim, scaling.factor, scaling.original_max_position
    lengths = torch.clamp(positions + 1, min=original)
    growth = ((factor * lengths / original) - (factor - 1)) ** (dim / (dim - 2))
    return plain_frequencies(rope, theta=(rope.theta * growth)[:, None])


def rope_angles(rope: Rope, positions: torch.Tensor, max_model_len: int) -> tuple[torch.Tensor, float]:
    """Angles of positions ([n] int64) as [n, rotary_dim / 2] float32, and the factor of their cosines and sines."""
    scaling = rope.scaling
    if isinstance(scaling, DynamicScaling):
        return positions[:, None].float() * dynamic_frequencies(rope, scaling, positions), 1.0
    if isinstance(scaling, LinearScaling):
        frequencies, factor = linear_frequencies(rope, scaling), 1.0
    elif isinstance(scaling, Llama3Scaling):
        frequencies, factor = llama3_frequencies(rope, scaling), 1.0
    elif isinstance(scaling, YarnScaling):
        frequencies, factor = yarn_frequencies(rope, scaling), yarn_attention_factor(scaling)
    elif isinstance(scaling, LongRopeScaling):
        frequencies, factor = longrope_frequencies(rope, scaling, max_model_len), scaling.attention_factor
    else:
        frequencies, factor = plain_frequencies(rope), 1.0
    return positions[:, None].float() * frequencies, factor


class RotaryTable:
    """cos and sin of every position of one Rope, float32, made on the CPU and kept on the stage's device; grows by
    doubling, unless it is whole from the beginning: then it stays where CUDA graphs have seen it.
    """

    def __init__(self, rope: Rope, max_model_len: int, device: torch.device, *, whole: bool = False) -> None:
        self.rope, self.max_model_len, self.device = rope, max_model_len, device
        self._count = max_model_len if whole else min(FIRST_POSITIONS, max_model_len)
        self._table = self._make(self._count)

    def _make(self, count: int) -> torch.Tensor:
        angles, factor = rope_angles(self.rope, torch.arange(count), self.max_model_len)
        return torch.cat([angles.cos() * factor, angles.sin() * factor], dim=-1).to(self.device)

    def lookup(self, positions_T: torch.Tensor, length: int) -> torch.Tensor:
        """Rows of positions ([num_tokens] int64, all below length and max_model_len). Returns [num_tokens, rotary_dim]:
        cosines, then sines.
        """
        return self.up_to(length).index_select(0, positions_T)

    def up_to(self, length: int) -> torch.Tensor:
        """All rows, `length` or max_model_len at least: [positions, rotary_dim]. Another tensor when it had to grow."""
        length = min(length, self.max_model_len)
        if length > self._count:
            self._count = max(length, min(2 * self._count, self.max_model_len))
            self._table = self._make(self._count)
        return self._table
