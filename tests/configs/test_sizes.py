"""Sizes in bytes as text."""

import pytest

from shoal.configs.sizes import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("4GiB", 4 << 30),
        ("512 MiB", 512 << 20),
        ("1.5GB", 1_500_000_000),
        ("0.1kB", 100),
        ("1.1KiB", 1126),
        ("7B", 7),
        ("2tib", 2 << 40),
    ],
)
def test_sizes_mean_bytes(text: str, num_bytes: int) -> None:
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize("text", ["4G", "4", "-1GiB", "GiB", "1e3MiB", "nanGiB", "4 Gi B", "", "4PiB"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_size(text)


def test_bare_letter_is_answered_with_both_meanings() -> None:
    with pytest.raises(ValueError, match="write 4GiB or 4GB"):
        parse_size("4G")


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (64 << 20, "64 MiB"), (1_500_000_000, "1.40 GiB"), (-3 << 30, "-3 GiB")],
)
def test_sizes_are_shown_in_the_largest_fitting_unit(num_bytes: int, text: str) -> None:
    assert format_size(num_bytes) == text
