"""What the kernel says of this host, read."""

from pathlib import Path

import pytest

from shoal.configs.host import last_cache_bytes, memory_nodes


@pytest.mark.parametrize(
    ("lists", "expected"),
    [
        ([], 1),
        (["0-7\n"], 1),
        (["0-3\n", "4-7\n"], 2),
        (["0-7\n", "\n"], 1),  # memory without cores
        (["0,2,4-7\n", "1,3\n", "8-15,64\n"], 2),  # the last one's cores are not for this process
    ],
)
def test_memory_nodes_are_those_of_the_usable_cores(
    lists: list[str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {1, 3, 4, 5})
    for index, text in enumerate(lists):
        (tmp_path / f"node{index}").mkdir()
        (tmp_path / f"node{index}" / "cpulist").write_text(text)
    (tmp_path / "possible").write_text("0-1")
    assert memory_nodes(tmp_path) == expected


def test_the_last_caches_of_the_usable_cores_are_counted_once_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cache(core: int, index: int, **entries: str) -> None:
        folder = tmp_path / f"cpu{core}" / "cache" / f"index{index}"
        folder.mkdir(parents=True)
        for name, text in entries.items():
            (folder / name).write_text(text + "\n")

    for core in range(6):
        first = core // 2 * 2
        cache(core, 2, level="2", size="512K", shared_cpu_list=str(core))
        cache(core, 3, level="3", size="32M", shared_cpu_list=f"{first}-{first + 1}")
    cache(0, 9, level="4", size="", shared_cpu_list="0-5")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2})
    assert last_cache_bytes(tmp_path) == 2 * 32 << 20
    assert last_cache_bytes(tmp_path / "nowhere") == 0
