"""Sizes in bytes as people write them: `4GiB`, `512 MiB`, `1.5GB`."""

import re
from decimal import Decimal

_UNITS = {"b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS[f"{_letter}ib"] = 1024**_power
    _UNITS[f"{_letter}b"] = 1000**_power

_SIZE = re.compile(r"(\d{1,20}(?:\.\d{1,20})?)\s*([A-Za-z]+)")
SIZE_EXAMPLES = "4GiB, 512MiB or 1.5GB"


def parse_size(text: str) -> int:
    """The bytes a text such as `4GiB` means; KiB, MiB, GiB, TiB are powers of 1024, kB, MB, GB, TB powers of 1000.

    Upper and lower case are the same; a fraction of a byte is dropped. Raises ValueError for anything else, a missing
    unit letter (`4G`) and a sign included.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"must be a size such as {SIZE_EXAMPLES}")
    number, unit = match.groups()
    factor = _UNITS.get(unit.lower())
    if factor is None:
        fix = f"; write {number}{unit}iB or {number}{unit}B" if f"{unit.lower()}b" in _UNITS else ""
        raise ValueError(f"has the unknown unit {unit}{fix}; a size is such as {SIZE_EXAMPLES}")
    return int(Decimal(number) * factor)


def format_size(num_bytes: int) -> str:
    """Bytes for reading: `64 MiB`, `1.50 GiB`; exact multiples without a fraction, the sign kept."""
    amount, unit = abs(num_bytes), "B"
    factor = 1
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if amount < factor * 1024 or unit == "TiB":
            break
        factor *= 1024
    sign = "-" if num_bytes < 0 else ""
    digits = str(amount // factor) if amount % factor == 0 else f"{amount / factor:.2f}"
    return f"{sign}{digits} {unit}"
