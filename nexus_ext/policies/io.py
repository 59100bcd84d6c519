"""The built-in I/O policy: the page cache when all that is streamed fits in it, else direct reads.

Weights are read in the same order for every token. A page cache that is a little too small for such
a cyclic scan keeps nothing until it is needed again: every read misses, pays for a copy, and
pushes other memory out. There is no useful middle, hence the margin.
"""

from __future__ import annotations

from nexus_ext.hookspecs import hookimpl
from nexus_ext.policies.base import IoInfo, IoMode, IoPolicy

# Part of the free memory that may be counted on: other processes and the kernel take some of it
# later, and a wrong "buffered" costs far more than a wrong "direct".
USABLE_SHARE = 0.75


class FitsPageCache:
    """Read through the page cache when it can hold everything that is streamed."""

    name = "fits-page-cache"

    def choose(self, info: IoInfo) -> IoMode:
        room_bytes = info.available_bytes
        if info.limit_bytes is not None:
            # In a memory cgroup the page cache counts against the limit as well.
            room_bytes = min(room_bytes, info.limit_bytes)
        room_bytes -= info.resident_bytes
        return "buffered" if info.streamed_bytes <= room_bytes * USABLE_SHARE else "direct"


@hookimpl
def nexus_io_policy() -> IoPolicy:
    return FitsPageCache()
