"""The feed-forwards of a layer on one tensor rank: dense, gated, mixture of experts.

Shapes: T tokens, H hidden size, E experts. Sharded: intermediate columns, or whole experts. Every kind gives its
partial sum over ranks; the decoder reduces it and adds the bias of the output, once.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from shoal.kernels.activation import activation, gated_activation
from shoal.kernels.linear import linear
from shoal.kernels.moe_routing import moe_routing
from shoal.kernels.sigmoid_gate import sigmoid_gate_
from shoal.model.prepare import Params
from shoal.model.shard import ModelShard
from shoal.model.spec import DenseFfn, Ffn, GatedFfn, MoeFfn
from shoal.parallel.communicator import Communicator
from shoal.parallel.experts import Experts
from shoal.parallel.linear import ColumnLinear, RowLinear


class FeedForward(Protocol):
    """What the decoder asks of a feed-forward. out_bias: [H], added after the sum over ranks."""

    out_bias: torch.Tensor | None

    def partial(self, x_TH: torch.Tensor) -> torch.Tensor:
        """This rank's part of the sum, [T, H], a new tensor."""


class DenseFeedForward:
    """down(act(up(x)))."""

    def __init__(self, spec: DenseFfn, params: Mapping[str, Any], group: Communicator, *, deterministic: bool) -> None:
        self.kind = spec.activation
        self.up = ColumnLinear(params["up.weight"], params.get("up.bias"), deterministic=deterministic)
        self.down = RowLinear(params["down.weight"], params.get("down.bias"), group, deterministic=deterministic)
        self.out_bias = self.down.bias

    def partial(self, x_TH: torch.Tensor) -> torch.Tensor:
        """See FeedForward."""
        return self.down.partial(activation(self.up(x_TH), self.kind))


class GatedFeedForward:
    """down(act(gate(x)) * up(x)), gate and up in one product."""

    def __init__(self, spec: GatedFfn, params: Mapping[str, Any], group: Communicator, *, deterministic: bool) -> None:
        self.kind = spec.activation
        self.gate_up = ColumnLinear(params["gate_up.weight"], params.get("gate_up.bias"), deterministic=deterministic)
        self.down = RowLinear(params["down.weight"], params.get("down.bias"), group, deterministic=deterministic)
        self.out_bias = self.down.bias

    def partial(self, x_TH: torch.Tensor) -> torch.Tensor:
        """See FeedForward."""
        return self.down.partial(gated_activation(self.gate_up(x_TH), self.kind))


class MoeFeedForward:
    """Routed gated experts, and perhaps a shared one every token takes. The router is whole on every rank."""

    out_bias: torch.Tensor | None = None

    def __init__(
        self,
        spec: MoeFfn,
        shard: ModelShard,
        params: Mapping[str, Any],
        group: Communicator,
        *,
        deterministic: bool,
    ) -> None:
        self.spec, self.deterministic = spec, deterministic
        self.router = params["router.weight"]
        self.experts = Experts(
            params["experts.gate_up.weight"],
            params["experts.down.weight"],
            shard.experts(spec),
            spec.activation,
            group,
            deterministic=deterministic,
        )
        self.shared = None
        if spec.shared is not None:
            shared = scoped(params, "shared.")
            self.shared = GatedFeedForward(spec.shared, shared, group, deterministic=deterministic)
        self.shared_gate = params["shared_gate.weight"] if spec.shared_gate else None

    def partial(self, x_TH: torch.Tensor) -> torch.Tensor:
        """See FeedForward."""
        logits_TE = linear(x_TH, self.router, deterministic=self.deterministic)
        weights, ids = moe_routing(logits_TE, self.spec.top_k, normalize=self.spec.normalize_top_k)
        out_TH = self.experts.partial(x_TH, weights, ids)
        if self.shared is not None:
            shared_TH = self.shared.partial(x_TH)
            if self.shared_gate is not None:
                sigmoid_gate_(shared_TH, x_TH, self.shared_gate, deterministic=self.deterministic)
            out_TH += shared_TH
        return out_TH


def scoped(params: Mapping[str, Any], prefix: str) -> Params:
    """The parameters whose names start with prefix, without it."""
    return {name[len(prefix) :]: tensor for name, tensor in params.items() if name.startswith(prefix)}


def make_feed_forward(
    spec: Ffn, shard: ModelShard, params: Mapping[str, Any], group: Communicator, *, deterministic: bool
) -> FeedForward:
    """The feed-forward of one layer. params: its tensors, named as in model/parameters.py without the layer's
    prefix.
    """
    if isinstance(spec, MoeFfn):
        return MoeFeedForward(spec, shard, params, group, deterministic=deterministic)
    if isinstance(spec, GatedFfn):
        return GatedFeedForward(spec, params, group, deterministic=deterministic)
    return DenseFeedForward(spec, params, group, deterministic=deterministic)
