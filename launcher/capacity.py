"""From a cache plan to what the scheduler is offered. No torch."""

from shoal.engine.executor import CacheGroup, Capacity
from shoal.model.ledger import CachePlan
from shoal.model.spec import DecoderSpec


def make_capacity(plan: CachePlan, spec: DecoderSpec, *, max_in_flight: int, overlap: bool = False) -> Capacity:
    """The capacity of a replica whose ranks hold the plan's blocks. max_in_flight: plans at once, one per stage at
    most; overlap: and one that follows (Capacity).
    """
    groups = [
        CacheGroup(name="full" if window is None else f"window{window}", window=window, num_blocks=count)
        for window, count in zip(plan.windows, plan.num_blocks, strict=True)
    ]
    return Capacity(
        block_size=plan.block_size,
        groups=groups,
        max_model_len=plan.max_model_len,
        vocab_size=spec.vocab_size,
        max_in_flight=max_in_flight,
        overlap=overlap,
    )
