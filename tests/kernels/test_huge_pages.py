"""Memory in huge pages is memory as any other, and stays as it is when it is touched ahead."""

import threading

import pytest
import torch

from shoal.kernels.huge_pages import PAGE, empty_in_huge_pages, touch_ahead


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8])
@pytest.mark.parametrize("shape", [(0,), (3, 5), (1 << 19, 4), (1_100_000, 3)])
def test_tensors_hold_what_is_put_in(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    made = empty_in_huge_pages(shape, dtype)
    assert made.shape == shape and made.dtype == dtype and made.is_contiguous()
    assert made.nbytes < PAGE or made.data_ptr() % PAGE == 0
    values = torch.arange(made.numel()).remainder(13).view(shape).to(dtype)
    made.copy_(values)
    assert torch.equal(made.view(torch.uint8), values.view(torch.uint8))


def test_memory_is_new_not_what_was_used_before_in_small_pages() -> None:
    def present(tensor: torch.Tensor) -> int:
        with open("/proc/self/pagemap", "rb") as entries:  # eight bytes a page of 4 KiB, the highest bit: it is there
            entries.seek(tensor.data_ptr() // 4096 * 8)
            return sum(byte >> 7 for byte in entries.read(tensor.nbytes // 4096 * 8)[7::8])

    used = [torch.full((5 * PAGE,), 1, dtype=torch.uint8) for _ in range(4)]
    try:
        assert present(used[0]) > 0
    except OSError:
        pytest.skip("this system does not tell which pages are there")
    while used:  # what malloc is given back, it keeps
        used.pop()
    kept = [empty_in_huge_pages((2 * PAGE,), torch.uint8) for _ in range(4)]
    assert [present(made) for made in kept] == [0] * 4


def test_touching_ahead_changes_nothing_waits_for_idle_times_and_ends() -> None:
    tensors = [empty_in_huge_pages((3 * PAGE + 5,), torch.uint8).fill_(value) for value in (7, 9)]
    small = [torch.full((100,), 3, dtype=torch.uint8)]
    told: list[bool] = []

    def idle() -> bool:
        told.append(len(told) % 2 == 1)  # busy each time it is first asked
        return told[-1]

    for given, most in ((tensors, 4 * PAGE), (tensors, 0), (small, PAGE), ([], PAGE)):
        touch_ahead(given, most, idle)
        join()
    assert told == [False, True] * 4
    touch_ahead(tensors, 100 * PAGE, lambda: None)
    join()
    assert all((tensor == value).all() for tensor, value in zip(tensors, (7, 9), strict=True)) and (small[0] == 3).all()


def join() -> None:
    for thread in threading.enumerate():
        if thread.name == "shoal-touch-ahead":
            thread.join(10)
            assert not thread.is_alive()
