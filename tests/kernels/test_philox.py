"""Philox gives the published vectors, and noise that depends on nothing but its counter."""

import pytest
import torch

from shoal.kernels.philox import gumbel_noise, gumbel_noise_at, philox, philox_reference, quad_bits

KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_published_vectors(counter: tuple, key: tuple, expected: tuple) -> None:
    assert philox_reference(counter, key) == expected
    as_tensors = philox(tuple(torch.tensor(c) for c in counter), tuple(torch.tensor(k) for k in key))
    assert tuple(as_tensors.tolist()) == expected


def test_tensor_philox_equals_reference_on_random_counters() -> None:
    generator = torch.Generator().manual_seed(0)
    counter = tuple(torch.randint(0, 2**32, (50,), generator=generator) for _ in range(4))
    key = tuple(torch.randint(0, 2**32, (50,), generator=generator) for _ in range(2))
    found = philox(counter, key)
    for i in range(50):
        expected = philox_reference(tuple(int(c[i]) for c in counter), tuple(int(k[i]) for k in key))
        assert tuple(found[i].tolist()) == expected


def test_noise_of_a_token_does_not_depend_on_the_vocabulary_shard_or_the_batch() -> None:
    seeds, positions, samples = torch.tensor([7, -3, 2**62]), torch.tensor([0, 5, 9]), torch.tensor([0, 1, 2])
    whole = gumbel_noise(seeds, positions, samples, 0, 103)
    shards = [gumbel_noise(seeds, positions, samples, a, b) for a, b in ((0, 1), (1, 50), (50, 103))]
    assert torch.equal(whole, torch.cat(shards, 1))
    assert torch.equal(whole[1:2], gumbel_noise(seeds[1:2], positions[1:2], samples[1:2], 0, 103))
    assert whole.unique().numel() == whole.numel()


def test_noise_of_chosen_tokens_equals_the_whole_vocabularys() -> None:
    seeds, positions, samples = torch.tensor([7, -3]), torch.tensor([0, 5]), torch.tensor([0, 1])
    whole = gumbel_noise(seeds, positions, samples, 0, 101)
    ids = torch.tensor([[100, 3, 0], [8, 8, 97]])
    assert torch.equal(gumbel_noise_at(seeds, positions, samples, ids), whole.gather(1, ids))


def test_noise_is_standard_gumbel() -> None:
    noise = gumbel_noise(torch.arange(20), torch.zeros(20).long(), torch.zeros(20).long(), 0, 5000).double()
    assert abs(noise.mean() - 0.5772) < 0.02
    assert abs(noise.var() - 1.6449) < 0.06


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (3, 4), (5, 40), (0, 103), (4093, 12301), (7, 7)])
def test_noise_equals_its_formula_in_float64(path: str, start: int, stop: int) -> None:
    seeds, positions, samples = torch.tensor([7, -3, 2**62 + 5]), torch.tensor([0, 5, 2**33]), torch.tensor([0, 1, 2])
    bits = quad_bits(seeds, positions, samples, torch.arange(stop // 4 + 1).unsqueeze(0), 0).flatten(1)
    want = -torch.log(-torch.log((bits[:, start:stop].double() + 0.5) * 2.0**-32))
    got = gumbel_noise(seeds, positions, samples, start, stop)
    assert got.shape == (3, stop - start) and got.dtype == torch.float32
    assert torch.allclose(got.double(), want, rtol=3e-7, atol=3e-7)
    ids = torch.randint(start, max(stop, start + 1), (3, 21), generator=torch.Generator().manual_seed(1))
    ids = ids.clamp(max=stop - 1) if stop > start else ids[:, :0]
    assert torch.equal(gumbel_noise_at(seeds, positions, samples, ids), got.gather(1, ids - start))


def test_noise_is_spread_as_gumbel_numbers_are(path: str) -> None:
    found = gumbel_noise(
        torch.arange(64), torch.zeros(64, dtype=torch.int64), torch.zeros(64, dtype=torch.int64), 0, 32768
    )
    assert found.isfinite().all() and found.min() > -3.2 and 13 < found.max() < 23
    assert abs(found.mean() - 0.5772) < 5e-3 and abs(found.var() - 1.6449) < 2e-2
