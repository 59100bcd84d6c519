"""What control groups leave to this process: memory and processor time, versions 1 and 2.

A limit binds everything below it, so all groups from the process's own up to the root of the
mount are looked at. Of groups above the mount (outside of a container) only version 1 tells, and
only their memory limit.

What a group still has: its limit, minus what it uses, plus the page cache that the kernel would
give up first. The page cache of files counts as use, but is dropped when the group needs memory;
pages that are mapped (in use by some process) or not yet written back are not counted as free.
Version 2 calls its soft ceiling memory.high: above it a process is throttled until it crawls, so
here it counts as a limit, like memory.max.

Sources: cgroups(7); kernel documentation, admin-guide/cgroup-v1/memory and admin-guide/cgroup-v2.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable
from dataclasses import dataclass

from nexus_ext.hardware.mounts import Mount, read_mounts
from nexus_ext.hardware.system import System

# Version 1 writes "no limit" as the largest multiple of a page below 2^63.
_UNLIMITED = 1 << 62


@dataclass(frozen=True, slots=True)
class GroupMemory:
    """The memory of one group with a limit."""

    path: str  # directory of the group
    limit_bytes: int
    usage_bytes: int
    reclaimable_bytes: int  # page cache within usage_bytes

    @property
    def available_bytes(self) -> int:
        """What can still be allocated before the limit bites."""
        used = max(0, self.usage_bytes - self.reclaimable_bytes)
        return max(0, self.limit_bytes - used)


def parse_cgroup(text: str) -> dict[str, str]:
    """Return controller -> path of /proc/<pid>/cgroup; the path of version 2 is under ""."""
    paths = {}
    for line in text.splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, separator, path = rest.partition(":")
        if separator and hierarchy.isdigit():
            for controller in controllers.split(","):
                paths[controller] = path
    return paths


def group_directories(
    controller: str, paths: dict[str, str], mounts: Iterable[Mount]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the group directories, own first, then ancestors: (of version 1, of version 2)."""
    v1: tuple[str, ...] = ()
    v2: tuple[str, ...] = ()
    for mount in mounts:
        if mount.filesystem == "cgroup" and controller in mount.options and controller in paths:
            v1 = v1 or _chain(mount, paths[controller])
        elif mount.filesystem == "cgroup2" and "" in paths:
            v2 = v2 or _chain(mount, paths[""])
    return v1, v2


def _chain(mount: Mount, path: str) -> tuple[str, ...]:
    # A container often sees its own group mounted as the root of the hierarchy while
    # /proc/self/cgroup still tells the path on the host: then only the mount itself is visible.
    root = mount.root.rstrip("/")
    visible = path == root or path.startswith(root + "/")
    below = path[len(root) :].strip("/") if visible else ""
    if ".." in below.split("/"):
        below = ""
    chain = []
    while below:
        chain.append(posixpath.join(mount.mount_point, below))
        below = posixpath.dirname(below)
    return (*chain, mount.mount_point)


def parse_stat(text: str) -> dict[str, int]:
    """Return the "name value" lines of memory.stat or cpu.stat."""
    values = {}
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        if value.strip().isdigit():
            values[name] = int(value)
    return values


def reclaimable_v1(stat: dict[str, int]) -> int:
    """Return the droppable page cache of a group of version 1, with the groups below it."""
    # The total_ fields count the groups below too, as usage_in_bytes does.
    prefix = "total_" if "total_inactive_file" in stat else ""
    return _droppable(stat, prefix, "mapped_file", "dirty", "writeback")


def reclaimable_v2(stat: dict[str, int]) -> int:
    """Return the droppable page cache and kernel caches of a group of version 2."""
    cache = _droppable(stat, "", "file_mapped", "file_dirty", "file_writeback")
    return cache + stat.get("slab_reclaimable", 0)


def _droppable(stat: dict[str, int], prefix: str, *kept: str) -> int:
    cache = stat.get(prefix + "inactive_file", 0) + stat.get(prefix + "active_file", 0)
    return max(0, cache - sum(stat.get(prefix + name, 0) for name in kept))


def memory_groups(system: System) -> tuple[GroupMemory, ...]:
    """Return every group around this process that has a memory limit, own group first."""
    v1, v2 = _directories(system, "memory")
    groups = []
    for path in v1:
        stat = parse_stat(system.read(f"{path}/memory.stat") or "")
        limit = _number(system.read(f"{path}/memory.limit_in_bytes"))
        usage = _number(system.read(f"{path}/memory.usage_in_bytes"))
        if path == v1[-1]:
            # In a container this is the one word about groups above the visible ones.
            above = _number(str(stat.get("hierarchical_memory_limit", "")))
            limit = min((n for n in (limit, above) if n is not None), default=None)
        if limit is not None:
            groups.append(GroupMemory(path, limit, usage or 0, reclaimable_v1(stat)))
    for path in v2:
        limits = [_number(system.read(f"{path}/memory.{name}")) for name in ("max", "high")]
        finite = [limit for limit in limits if limit is not None]
        if finite:
            usage = _number(system.read(f"{path}/memory.current"))
            stat = parse_stat(system.read(f"{path}/memory.stat") or "")
            groups.append(GroupMemory(path, min(finite), usage or 0, reclaimable_v2(stat)))
    return tuple(groups)


def cpu_quota(system: System) -> float | None:
    """Return the CPUs' worth of time that the tightest group allows, None without a quota."""
    v1, v2 = _directories(system, "cpu")
    quotas = []
    for path in v1:
        quota = _number(system.read(f"{path}/cpu.cfs_quota_us"))
        period = _number(system.read(f"{path}/cpu.cfs_period_us"))
        if quota and period:
            quotas.append(quota / period)
    for path in v2:
        words = (system.read(f"{path}/cpu.max") or "").split()
        if len(words) == 2:
            quota, period = _number(words[0]), _number(words[1])
            if quota and period:
                quotas.append(quota / period)
    return min(quotas, default=None)


def _directories(system: System, controller: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    paths = parse_cgroup(system.read("/proc/self/cgroup") or "")
    return group_directories(controller, paths, read_mounts(system))


def _number(text: str | None) -> int | None:
    """Return the number in a control file; None when absent, "max", -1 or beyond any memory."""
    text = (text or "").strip()
    value = int(text) if text.isdigit() else None
    return None if value is None or value >= _UNLIMITED else value
