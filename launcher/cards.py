"""What well-known GPUs hold and do, by their data sheets: for planning a layout for cards that are not here."""

from typing import NamedTuple

from shoal.model.shard import Quantization

CONTEXT_BYTES = 1 << 29  # that CUDA takes of a card for itself, about


class Card(NamedTuple):
    """memory_bytes: as the driver tells it; read_bytes_per_s: of its memory; half_flops_per_s, float_flops_per_s,
    fp8_flops_per_s: of dense products in bfloat16, in float32 without TF32, and in FP8 (those in bfloat16 where it has
    none).
    """

    memory_bytes: int
    read_bytes_per_s: float
    half_flops_per_s: float
    float_flops_per_s: float
    fp8_flops_per_s: float

    def flops_per_s(self, dtype: str, quantization: Quantization) -> float:
        """Of products in a type with weights that are rounded so; int8 and int4 are multiplied as floats."""
        if quantization == "fp8":
            return self.fp8_flops_per_s
        return self.float_flops_per_s if dtype == "float32" else self.half_flops_per_s


def _card(memory_mib: int, gb_per_s: float, half: float, single: float, fp8: float) -> Card:
    """Rates in TFLOP/s."""
    return Card(memory_mib << 20, gb_per_s * 1e9, half * 1e12, single * 1e12, fp8 * 1e12)


CARDS = {
    "a10": _card(23028, 600, 125, 31.2, 125),
    "a100-40gb": _card(40960, 1555, 312, 19.5, 312),
    "a100-80gb": _card(81920, 2039, 312, 19.5, 312),
    "b200": _card(183359, 8000, 2250, 80, 4500),
    "h100": _card(81559, 3350, 989, 67, 1979),
    "h200": _card(143771, 4800, 989, 67, 1979),
    "l4": _card(23034, 300, 121, 30.3, 242),
    "l40s": _card(46068, 864, 362, 91.6, 733),
    "rtx4090": _card(24564, 1008, 165, 82.6, 330),
}
