"""The two halves of a decoder layer in one call of C each: norm, projection, head norms, rotary positions, cache,
attention, output; and norm, up, activation, down, or norm, router and experts. What they compute, to the bit, is what
the single operations give one after the other; what they save is a crossing from Python into C and a start of threads
for each of them. Whole layers: kernels/fused_layers.py.

For CPUs and prepared weights (kernels/weight.py). Shapes: T tokens, H hidden size, R rotary_dim.
"""

import ctypes
from typing import NamedTuple

import torch

from shoal.kernels.activation import KINDS
from shoal.kernels.build import NativeLibrary
from shoal.kernels.experts import SLICE_PAIRS, ExpertsStruct, NativeExperts
from shoal.kernels.native_types import FLOAT, INT, INT64, POINTER
from shoal.kernels.weight import NativeWeight, PreparedWeight

_MIXER = (POINTER, POINTER, POINTER, POINTER, POINTER, POINTER, POINTER, POINTER, INT)
_FEED_FORWARD = (POINTER, POINTER, POINTER, POINTER, INT64, INT64, INT)
_MIXTURE = (POINTER, POINTER, POINTER, POINTER, INT64, INT64, INT)
BLOCK_ROWS = 512  # most of a feed-forward at once: what lies between its products stays in the cache


class FusedNorm(NamedTuple):
    """RMSNorm, or where `layer` LayerNorm, over the last dimension: weight and bias [size]; offset: added to the weight
    (RMSNorm only).
    """

    weight: torch.Tensor
    eps: float
    offset: float = 0.0
    bias: torch.Tensor | None = None
    layer: bool = False


class NativeNorm(ctypes.Structure):
    """Mirror of Norm in kernels/native/rows.h."""

    _fields_ = (
        ("weight", POINTER),
        ("bias", POINTER),
        ("size", INT64),
        ("eps", FLOAT),
        ("offset", FLOAT),
        ("layer", ctypes.c_int32),
    )


class NativeMixer(ctypes.Structure):
    """Mirror of Mixer in kernels/native/fused.c."""

    _fields_ = (
        ("norm", NativeNorm),
        ("q_norm", NativeNorm),
        ("k_norm", NativeNorm),
        ("qkv", NativeWeight),
        ("out", NativeWeight),
        ("q_to_kv", POINTER),
        ("sinks", POINTER),
        ("num_heads", INT64),
        ("num_kv_heads", INT64),
        ("head_dim", INT64),
        ("rotary_dim", INT64),
        ("window", INT64),
        ("scale", FLOAT),
        ("softcap", FLOAT),
    )


class NativeFeedForward(ctypes.Structure):
    """Mirror of FeedForward there."""

    _fields_ = (
        ("norm", NativeNorm),
        ("up", NativeWeight),
        ("down", NativeWeight),
        ("kind", ctypes.c_int32),
        ("gated", ctypes.c_int32),
    )


class NativeMixture(ctypes.Structure):
    """Mirror of Mixture there."""

    _fields_ = (
        ("norm", NativeNorm),
        ("router", NativeWeight),
        ("experts", ExpertsStruct),
        ("shared", POINTER),
        ("gate", POINTER),
        ("normalize", ctypes.c_int32),
    )


class NativeStep(ctypes.Structure):
    """Mirror of Step there."""

    _fields_ = (
        ("block_table", POINTER),
        ("cu_seqlens_q", POINTER),
        ("seq_lens", POINTER),
        ("slots", POINTER),
        ("table_stride", INT64),
        ("num_rows", INT64),
        ("num_tokens", INT64),
        ("block_size", INT64),
    )


def make_step(
    block_table_RB: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    slots_T: torch.Tensor,
    block_size: int,
) -> NativeStep:
    """What a step's rows are, for the layers of one cache group; tensors as paged_attention and kv_write take them.

    The tensors must live as long as the result.
    """
    assert block_table_RB.dtype == cu_seqlens_q.dtype == seq_lens.dtype == torch.int32 and slots_T.dtype == torch.int64
    assert cu_seqlens_q.is_contiguous() and seq_lens.is_contiguous() and slots_T.is_contiguous()
    return NativeStep(
        block_table_RB.data_ptr(), cu_seqlens_q.data_ptr(), seq_lens.data_ptr(), slots_T.data_ptr(),
        block_table_RB.stride(0), len(seq_lens), len(slots_T), block_size,
    )  # fmt: skip


class FusedMixer:
    """Norm, fused projection, attention over the paged cache and output projection of one layer.

    Arguments as the single operations take them; norms None where nothing normalises; q_norm, k_norm: of one head's
    size, or of all of them at once; qkv_bias: [columns] or None.
    """

    def __init__(
        self,
        library: NativeLibrary,
        norm: FusedNorm | None,
        qkv: PreparedWeight,
        qkv_bias: torch.Tensor | None,
        out: PreparedWeight,
        *,
        num_heads: int,
        num_kv_heads: int,
        rotary_dim: int,
        scale: float,
        q_norm: FusedNorm | None = None,
        k_norm: FusedNorm | None = None,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        q_to_kv: torch.Tensor,
    ) -> None:
        head_dim = out.shape[1] // num_heads
        assert qkv.shape[0] == (num_heads + 2 * num_kv_heads) * head_dim and qkv.dtype == out.dtype
        for heads_norm, count in ((q_norm, num_heads), (k_norm, num_kv_heads)):
            assert heads_norm is None or len(heads_norm.weight) in (head_dim, count * head_dim)
        assert q_to_kv.dtype == torch.int32 and (sinks is None or sinks.dtype == torch.float32)
        self.kept = (norm, q_norm, k_norm, qkv, qkv_bias, out, sinks, q_to_kv)  # the struct below points into them
        self.scratch_width, self.rotary_dim = qkv.shape[1] + qkv.shape[0] + out.shape[1], rotary_dim
        self.hidden, self.weight_bytes = qkv.shape[1], qkv.nbytes + out.nbytes
        self.native = NativeMixer(
            native_norm(norm, qkv.dtype), native_norm(q_norm, qkv.dtype), native_norm(k_norm, qkv.dtype),
            with_bias(qkv, qkv_bias), out.native, q_to_kv.data_ptr(), None if sinks is None else sinks.data_ptr(),
            num_heads, num_kv_heads, head_dim, rotary_dim, window or 0, scale, softcap or 0.0,
        )  # fmt: skip
        self.address, self.call = ctypes.addressof(self.native), library.function("shoal_fused_mixer", _MIXER, INT)

    def __call__(
        self,
        x_TH: torch.Tensor,
        cos_sin_TR: torch.Tensor | None,
        step: NativeStep,
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> torch.Tensor:
        """This rank's part of the sum: [T, H]. Raises MemoryError.

        x: [T, H], the residual stream; cos_sin: [T, R] float32 or None; keys, values: the layer's caches, written to.
        """
        assert x_TH.is_contiguous() and (cos_sin_TR is None or cos_sin_TR.shape == (len(x_TH), self.rotary_dim))
        scratch, out_TH = x_TH.new_empty(len(x_TH) * self.scratch_width), torch.empty_like(x_TH)
        cos_sin = None if cos_sin_TR is None else cos_sin_TR.data_ptr()
        status = self.call(
            self.address, ctypes.addressof(step), x_TH.data_ptr(), cos_sin, keys.data_ptr(), values.data_ptr(),
            scratch.data_ptr(), out_TH.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        if status:
            raise MemoryError(f"no memory for the scratch of attention over {len(x_TH)} tokens")
        return out_TH


class FusedFeedForward:
    """Norm, up (or gate and up), activation and down of one layer. kind: a key of activation.KINDS."""

    def __init__(
        self,
        library: NativeLibrary,
        norm: FusedNorm | None,
        up: PreparedWeight,
        up_bias: torch.Tensor | None,
        down: PreparedWeight,
        *,
        kind: str,
    ) -> None:
        gated = up.shape[0] == 2 * down.shape[1]
        assert (gated or up.shape[0] == down.shape[1]) and up.dtype == down.dtype, (up.shape, down.shape)
        self.kept = (norm, up, up_bias, down)
        self.scratch_width, self.weight_bytes = up.shape[1] + up.shape[0] + down.shape[1], up.nbytes + down.nbytes
        self.native = NativeFeedForward(
            native_norm(norm, up.dtype), with_bias(up, up_bias), down.native, KINDS[kind], gated
        )
        self.address = ctypes.addressof(self.native)
        self.call = library.function("shoal_fused_feed_forward", _FEED_FORWARD, INT)

    def __call__(self, x_TH: torch.Tensor) -> torch.Tensor:
        """x: [T, H], the residual stream. Returns [T, H], this rank's part of the sum. Raises MemoryError."""
        assert x_TH.is_contiguous()
        blocks = max(1, -(-len(x_TH) // BLOCK_ROWS))
        block = max(1, -(-len(x_TH) // blocks))  # as equal as they can be
        scratch, out_TH = x_TH.new_empty(block * self.scratch_width), torch.empty_like(x_TH)
        status = self.call(
            self.address, x_TH.data_ptr(), scratch.data_ptr(), out_TH.data_ptr(), len(x_TH), block,
            torch.get_num_threads(),
        )  # fmt: skip
        if status:
            raise MemoryError(f"no memory for the counters of a feed-forward over {len(x_TH)} tokens")
        return out_TH


class FusedMixture:
    """Norm, router, routing (kernels/moe_routing.py) and the experts held of one layer. shared: an expert of all tokens
    beside them, without a norm of its own; gate: [1, H], by whose sigmoid (kernels/sigmoid_gate.py) it is multiplied.
    """

    def __init__(
        self,
        library: NativeLibrary,
        norm: FusedNorm | None,
        router: PreparedWeight,
        experts: NativeExperts,
        *,
        top_k: int,
        normalize: bool,
        shared: FusedFeedForward | None = None,
        gate: torch.Tensor | None = None,
    ) -> None:
        assert router.shape[1] == experts.hidden and router.dtype == experts.dtype
        assert 0 < top_k <= router.shape[0], (top_k, router.shape)
        assert gate is None or (gate.dtype == router.dtype and gate.is_contiguous() and gate.numel() == router.shape[1])
        self.kept = (norm, router, experts, shared, gate)
        self.block_rows = max(1, SLICE_PAIRS // top_k)
        self.scratch_width = router.shape[1] + router.shape[0] + experts.scratch_width(top_k)
        self.weight_bytes = router.nbytes + experts.weight_bytes
        if shared is not None:
            self.scratch_width += router.shape[1] + shared.scratch_width
            self.weight_bytes += shared.weight_bytes
        self.native = NativeMixture(
            native_norm(norm, router.dtype), router.native, experts.native(top_k),
            None if shared is None else shared.address, None if gate is None else gate.data_ptr(), normalize,
        )  # fmt: skip
        self.address = ctypes.addressof(self.native)
        self.call = library.function("shoal_fused_mixture", _MIXTURE, INT)

    def __call__(self, x_TH: torch.Tensor) -> torch.Tensor:
        """x: [T, H], the residual stream. Returns [T, H], the part of the sum of the experts held. Raises
        MemoryError.
        """
        assert x_TH.is_contiguous()
        block = max(1, min(len(x_TH), self.block_rows))
        scratch, out_TH = x_TH.new_empty(block * self.scratch_width), torch.empty_like(x_TH)
        status = self.call(
            self.address, x_TH.data_ptr(), scratch.data_ptr(), out_TH.data_ptr(), len(x_TH), block,
            torch.get_num_threads(),
        )  # fmt: skip
        if status:
            raise MemoryError(f"no memory to sort {len(x_TH)} tokens by expert")
        return out_TH


def native_norm(norm: FusedNorm | None, dtype: torch.dtype) -> NativeNorm:
    """The struct of a norm."""
    if norm is None:
        return NativeNorm()
    assert norm.weight.dtype == dtype and norm.weight.is_contiguous()
    bias = vector_address(norm.bias, dtype, len(norm.weight))
    return NativeNorm(norm.weight.data_ptr(), bias, len(norm.weight), norm.eps, norm.offset, norm.layer)


def vector_address(vector: torch.Tensor | None, dtype: torch.dtype, size: int) -> int | None:
    """Where a bias is, None where there is none."""
    if vector is None:
        return None
    assert vector.dtype == dtype and vector.is_contiguous() and vector.shape == (size,), (vector.dtype, vector.shape)
    return vector.data_ptr()


def with_bias(weight: PreparedWeight, bias: torch.Tensor | None) -> NativeWeight:
    """A copy of the weight's struct with a bias."""
    native = NativeWeight.from_buffer_copy(weight.native)
    native.bias = vector_address(bias, weight.dtype, weight.shape[0])
    return native
