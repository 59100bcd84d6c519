"""Main memory: how much there is, how much this process can still have, and its peak so far.

Available memory is the smallest of what the machine says (MemAvailable, or free and inactive
pages on macOS) and of what each memory cgroup leaves (see `cgroup`). It is a snapshot: other
processes can take it the next moment.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from nexus_ext.errors import UsageError
from nexus_ext.hardware.cgroup import memory_groups
from nexus_ext.hardware.system import System
from nexus_ext.units import GIB, MIB


@dataclass(frozen=True, slots=True)
class MemoryState:
    """Main memory, before its bandwidth is measured."""

    total_bytes: int
    available_bytes: int
    limit_bytes: int | None  # the tightest cgroup limit below total_bytes
    limit_source: str


def parse_kb_fields(text: str) -> dict[str, int]:
    """Return name -> bytes of the "Name: 12 kB" lines of /proc/meminfo or /proc/self/status."""
    matches = re.findall(r"^(\S+):\s+([0-9]+) kB$", text, re.MULTILINE)
    return {name: int(value) * 1024 for name, value in matches}


def meminfo_bytes(fields: Mapping[str, int]) -> tuple[int, int]:
    """Return (total, available) bytes of the fields of /proc/meminfo."""
    total = fields.get("MemTotal", 0)
    # Kernels before 3.14 have no MemAvailable; free pages and the page cache come close.
    older = sum(fields.get(name, 0) for name in ("MemFree", "Buffers", "Cached"))
    return total, min(total, fields.get("MemAvailable", older))


def parse_vm_stat(text: str) -> int:
    """Return the bytes that macOS could give out, from the text of `vm_stat`.

    Free, speculative (read ahead, unused) and inactive pages; compressed and wired ones are in use.
    """
    page = re.search(r"page size of ([0-9]+) bytes", text)
    page_bytes = int(page[1]) if page else 4096
    pages = dict(re.findall(r"^Pages ([a-z ]+):\s+([0-9]+)\.?$", text, re.MULTILINE))
    return page_bytes * sum(int(pages.get(n, 0)) for n in ("free", "speculative", "inactive"))


def read_memory(system: System) -> MemoryState:
    """Return total, available and limit of main memory as this process sees it."""
    if system.is_darwin:
        total = int(system.sysctl().get("hw.memsize", "0"))
        available = min(total, parse_vm_stat(system.run(["vm_stat"]) or ""))
    else:
        total, available = meminfo_bytes(parse_kb_fields(system.read("/proc/meminfo") or ""))
    if total == 0:
        raise UsageError(
            "the size of main memory cannot be read from this system",
            hint="Mount /proc, or give a profile of the machine (--hardware FILE).",
        )
    limit, source = None, ""
    for group in () if system.is_darwin else memory_groups(system):
        available = min(available, group.available_bytes)
        if group.limit_bytes < (total if limit is None else limit):
            limit, source = group.limit_bytes, group.path
    return MemoryState(total, available, limit, source)


def available_bytes(system: System | None = None) -> int:
    """Return the bytes that this process can still allocate without swapping or being killed."""
    return read_memory(system or System()).available_bytes


def process_peak_bytes(system: System | None = None) -> int:
    """Return the most resident memory that this process has had, file mappings included."""
    system = system or System()
    # Preferred over getrusage, whose peak on Linux survives exec: a small child of a large
    # process would report its parent's.
    status = parse_kb_fields(system.read("/proc/self/status") or "")
    if "VmHWM" in status:
        return status["VmHWM"]
    import resource  # absent on Windows, where nothing else of this module works either

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def bandwidth_buffer_bytes(available_bytes: int) -> int:
    """Return how much memory a bandwidth measurement may use, over all threads.

    Large beside any cache, and a tenth of what is available at most: measuring must not be what
    gets a process killed.
    """
    return min(GIB, max(16 * MIB, available_bytes // 10))
