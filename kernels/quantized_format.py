"""The format of quantised weights: what is stored, in which order, and how many bytes it takes. The one description,
for every device. No torch.

A weight [columns, inner] (y = x w^T) becomes codes and scales: w[n, k] ~ code[n, k] * scale[n, k // GROUP]. A group is
GROUP neighbouring inputs of one column, counted from input 0 of the whole (logical) weight: whatever slice a rank
holds, its codes and scales are those of one rank. A slice that begins within a group says so by `lead`, the number of
inputs of that group before it; they have places of their own.

int8: codes -127 to 127; scale = max |w| / 127. int4: codes -8 to 7; scale = w at the largest |w|, over -8, so that this
one is met exactly whatever its sign. Scales are bfloat16, and codes are rounded (half to even) with the rounded scale.
A group of zeros has scale 0. Stored: codes as unsigned numbers, code + 128 or code + 8.

Span order (kernels/span_weight.py), in memory on GPUs: a span is four groups, and a column whole spans, the last one
padded. A word of 32 bits holds one code plus 128 or plus 8 of every group, or of every half of a group: of a span's 32
words (8 bits) or 16 (4 bits) number i has in its lane j, from the lowest bits on, the code of input 32 j + i or 16 j +
i. Codes int32 [columns, words]; scales [columns, groups]. Blocked order, in memory on CPUs, for dot products of four
bytes: columns in blocks of BLOCK, blocks one after the other, padded; codes [blocks, groups, 8, BLOCK, 4]: eight times
four inputs of BLOCK columns, for int4 with the inputs 8 i to 8 i + 3 in the low and 8 i + 4 to 8 i + 7 in the high
nibbles; scales [blocks, groups, BLOCK].
"""

GROUP = 32
SPAN = 4 * GROUP
SLAB = 1 << 24  # weights made floats at once on GPUs: 32 MiB, which the second-level cache of large ones holds
BLOCK = 16
SCALE_BYTES = 2


def padded_groups(inner: int, lead: int) -> int:
    """Groups that `inner` inputs touch when the first is number `lead` of its group."""
    return -(-(lead + inner) // GROUP)


def padded_spans(inner: int, lead: int) -> int:
    """Spans that hold those groups."""
    return -(-(lead + inner) // SPAN)


def quantized_bytes(columns: int, inner: int, lead: int, bits: int, *, blocked: bool = True) -> int:
    """Bytes of one weight [columns, inner] with codes of `bits` bits, padding included; in blocked or span order."""
    group_bytes = GROUP * bits // 8 + SCALE_BYTES
    if blocked:
        return -(-columns // BLOCK) * BLOCK * padded_groups(inner, lead) * group_bytes
    return columns * padded_spans(inner, lead) * (SPAN // GROUP) * group_bytes
