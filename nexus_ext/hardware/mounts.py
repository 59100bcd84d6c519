"""Mounted file systems: which one holds a path, and on what device.

Parses the texts of /proc/self/mountinfo (Linux) and `mount` (macOS). Says nothing of speed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from nexus_ext.hardware.system import System

# What lives in memory: reads of it measure memory, and writes to it take memory.
MEMORY_FILESYSTEMS = frozenset({"tmpfs", "ramfs", "devtmpfs"})


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of the mount table."""

    mount_point: str
    root: str  # the directory of the file system that is mounted there
    device: str  # "major:minor", "" where the system does not tell
    filesystem: str
    source: str  # usually a device node
    options: tuple[str, ...]  # of the file system; names the controllers of a cgroup mount


def parse_mountinfo(text: str) -> tuple[Mount, ...]:
    """Return the mounts of /proc/<pid>/mountinfo, in order. Lines that break the form are left out.

    Source: proc_pid_mountinfo(5).
    """
    mounts = []
    for line in text.splitlines():
        head, separator, tail = line.partition(" - ")
        left, right = head.split(), tail.split()
        if not separator or len(left) < 6 or len(right) < 2:
            continue
        mounts.append(
            Mount(
                mount_point=_unescape(left[4]),
                root=_unescape(left[3]),
                device=left[2],
                filesystem=right[0],
                source=_unescape(right[1]),
                options=tuple(right[2].split(",")) if len(right) > 2 else (),
            )
        )
    return tuple(mounts)


_DARWIN_MOUNT = re.compile(r"(?P<source>.+?) on (?P<point>/.*) \((?P<options>[^()]*)\)")


def parse_darwin_mount(text: str) -> tuple[Mount, ...]:
    """Return the mounts that `mount` prints on macOS."""
    mounts = []
    for line in text.splitlines():
        match = _DARWIN_MOUNT.fullmatch(line.strip())
        if match:
            filesystem, *options = [option.strip() for option in match["options"].split(",")]
            mounts.append(
                Mount(match["point"], "/", "", filesystem, match["source"], tuple(options))
            )
    return tuple(mounts)


def mount_of(path: str, mounts: Iterable[Mount]) -> Mount | None:
    """Return the mount that holds `path` (absolute, without links): the longest prefix.

    Of several mounts on one point the last is the one on top.
    """
    found: Mount | None = None
    for mount in mounts:
        point = mount.mount_point.rstrip("/")
        inside = path == point or path.startswith(point + "/")
        if inside and (found is None or len(mount.mount_point) >= len(found.mount_point)):
            found = mount
    return found


def read_mounts(system: System) -> tuple[Mount, ...]:
    """Return the mounts that this process sees; empty where the system does not tell."""
    if system.is_darwin:
        return parse_darwin_mount(system.run(["mount"]) or "")
    return parse_mountinfo(system.read("/proc/self/mountinfo") or "")


def _unescape(text: str) -> str:
    # The kernel writes space, tab, newline and backslash as three octal digits.
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
