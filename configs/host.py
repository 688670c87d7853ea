"""What this host offers a process: cores it may use and memory it may still take. Containers' limits are counted in."""

import os

UNLIMITED = 1 << 62
CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def usable_cores() -> int:
    """CPU cores this process may run on."""
    return len(os.sched_getaffinity(0))


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
