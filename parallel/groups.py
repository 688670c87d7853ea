"""The groups of one replica: its world, one tensor group per stage, one pipeline group per tensor rank. No torch."""

import msgspec


class GroupSpec(msgspec.Struct, frozen=True):
    """A named group. ranks: replica ranks in group order, so a rank's number within the group is its position."""

    name: str
    ranks: tuple[int, ...]


def replica_groups(tp_size: int, pp_size: int) -> list[GroupSpec]:
    """All groups of a replica, the same list on every rank. Replica rank = pp_rank * tp_size + tp_rank.

    First "world", then the "tensor" group of every stage, then the "pipeline" group of every tensor rank; groups of one
    rank are among them. Raises ValueError when a size is below 1.
    """
    if tp_size < 1 or pp_size < 1:
        raise ValueError(f"a replica of tensor {tp_size} x pipeline {pp_size} has no ranks; both must be at least 1")
    world = GroupSpec("world", tuple(range(tp_size * pp_size)))
    tensor = [GroupSpec("tensor", tuple(range(pp * tp_size, (pp + 1) * tp_size))) for pp in range(pp_size)]
    pipeline = [GroupSpec("pipeline", tuple(range(tp, tp_size * pp_size, tp_size))) for tp in range(tp_size)]
    return [world, *tensor, *pipeline]
