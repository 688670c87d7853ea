"""Rows of an embedding table of which only a range is held: y = w[id - first], zeros for the ids outside."""

import torch

from shoal.kernels.device import on_gpu
from shoal.kernels.weight import Weight, embedding_rows


def embedding(ids: torch.Tensor, weight: Weight, first: int) -> torch.Tensor:
    """ids: any shape, int64; weight: [num_local, size], the rows [first, first + num_local) of the table,
    a tensor or prepared.

    Returns [*ids.shape, size], a new tensor.
    """
    if isinstance(weight, torch.Tensor) and on_gpu(weight) and weight.stride(1) == 1:
        from shoal.kernels.gpu.embedding import launch_embedding

        flat = ids.reshape(-1).to(torch.int64).contiguous()
        return launch_embedding(flat, weight, first).view(*ids.shape, weight.shape[1])
    elsewhere = (ids < first) | (ids >= first + weight.shape[0])
    rows = embedding_rows(weight, (ids - first).masked_fill_(elsewhere, 0))
    return rows.masked_fill_(elsewhere.unsqueeze(-1), 0)
