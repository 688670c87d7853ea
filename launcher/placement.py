"""Which host runs which ranks: decided from what each host has free, before anything is reserved. Pure arithmetic.

The ranks of a tensor group go to one host when any host can hold them, the stages of a replica to as few hosts as
possible and next to their neighbours, and replicas to the hosts with most free, so that they spread.
"""

from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

Device = Literal["cpu", "cuda"]
UNIT = {"cpu": "CPU", "cuda": "GPU"}


class TooSmall(ValueError):
    """The hosts cannot hold what was asked for."""


class HostOffer(msgspec.Struct, frozen=True, kw_only=True):
    """A host and its whole devices of the wanted kind. total: it has; free: nobody has reserved them."""

    host: str
    name: str
    total: int
    free: int


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """The ranks of one replica on one host."""

    host: str
    ranks: list[int]


def place_replicas(
    offers: Sequence[HostOffer], tensor: int, pipeline: int, replicas: Iterable[int], device: Device
) -> dict[int, list[Share]]:
    """The shares of every replica, by its number; the first share holds rank 0.

    Raises TooSmall with the arithmetic when the hosts cannot hold them.
    """
    offers = sorted(offers, key=lambda offer: (offer.name, offer.host))
    group = tensor if any(offer.total >= tensor for offer in offers) else 1
    free = {offer.host: offer.free for offer in offers}
    numbers = list(replicas)
    placed: dict[int, list[Share]] = {}
    for number in numbers:
        hosts = _hosts_of_groups(free, group, tensor * pipeline // group)
        if hosts is None:
            raise TooSmall(_too_small(offers, tensor, pipeline, len(numbers), len(placed), group, UNIT[device]))
        placed[number] = _shares(hosts, group)
        for host in hosts:
            free[host] -= group
    return placed


def _hosts_of_groups(free: dict[str, int], group: int, count: int) -> list[str] | None:
    """The host of each group of ranks, in order; None when they do not fit."""
    whole = [host for host, left in free.items() if left >= group * count]
    if whole:
        return [max(whole, key=free.__getitem__)] * count
    hosts: list[str] = []
    for host in sorted(free, key=free.__getitem__, reverse=True):
        hosts += [host] * min(free[host] // group, count - len(hosts))
    return hosts if len(hosts) == count else None


def _shares(hosts: Sequence[str], group: int) -> list[Share]:
    ranks: dict[str, list[int]] = {}
    for index, host in enumerate(hosts):
        ranks.setdefault(host, []).extend(range(index * group, (index + 1) * group))
    return [Share(host=host, ranks=found) for host, found in ranks.items()]


def _too_small(
    offers: Sequence[HostOffer], tensor: int, pipeline: int, replicas: int, placed: int, group: int, unit: str
) -> str:
    """Why it does not fit, with every number."""
    size = tensor * pipeline
    total, free = sum(offer.total for offer in offers), sum(offer.free for offer in offers)
    hosts = "; ".join(f"{offer.name} has {offer.free} of {offer.total} free" for offer in offers) or "there is no host"
    together = f", {tensor} together on one host for each tensor group" if group == tensor > 1 else ""
    fix = (
        f"lower a size, wait until {unit}s are free, or add hosts"
        if total >= size * replicas
        else "lower a size or add hosts"
    )
    rehearsal = "; for a rehearsal `ray start --num-cpus N` may declare more than a host has" if unit == "CPU" else ""
    return (
        f"the cluster is too small: {replicas} {'replica' if replicas == 1 else 'replicas'} x tensor {tensor} x "
        f"pipeline {pipeline} = {size * replicas} {unit}s{together}, and {free} of its {total} {unit}s are free "
        f"({hosts}); {placed} of {replicas} {'replica fits' if replicas == 1 else 'replicas fit'}. {fix}{rehearsal}"
    )
