"""Where replicas are on a Ray cluster: reservation and crews of each, and how a restarted controller finds them again.

Crews of a detached model are named actors, MODEL/replica N/crew I, on a reservation named MODEL/replica N: the cluster
itself is the journal of what runs where.
"""

import asyncio

import msgspec

from shoal.launcher.bootstrap import EngineBootstrap
from shoal.launcher.crew_messages import MUSTER, HostReport, Muster
from shoal.launcher.ray_cluster import Actor, Cluster, Reservation

ANSWER_TIMEOUT_S = 5.0


class Post(msgspec.Struct, frozen=True, kw_only=True):
    """A crew at its place: its ranks, the node's address, its actor, and what it said of the host."""

    ranks: list[int]
    node_id: str
    address: str
    actor: Actor
    report: HostReport


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """One replica's reservation and crews; the first crew has rank 0."""

    reservation: Reservation
    posts: list[Post]

    @property
    def addresses(self) -> dict[int, str]:
        """Of the node of each rank."""
        return {rank: post.address for post in self.posts for rank in post.ranks}

    @property
    def crews(self) -> dict[int, Actor]:
        """Of each rank."""
        return {rank: post.actor for post in self.posts for rank in post.ranks}

    @property
    def one_host(self) -> bool:
        """Whether all ranks can share memory."""
        return len({post.report.host for post in self.posts}) == 1


def place_name(model: str | None, number: int) -> str:
    """Of a replica's reservation. model: the detached model's name."""
    return f"replica {number}" if model is None else f"{model}/replica {number}"


async def recover_places(cluster: Cluster, model: str, size: int) -> dict[int, tuple[Place, EngineBootstrap | None]]:
    """The replicas of a detached model whose crews all answer, with the engine each runs; the others' are ended.

    size: ranks of a replica.
    """
    musters = await _musters(cluster, model)
    whole: dict[int, tuple[Place, EngineBootstrap | None]] = {}
    for number in sorted({number for number, _ in musters}):
        found = [musters[key] for key in sorted(musters) if key[0] == number]
        reservation = cluster.find_reservation(place_name(model, number))
        posts = [_post(actor, muster) for actor, muster in found]
        if reservation is None or sum(len(post.ranks) for post in posts) != size:
            end_crews(cluster, place_name(model, number))
            continue
        whole[number] = Place(reservation=reservation, posts=posts), found[0][1].engine
    return whole


def _post(actor: Actor, muster: Muster) -> Post:
    assigned = muster.assignment
    assert assigned is not None, "left out otherwise"
    return Post(
        ranks=assigned.ranks,
        node_id=assigned.node_id,
        address=assigned.address,
        actor=actor,
        report=assigned.report,
    )


async def _musters(cluster: Cluster, model: str) -> dict[tuple[int, int], tuple[Actor, Muster]]:
    """What each crew of a model says, by replica and index; those that do not answer are left out."""
    names = cluster.actor_names(f"{model}/")
    found = [actor for name in names if (actor := cluster.find_actor(name, f"the crew {name}")) is not None]
    calls = (actor.call("muster", timeout_s=ANSWER_TIMEOUT_S) for actor in found)
    musters = {}
    for actor, answer in zip(found, await asyncio.gather(*calls, return_exceptions=True), strict=True):
        if isinstance(answer, BaseException):
            continue
        muster = MUSTER.decode(answer)
        if muster.assignment is not None:
            musters[muster.assignment.number, muster.assignment.index] = (actor, muster)
    return musters


def end_crews(cluster: Cluster, place: str) -> None:
    """End the crews of a detached replica, or of all of a detached model by its name, and give their devices back."""
    places = {place}
    for name in cluster.actor_names(f"{place}/"):
        places.add(name.rpartition("/")[0])
        if (actor := cluster.find_actor(name, name)) is not None:
            actor.kill()
    for name in places:
        if (reservation := cluster.find_reservation(name)) is not None:
            cluster.release(reservation)
