"""Sharded linears, as in Megatron-LM (arXiv:1909.08053): columns first, rows second, one all-reduce for both.

Weights are a rank's own slice, made elsewhere, tensors or prepared; slices may be of different sizes.
"""

import torch

from shoal.kernels.linear import linear
from shoal.kernels.weight import Weight
from shoal.parallel.communicator import Communicator


class ColumnLinear:
    """y = x w^T + b with the output columns sharded over the group. No collective.

    weight: [local_columns, inner]; bias: [local_columns] or None. Layout in: x whole on every rank; out: y's columns
    sharded.
    """

    def __init__(self, weight: Weight, bias: torch.Tensor | None = None, *, deterministic: bool) -> None:
        self.weight, self.bias, self.deterministic = weight, bias, deterministic

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., inner]. Returns [..., local_columns]."""
        return linear(x, self.weight, self.bias, deterministic=self.deterministic)


class RowLinear:
    """y = x w^T + b with the inner dimension sharded over the group, one all-reduce in it.

    weight: [columns, local_inner]; bias: [columns] or None, whole on every rank, added once, after the sum. Layout in:
    x's last dimension sharded; out: y whole on every rank.
    """

    def __init__(self, weight: Weight, bias: torch.Tensor | None, group: Communicator, *, deterministic: bool) -> None:
        self.weight, self.bias, self.group, self.deterministic = weight, bias, group, deterministic

    def partial(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's part of the sum, without the bias: for callers that reduce several parts at once. [...,
        columns].
        """
        return linear(x, self.weight, deterministic=self.deterministic)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., local_inner]. Returns [..., columns], equal on every rank."""
        y = self.group.all_reduce(self.partial(x))
        return y if self.bias is None else y.add_(self.bias)
