"""Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

The number of a token depends only on (seed; absolute output position, sample index, token id, purpose): not on the
batch, the vocabulary shard or the device. Four neighbouring token ids share one counter and take its four lanes.

    counter = (token_id // 4, position, sample_index, purpose)    key = (seed low, seed high)    lane = token_id % 4

The noise is -log(-log u) of 32 bits u. torch's path computes it in float64; the C path (kernels/native/gumbel.c),
seven times as fast, in float32 to about 1e-6, the same for a token alone and in a whole vocabulary.
"""

import torch

from shoal.kernels.build import NativeLibrary, native_library
from shoal.kernels.native_types import INT, INT64, POINTER

MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
MASK = 0xFFFFFFFF
_PROTOTYPE = (POINTER, POINTER, POINTER, INT64, POINTER, INT64, INT64, INT64, POINTER, INT)

PURPOSE_SAMPLE = 0
"""Gumbel noise of the token that is sampled; other purposes (speculation) take other values."""


def philox_reference(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """One block of Philox4x32-10 in plain integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = MULTIPLIER_0 * c0, MULTIPLIER_1 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK, (p0 >> 32) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + WEYL_0) & MASK, (k1 + WEYL_1) & MASK
    return c0, c1, c2, c3


def philox(counter: tuple[torch.Tensor, ...], key: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Philox4x32-10 on tensors that broadcast together; int64 holding 32-bit values. Returns [..., 4] int64 in [0,
    2**32).

    The 64-bit products wrap in int64, which keeps their bits; shifting and masking reads both halves.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * MULTIPLIER_0, c2 * MULTIPLIER_1
        c0, c1 = ((p1 >> 32) & MASK) ^ c1 ^ k0, p1 & MASK
        c2, c3 = ((p0 >> 32) & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + WEYL_0) & MASK, (k1 + WEYL_1) & MASK
    return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), dim=-1)


def gumbel_noise(
    seeds_R: torch.Tensor,
    positions_R: torch.Tensor,
    sample_indices_R: torch.Tensor,
    vocab_start: int,
    vocab_stop: int,
    purpose: int = PURPOSE_SAMPLE,
) -> torch.Tensor:
    """Standard Gumbel noise of the tokens [vocab_start, vocab_stop): [num_rows, vocab_stop - vocab_start] float32.

    seeds_R, positions_R, sample_indices_R: [num_rows] int64 (seeds may use all 64 bits).
    """
    library = native_library() if seeds_R.is_cpu else None
    if library is not None:
        return _native(library, (seeds_R, positions_R, sample_indices_R), None, vocab_start, vocab_stop, purpose)
    first, last = vocab_start // 4, (vocab_stop + 3) // 4
    quads = torch.arange(first, last, device=seeds_R.device).unsqueeze(0)
    bits = quad_bits(seeds_R, positions_R, sample_indices_R, quads, purpose).flatten(1)
    return to_gumbel(bits[:, vocab_start - 4 * first : vocab_stop - 4 * first])


def gumbel_noise_at(
    seeds_R: torch.Tensor,
    positions_R: torch.Tensor,
    sample_indices_R: torch.Tensor,
    token_ids_RK: torch.Tensor,
    purpose: int = PURPOSE_SAMPLE,
) -> torch.Tensor:
    """The noise of chosen tokens only, equal to gumbel_noise there: [num_rows, count] float32.

    token_ids_RK: [num_rows, count] int64. For a few tokens of a large vocabulary this is far cheaper.
    """
    library = native_library() if seeds_R.is_cpu else None
    if library is not None:
        counter = seeds_R, positions_R, sample_indices_R
        return _native(library, counter, token_ids_RK.contiguous(), 0, token_ids_RK.shape[1], purpose)
    bits = quad_bits(seeds_R, positions_R, sample_indices_R, token_ids_RK >> 2, purpose)
    return to_gumbel(bits.gather(-1, (token_ids_RK & 3).unsqueeze(-1)).squeeze(-1))


def _native(
    library: NativeLibrary,
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    ids: torch.Tensor | None,
    start: int,
    stop: int,
    purpose: int,
) -> torch.Tensor:
    seeds, positions, samples = (numbers.contiguous() for numbers in counter)
    assert seeds.dtype == positions.dtype == samples.dtype == torch.int64
    out = torch.empty(len(seeds), stop - start)
    library.function("shoal_gumbel", _PROTOTYPE)(
        seeds.data_ptr(), positions.data_ptr(), samples.data_ptr(), len(seeds), None if ids is None else ids.data_ptr(),
        start, stop - start, purpose, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def quad_bits(
    seeds_R: torch.Tensor, positions_R: torch.Tensor, sample_indices_R: torch.Tensor, quads: torch.Tensor, purpose: int
) -> torch.Tensor:
    """The four lanes of every counter: [num_rows, num_quads, 4]. quads: [1 or num_rows, num_quads], token id // 4."""
    counter = (
        quads,
        (positions_R & MASK).unsqueeze(1),
        (sample_indices_R & MASK).unsqueeze(1),
        torch.tensor(purpose, device=quads.device),
    )
    return philox(counter, ((seeds_R & MASK).unsqueeze(1), ((seeds_R >> 32) & MASK).unsqueeze(1)))


def to_gumbel(bits: torch.Tensor) -> torch.Tensor:
    """Uniform 32-bit integers as standard Gumbel numbers, float32."""
    uniform = (bits.to(torch.float64) + 0.5) * 2.0**-32
    return uniform.log_().neg_().log_().neg_().float()
