"""Vitals: what a process and its descendants use, from /proc: memory, threads, descriptors, shared memory files."""

import os
from pathlib import Path

import msgspec

SHM = Path("/dev/shm")
PREFIX = "shoal"


class Vitals(msgspec.Struct, frozen=True, kw_only=True):
    """Sums over a process and all its descendants, without pages shared by several (memory is proportional set size
    where it may be read, else resident). shm_files: Shoal's in /dev/shm.
    """

    processes: int
    memory_bytes: int
    threads: int
    descriptors: int
    shm_files: int


def read_vitals(pid: int | None = None) -> Vitals:
    """Of this process, or of pid."""
    pids = _family(os.getpid() if pid is None else pid)
    memory = threads = descriptors = 0
    for each in pids:
        folder = Path(f"/proc/{each}")
        try:
            memory += _memory_bytes(folder)
            threads += len(os.listdir(folder / "task"))
            descriptors += len(os.listdir(folder / "fd"))
        except OSError:
            continue  # it has just ended
    files = [name for name in os.listdir(SHM) if PREFIX in name] if SHM.is_dir() else []
    return Vitals(
        processes=len(pids), memory_bytes=memory, threads=threads, descriptors=descriptors, shm_files=len(files)
    )


def _family(root: int) -> list[int]:
    """A process and its descendants."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(folder.name))
    found, todo = [], [root]
    while todo:
        pid = todo.pop()
        found.append(pid)
        todo += children.get(pid, [])
    return found


def _memory_bytes(folder: Path) -> int:
    try:
        for line in (folder / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
