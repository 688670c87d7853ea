"""Routing of tokens to experts: softmax over all experts in float32, then the top_k of them (arXiv:1701.06538,
arXiv:2101.03961). On GPUs a Triton kernel, on CPUs C where it is there.

Among equal probabilities the lowest expert comes first, so that all ranks of any layout choose alike.
"""

import torch

from shoal.kernels.build import NativeLibrary, native_library
from shoal.kernels.device import on_gpu
from shoal.kernels.native_types import DTYPE_CODES, INT, INT64, POINTER, takes_native

_PROTOTYPE = (INT, POINTER, INT64, INT64, INT64, INT64, INT, POINTER, POINTER)
MOST_EXPERTS = 8192  # that C takes: their probabilities lie on its stack


def moe_routing_reference(logits_TE: torch.Tensor, top_k: int, *, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Token by token, in Python's own sort. Returns what moe_routing returns."""
    weights, ids = [], []
    for row in torch.softmax(logits_TE.float(), dim=-1).tolist():
        best = sorted(range(len(row)), key=lambda expert: (-row[expert], expert))[:top_k]
        total = sum(row[expert] for expert in best) if normalize else 1.0
        ids.append(best)
        weights.append([row[expert] / total for expert in best])
    shape = (len(ids), top_k)
    return torch.tensor(weights).view(shape), torch.tensor(ids, dtype=torch.int64).view(shape)


def moe_routing(logits_TE: torch.Tensor, top_k: int, *, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose experts. logits: [num_tokens, num_experts], any float dtype; normalize: weights of the chosen sum to one.

    Returns (weights [num_tokens, top_k] float32, expert ids [num_tokens, top_k] int64), best first.
    """
    if on_gpu(logits_TE) and logits_TE.stride(1) == 1:
        from shoal.kernels.gpu.moe_routing import launch_moe_routing

        return launch_moe_routing(logits_TE, top_k, normalize=normalize)
    library = native_library() if logits_TE.is_cpu else None
    if library is not None and takes_native(logits_TE) and logits_TE.shape[1] <= MOST_EXPERTS:
        return _native(library, logits_TE, top_k, normalize)
    probabilities = torch.softmax(logits_TE, dim=-1, dtype=torch.float32)
    weights, ids = torch.sort(probabilities, dim=-1, descending=True, stable=True)
    weights, ids = weights[:, :top_k], ids[:, :top_k]
    return (weights / weights.sum(-1, keepdim=True) if normalize else weights), ids


def _native(
    library: NativeLibrary, logits_TE: torch.Tensor, top_k: int, normalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, count = logits_TE.shape
    assert 0 < top_k <= count, (top_k, count)
    weights, ids = torch.empty((tokens, top_k)), torch.empty((tokens, top_k), dtype=torch.int64)
    library.function("shoal_moe_routing", _PROTOTYPE)(
        DTYPE_CODES[logits_TE.dtype], logits_TE.data_ptr(), logits_TE.stride(0), tokens, count, top_k, normalize,
        weights.data_ptr(), ids.data_ptr(),
    )  # fmt: skip
    return weights, ids
