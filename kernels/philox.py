"""Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

The number of a token depends only on (seed; absolute output position, sample index, token id, purpose): not on the
batch, the vocabulary shard or the device. Four neighbouring token ids share one counter and take its four lanes.

    counter = (token_id // 4, position, sample_index, purpose)    key = (seed low, seed high)    lane = token_id % 4
"""

import torch

MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
MASK = 0xFFFFFFFF

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
    first, last = vocab_start // 4, (vocab_stop + 3) // 4
    device = seeds_R.device
    quads = torch.arange(first, last, device=device).unsqueeze(0)
    counter = (
        quads,
        (positions_R & MASK).unsqueeze(1),
        (sample_indices_R & MASK).unsqueeze(1),
        torch.tensor(purpose, device=device),
    )
    key = ((seeds_R & MASK).unsqueeze(1), ((seeds_R >> 32) & MASK).unsqueeze(1))
    bits = philox(counter, key).flatten(1)[:, vocab_start - 4 * first : vocab_stop - 4 * first]
    uniform = (bits.to(torch.float64) + 0.5) * 2.0**-32
    return uniform.log_().neg_().log_().neg_().float()
