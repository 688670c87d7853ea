"""What well-known GPUs hold and do, by their data sheets: for planning a layout for cards that are not here."""

from typing import Literal, NamedTuple

CONTEXT_BYTES = 1 << 29  # that CUDA takes of a card for itself, about


class Card(NamedTuple):
    """memory_bytes: as the driver tells it; read_bytes_per_s: of its memory; half_flops_per_s, float_flops_per_s: of
    dense products in bfloat16 and in float32 without TF32.
    """

    memory_bytes: int
    read_bytes_per_s: float
    half_flops_per_s: float
    float_flops_per_s: float

    def flops_per_s(self, dtype: Literal["float32", "bfloat16", "float16"]) -> float:
        """Of products in a type."""
        return self.float_flops_per_s if dtype == "float32" else self.half_flops_per_s


def _card(memory_mib: int, gb_per_s: float, half_tflops: float, float_tflops: float) -> Card:
    return Card(memory_mib << 20, gb_per_s * 1e9, half_tflops * 1e12, float_tflops * 1e12)


CARDS = {
    "a10": _card(23028, 600, 125, 31.2),
    "a100-40gb": _card(40960, 1555, 312, 19.5),
    "a100-80gb": _card(81920, 2039, 312, 19.5),
    "b200": _card(183359, 8000, 2250, 80),
    "h100": _card(81559, 3350, 989, 67),
    "h200": _card(143771, 4800, 989, 67),
    "l4": _card(23034, 300, 121, 30.3),
    "l40s": _card(46068, 864, 362, 91.6),
    "rtx4090": _card(24564, 1008, 165, 82.6),
}
