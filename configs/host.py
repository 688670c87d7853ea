"""What this host is and offers a process: its identity, cores it may use, memory it may still take; containers' limits
counted in."""

import os
from pathlib import Path

UNLIMITED = 1 << 62
CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def usable_cores() -> int:
    """CPU cores this process may run on."""
    return len(os.sched_getaffinity(0))


def memory_nodes(nodes: Path = Path("/sys/devices/system/node")) -> int:
    """Parts of this host's memory that have some of the usable cores of their own (NUMA nodes); 1 where the kernel does
    not say. nodes: where it says it.
    """
    lists = [path.read_text() for path in nodes.glob("node[0-9]*/cpulist")]
    return max(1, sum(not os.sched_getaffinity(0).isdisjoint(_cores(text)) for text in lists))


def _cores(text: str) -> set[int]:
    """Of a list such as 0-3,8."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def last_cache_bytes(cpus: Path = Path("/sys/devices/system/cpu")) -> int:
    """Of the usable cores' last caches, each counted once, as the kernel tells it; 0 where it does not. cpus: where it
    tells it.
    """
    found: dict[str, tuple[int, int]] = {}  # who shares it: level, bytes
    for core in os.sched_getaffinity(0):
        for cache in (cpus / f"cpu{core}" / "cache").glob("index*"):
            try:
                level, size, shared = (
                    (cache / name).read_text().strip() for name in ("level", "size", "shared_cpu_list")
                )
                entry = int(level), int(size[:-1]) << {"K": 10, "M": 20}[size[-1]]
            except (OSError, ValueError, LookupError):
                continue
            found[shared] = max(entry, found.get(shared, entry))
    last = max((level for level, _ in found.values()), default=0)
    return sum(size for level, size in found.values() if level == last)


def available_host_bytes() -> int:
    """Memory that could be taken now without swapping: the kernel's estimate, or what the container's limit leaves."""
    with open("/proc/meminfo") as lines:
        fields = dict(line.split(":", 1) for line in lines)
    return min(int(fields["MemAvailable"].split()[0]) * 1024, cgroup_available_bytes())


def cgroup_available_bytes() -> int:
    """What the container's memory limit leaves (cgroup v2, then v1); UNLIMITED without one."""
    for limit_file, used_file in CGROUP_FILES:
        try:
            with open(limit_file) as limit, open(used_file) as used:
                text = limit.read().strip()
                if text != "max":
                    return max(0, int(text) - int(used.read()))
        except (OSError, ValueError):
            continue
    return UNLIMITED


def host_id() -> str:
    """Of this boot of this machine and this network namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.stat('/proc/self/ns/net').st_ino}/{os.stat('/proc/self/ns/pid').st_ino}"
