"""What a rank says it is at: layers and collectives are counted, and the collective it is in is named with its peer."""

import torch

from shoal.parallel.activity import Activity, WatchedCommunicator, watch_mesh
from shoal.parallel.communicator import SingleCommunicator
from shoal.parallel.mesh import make_mesh


class Watching(SingleCommunicator):
    """Notes what its activity says while it is called; as rank 1 of the ranks 2, 3 and 4."""

    def __init__(self, activity: Activity) -> None:
        super().__init__("pipeline")
        self.activity, self.seen = activity, []
        self.rank, self.size, self.global_ranks = 1, 3, (2, 3, 4)

    def note(self) -> None:
        waiting = self.activity.waiting
        self.seen.append(None if waiting is None else waiting.what)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        self.note()
        return tensor

    def broadcast(self, tensor: torch.Tensor, root: int) -> torch.Tensor:
        self.note()
        return tensor

    def send(self, tensor: torch.Tensor, to: int) -> None:
        self.note()

    def recv(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        self.note()
        raise RuntimeError("nobody sends")


def test_a_collective_is_named_while_it_lasts_and_also_when_it_fails() -> None:
    activity = Activity()
    inner = Watching(activity)
    group, x = WatchedCommunicator(inner, activity), torch.zeros(1)
    assert (group.name, group.rank, group.size, group.global_ranks) == ("pipeline", 1, 3, (2, 3, 4))
    assert group.all_reduce(x) is x and group.broadcast(x, 0) is x
    group.send(x, 2)
    before = activity.count
    try:
        group.recv(x, 0)
    except RuntimeError:
        pass
    assert activity.waiting is None and activity.count == before + 2
    assert inner.seen == [
        "all_reduce of group pipeline",
        "broadcast of group pipeline from rank 2",
        "send in group pipeline to rank 4",
        "recv in group pipeline from rank 2",
    ]


def test_layers_and_new_activities_count_and_groups_of_one_are_left_alone() -> None:
    activity = Activity()
    activity.tick()
    activity.begin("in step 3")
    assert (activity.count, activity.doing) == (2, "in step 3")
    mesh = watch_mesh(make_mesh("gloo", 0, 1, 1, None, 1.0), activity)
    assert isinstance(mesh.tensor, SingleCommunicator)
