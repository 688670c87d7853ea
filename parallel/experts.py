"""Experts: the routed part of a mixture of experts on one tensor rank. Routing is replicated, so no tokens travel.

Two ways to shard, with one all-reduce after either, which the caller shares with a shared expert: every rank holds a
slice of the columns of every expert, or every rank holds some experts whole. Shapes: T tokens, K experts per token, E
local experts, H hidden size, F local columns of an expert, M tokens of one expert.
"""

from collections.abc import Sequence

import torch

from shoal.kernels.activation import KINDS, gated_activation
from shoal.kernels.build import native_library
from shoal.kernels.device import on_gpu
from shoal.kernels.experts import NativeExperts
from shoal.kernels.linear import linear
from shoal.kernels.weight import PreparedWeight, Weight
from shoal.parallel.communicator import Communicator
from shoal.parallel.sharding import Range


class Experts:
    """Gated experts: down(act(gate(x)) * up(x)), weighted and summed over a token's experts.

    gate_up: [E, 2 F, H], gate's columns before up's; down: [E, H, F]; tensors, or on GPUs rounded stacks; or a weight
    per expert, tensors or prepared;
    expert_range: the experts held; activation: a key of kernels.activation.KINDS. A token's experts are summed in
    rising order of their number, in float32, so a token's result does not depend on the others when deterministic.
    Layout in: x and the routing whole on every rank; `partial` out: this rank's part of the sum; calling adds the
    all-reduce over the group.
    """

    def __init__(
        self,
        gate_up: Weight | Sequence[Weight],
        down: Weight | Sequence[Weight],
        expert_range: Range,
        activation: str,
        group: Communicator,
        *,
        deterministic: bool,
    ) -> None:
        count = expert_range[1] - expert_range[0]
        held = [weight.shape[0] if isinstance(weight, Weight) else len(weight) for weight in (gate_up, down)]
        assert held == [count, count], (held, expert_range)
        self.gate_up, self.down, self.expert_range = gate_up, down, expert_range
        self.activation, self.group, self.deterministic = activation, group, deterministic
        self.native: NativeExperts | None = None
        if isinstance(gate_up, list) and isinstance(down, list) and gate_up and hasattr(gate_up[0], "native"):
            # prepared for C, on a CPU; elsewhere nothing is built
            library = native_library()
            assert library is not None, "weights are prepared for a library"
            self.native = NativeExperts(library, gate_up, down, expert_range[0], activation)

    def partial(self, x_TH: torch.Tensor, weights_TK: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
        """x: [T, H]; weights: [T, K] float32; ids: [T, K] integers, different within a row, over all experts.

        Returns [T, H] in x's dtype: zeros where none of a token's experts is held here.
        """
        if on_gpu(x_TH) and isinstance(self.gate_up, Weight) and isinstance(self.down, Weight):
            from shoal.kernels.gpu.experts import launch_experts

            kind, first = KINDS[self.activation], self.expert_range[0]
            return launch_experts(
                x_TH, self.gate_up, self.down, weights_TK, ids_TK, first, kind, deterministic=self.deterministic
            )
        if self.native is not None:
            return self.native(x_TH, weights_TK, ids_TK)
        assert not isinstance(self.gate_up, PreparedWeight) and not isinstance(self.down, PreparedWeight)
        out_TH = torch.zeros(x_TH.shape, dtype=torch.float32, device=x_TH.device)
        tokens, weights, counts = self._by_expert(weights_TK, ids_TK)
        start = 0
        for expert, count in enumerate(counts):
            if count == 0:
                continue
            rows_M, scale_M = tokens[start : start + count], weights[start : start + count]
            start += count
            hidden = linear(x_TH.index_select(0, rows_M), self.gate_up[expert], deterministic=self.deterministic)
            hidden = gated_activation(hidden, self.activation)
            y_MH = linear(hidden, self.down[expert], deterministic=self.deterministic)
            out_TH.index_add_(0, rows_M, y_MH.float().mul_(scale_M.unsqueeze(1)))
        return out_TH.to(x_TH.dtype)

    def __call__(self, x_TH: torch.Tensor, weights_TK: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
        """As partial, summed over the group: [T, H], equal on every rank."""
        return self.group.all_reduce(self.partial(x_TH, weights_TK, ids_TK))

    def _by_expert(
        self, weights_TK: torch.Tensor, ids_TK: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """The tokens routed to local experts, by rising expert and token; their weights; how many each expert has."""
        first, last = self.expert_range
        flat = ids_TK.reshape(-1)
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=last).tolist()
        begin = sum(counts[:first])
        held = counts[first:last]
        order = order[begin : begin + sum(held)]
        return torch.div(order, ids_TK.shape[1], rounding_mode="floor"), weights_TK.reshape(-1)[order], held
