"""The format of quantised weights: what is stored, in which order, and how many bytes it takes. The one description,
for every device. No torch.

A weight [columns, inner] (y = x w^T) becomes codes and scales: w[n, k] ~ code[n, k] * scale[n, k // GROUP]. A group is
GROUP neighbouring inputs of one column, counted from input 0 of the whole (logical) weight: whatever slice a rank
holds, its codes and scales are those of one rank. A slice that begins within a group says so by `lead`, the number of
inputs of that group before it; they have places of their own.

int8: codes -127 to 127; scale = max |w| / 127. int4: codes -8 to 7; scale = w at the largest |w|, over -8, so that this
one is met exactly whatever its sign. Scales are bfloat16, and codes are rounded (half to even) with the rounded scale.
A group of zeros has scale 0. Stored: codes as unsigned bytes code + 128, or two nibbles code + 8.

Plain order (kernels/plain_weight.py), in memory on GPUs, for kernels that index: codes int8 [columns, padded inner], or
for int4 uint8 [columns, padded inner / 2] with input 2 i in the low and 2 i + 1 in the high nibble of byte i, plus 8;
scales [columns, groups]. Blocked order, in memory on CPUs, for dot products of four bytes: columns in blocks of BLOCK,
blocks one after the other, padded; codes [blocks, groups, 8, BLOCK, 4]: eight times four inputs of BLOCK columns, for
int4 with the inputs 8 i to 8 i + 3 in the low and 8 i + 4 to 8 i + 7 in the high nibbles; scales [blocks, groups,
BLOCK].
"""

GROUP = 32
BLOCK = 16
SCALE_BYTES = 2


def padded_groups(inner: int, lead: int) -> int:
    """Groups that `inner` inputs touch when the first is number `lead` of its group."""
    return -(-(lead + inner) // GROUP)


def quantized_bytes(columns: int, inner: int, lead: int, bits: int, *, blocked: bool = True) -> int:
    """Bytes of one weight [columns, inner] with codes of `bits` bits, padding included; in blocked or plain order."""
    stored = -(-columns // BLOCK) * BLOCK if blocked else columns
    return stored * padded_groups(inner, lead) * (GROUP * bits // 8 + SCALE_BYTES)
