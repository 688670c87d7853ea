"""What the kernel says of this host, read."""

from pathlib import Path

import pytest

from shoal.configs.host import memory_nodes


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
