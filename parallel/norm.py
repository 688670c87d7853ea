"""RMSNorm over a dimension that is sharded over the tensor group (OLMo-2 normalises all heads of a token at once)."""

import torch

from shoal.kernels.linear import linear
from shoal.kernels.rms_norm import rms_norm
from shoal.parallel.communicator import Communicator


class ShardedRmsNorm:
    """y = x / sqrt(mean(x^2) + eps) * w, the mean over the whole dimension: one all-reduce of one number per row.

    weight: [local_size], this rank's slice; global_size: of the whole dimension; unit_offset: the stored weight is
    w - 1. Computed in float32, rounded once. Layout in and out: the last dimension sharded over the group.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        eps: float,
        global_size: int,
        group: Communicator,
        *,
        deterministic: bool,
        unit_offset: bool = False,
    ) -> None:
        self.weight, self.eps, self.global_size, self.group = weight, eps, global_size, group
        self.deterministic, self.unit_offset = deterministic, unit_offset
        self._scale = weight.float() + (1.0 if unit_offset else 0.0)
        self._ones = torch.ones((1, weight.shape[0]), device=weight.device)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., local_size], any strides. Returns a new tensor of its shape and dtype."""
        if self.group.size == 1:
            return rms_norm(x, self.weight, self.eps, unit_offset=self.unit_offset)
        values = x.float()
        return self.scale(values, self.group.all_reduce(self.sum_of_squares(values))).to(x.dtype)

    def scale(self, values: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
        """values: [..., local_size] float32; squares: [..., 1], summed over all ranks. Returns the norm in float32."""
        return values * torch.rsqrt(squares / self.global_size + self.eps) * self._scale

    def sum_of_squares(self, values: torch.Tensor) -> torch.Tensor:
        """Of every row of this rank's part: [..., 1] float32. As a product with ones, whose order of sums can be
        fixed.
        """
        return linear(values * values, self._ones, deterministic=self.deterministic)
