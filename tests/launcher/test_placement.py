"""Placing ranks on hosts: tensor groups together, stages packed, replicas spread, refusals with the arithmetic."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.launcher.placement import HostOffer, place_replicas


def offers(*free: int, total: int | None = None) -> list[HostOffer]:
    return [
        HostOffer(host=f"id{index}", name=f"10.0.0.{index}", total=count if total is None else total, free=count)
        for index, count in enumerate(free)
    ]


def hosts(shares: list) -> list[tuple[str, list[int]]]:
    return [(share.host, share.ranks) for share in shares]


def test_replica_that_fits_one_host_is_there_whole() -> None:
    (shares,) = place_replicas(offers(2, 4, 3), 2, 2, [0], "cpu").values()
    assert hosts(shares) == [("id1", [0, 1, 2, 3])]


def test_replicas_spread_over_hosts() -> None:
    placed = place_replicas(offers(4, 4, 4), 2, 1, range(3), "cuda")
    assert sorted(share.host for shares in placed.values() for share in shares) == ["id0", "id1", "id2"]


def test_stages_are_packed_and_tensor_groups_stay_together() -> None:
    (shares,) = place_replicas(offers(3, 4, 3), 2, 4, [0], "cpu").values()
    assert hosts(shares) == [("id1", [0, 1, 2, 3]), ("id0", [4, 5]), ("id2", [6, 7])]


def test_tensor_group_larger_than_any_host_is_divided() -> None:
    (shares,) = place_replicas(offers(2, 1, 1), 4, 1, [0], "cuda").values()
    assert hosts(shares) == [("id0", [0, 1]), ("id1", [2]), ("id2", [3])]


def test_free_devices_that_no_tensor_group_can_use_together_do_not_count() -> None:
    with pytest.raises(ValueError, match=r"2 together on one host .* 3 of its 6 CPUs are free .*10.0.0.2 has 1 of 2"):
        place_replicas(offers(1, 1, 1, total=2), 2, 1, [0], "cpu")


def test_too_small_cluster_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(ValueError) as refusal:
        place_replicas(offers(2, 4), 2, 2, range(2), "cuda")
    text = str(refusal.value)
    assert "2 replicas x tensor 2 x pipeline 2 = 8 GPUs" in text and "6 of its 6 GPUs are free" in text
    assert "10.0.0.1 has 4 of 4 free" in text and "1 of 2 replicas fit" in text and "add hosts" in text


def test_no_host_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no host"):
        place_replicas([], 1, 1, [0], "cpu")


@given(
    free=st.lists(st.integers(0, 9), max_size=6),
    tensor=st.integers(1, 5),
    pipeline=st.integers(1, 4),
    replicas=st.integers(1, 4),
)
def test_every_rank_has_one_host_and_no_host_more_than_it_has(
    free: list[int], tensor: int, pipeline: int, replicas: int
) -> None:
    try:
        placed = place_replicas(offers(*free), tensor, pipeline, range(replicas), "cpu")
    except ValueError:
        return
    used: dict[str, int] = {}
    for shares in placed.values():
        assert [rank for share in shares for rank in share.ranks] == list(range(tensor * pipeline))
        for share in shares:
            used[share.host] = used.get(share.host, 0) + len(share.ranks)
            if max(free) >= tensor:
                assert all(
                    len([r for r in share.ranks if r // tensor == group]) in (0, tensor) for group in range(pipeline)
                )
    assert all(count <= free[int(host.removeprefix("id"))] for host, count in used.items())
