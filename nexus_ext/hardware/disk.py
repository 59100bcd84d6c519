"""How fast a disk is read cold: block sizes, queue depths, sequential and random.

The reads themselves are done by a callable, the native I/O engine; here is decided what is read,
how often and for how long. Machines are noisy, so every point is measured in several short runs,
spread over the whole time, and keeps their median.
"""

from __future__ import annotations

import logging
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from nexus_ext.errors import ReadFailed
from nexus_ext.hardware.mounts import MEMORY_FILESYSTEMS, Mount
from nexus_ext.hardware.profile import Disk, DiskPoint
from nexus_ext.hardware.scratch import Target
from nexus_ext.hardware.system import System
from nexus_ext.units import GIB, KIB, MIB, format_bytes

_log = logging.getLogger("nexus_ext.hardware")

# (path, block_bytes, depth, random, max_bytes, max_ns) -> (bytes, ns, direct, engine)
# Each call should read another part of the file than the last: caches of a drive or a hypervisor
# cannot be dropped from here.
DiskReader = Callable[[str, int, int, bool, int, int], tuple[int, int, bool, str]]

REPEATS: Final = 3
_RUN_LARGEST_BYTES: Final = GIB


@dataclass(frozen=True, slots=True)
class DirectIO:
    """Whether a file can be read around the page cache, and with what alignment."""

    direct: bool
    reason: str  # why not
    offset_align: int
    mem_align: int


@dataclass(frozen=True, slots=True)
class Shape:
    """One way of reading."""

    block_bytes: int
    depth: int
    random: bool


@dataclass(frozen=True, slots=True)
class Measured:
    """What the runs gave."""

    points: tuple[DiskPoint, ...]
    direct: bool
    engine: str


# The most telling first: when time runs out, the later ones are missing.
SHAPES: Final = tuple(
    [Shape(block, depth, False) for depth in (16, 8, 32, 1) for block in
     (MIB, 512 * KIB, 2 * MIB, 128 * KIB)]
    + [Shape(block, 16, True) for block in (MIB, 256 * KIB, 4 * MIB, 64 * KIB)]
)  # fmt: skip


def measure_disk(
    target: Target,
    reader: DiskReader,
    *,
    budget_ns: int,
    shapes: tuple[Shape, ...] = SHAPES,
    clock: Callable[[], int] = time.monotonic_ns,
) -> Measured:
    """Measure every shape that fits into the file, in about `budget_ns` altogether.

    Each of the REPEATS rounds runs all shapes once, every other round backwards, so that a slow
    spell of the machine hits one run of many points and not all runs of one. Past the budget no
    further run starts, once there is a sequential point. ReadFailed when nothing could be read.
    """
    fitting = [shape for shape in shapes if shape.block_bytes <= target.nbytes]
    # A quarter is left for opening the file, for memory, and for the reads that are still under way
    # when a run's time is over.
    run_ns = max(1, budget_ns * 3 // 4 // max(1, REPEATS * len(fitting)))
    max_bytes = min(target.nbytes, _RUN_LARGEST_BYTES)
    samples: dict[Shape, list[float]] = {shape: [] for shape in fitting}
    deadline = clock() + budget_ns
    all_direct, last_engine, have_sequential, late = True, "", False, False
    for round_index in range(REPEATS):
        for shape in fitting if round_index % 2 == 0 else reversed(fitting):
            late = late or clock() >= deadline
            if late and have_sequential:
                continue
            drop_page_cache(target.path)
            n_bytes, ns, direct, engine = reader(
                target.path, shape.block_bytes, shape.depth, shape.random, max_bytes, run_ns
            )
            if n_bytes > 0 and ns > 0:
                samples[shape].append(n_bytes * 1e9 / ns)
                all_direct, last_engine = all_direct and direct, engine
                have_sequential = have_sequential or not shape.random
    if not have_sequential:
        raise ReadFailed(
            f"{target.path!r} ({target.nbytes} bytes) gave no bytes when its disk was measured",
            hint="Give an existing large file, best the model itself.",
            path=target.path,
        )
    n_missing = REPEATS * len(fitting) - sum(map(len, samples.values()))
    if n_missing:
        _log.warning("the disk is slow: %d of its short runs were left out for time", n_missing)
    points = [
        DiskPoint(
            shape.block_bytes, shape.depth, "random" if shape.random else "sequential",
            statistics.median(values),
        )
        for shape, values in samples.items() if values
    ]  # fmt: skip
    points.sort(key=lambda point: (point.pattern != "sequential", point.block_bytes, point.depth))
    return Measured(tuple(points), all_direct, last_engine)


def drop_page_cache(path: str) -> bool:
    """Drop the clean pages of a file from the page cache; False where that cannot be asked for."""
    if not hasattr(os, "posix_fadvise"):
        return False
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        _log.debug("posix_fadvise(%s): %s", path, error.strerror)
        return False
    finally:
        os.close(fd)
    return True


def how_cold(*, direct: bool, filesystem: str, can_drop: bool, target: Target) -> str:
    """Say in words what kept the page cache out of the measurement."""
    kind = "a scratch file, written and synced" if target.scratch else "an existing file"
    what = f"{kind}, {format_bytes(target.nbytes)}"
    if filesystem in MEMORY_FILESYSTEMS:
        return f"not cold: {filesystem} keeps files in memory ({what})"
    if direct:
        return f"direct reads, around the page cache; caches of drive or host not dropped ({what})"
    if can_drop:
        return f"buffered reads, posix_fadvise(DONTNEED) before every run ({what})"
    return f"not cold: buffered reads, and the page cache cannot be dropped ({what})"


def is_rotational(system: System, mount: Mount) -> bool | None:
    """Return whether the device of a mount has spinning platters; None where nothing tells."""
    device: str | None = mount.device
    if mount.device.startswith("0:"):
        # btrfs and others show a number of their own, and the device only as the source.
        device = system.device_number(mount.source) if mount.source.startswith("/") else None
    if not device:
        return None
    # A partition has no queue of its own; its parent directory is the disk.
    for place in ("queue", "../queue"):
        text = system.read(f"/sys/dev/block/{device}/{place}/rotational")
        if text is not None:
            return text.strip() == "1"
    return None


def build_disk(
    path: str,
    target: Target,
    measured: Measured,
    mount: Mount | None,
    *,
    rotational: bool | None,
    direct_io: DirectIO | None,
    can_drop: bool,
) -> Disk:
    """Put together what is known of the disk of `path`."""
    filesystem = mount.filesystem if mount else ""
    reason = "" if direct_io is None else direct_io.reason
    if not measured.direct and not reason:
        reason = "the reader had to use buffered reads"
    return Disk(
        path=path,
        device=device_name(mount),
        filesystem=filesystem,
        direct=measured.direct,
        direct_reason="" if measured.direct else reason,
        offset_align=4096 if direct_io is None else direct_io.offset_align,
        mem_align=4096 if direct_io is None else direct_io.mem_align,
        points=measured.points,
        how_cold=how_cold(
            direct=measured.direct, filesystem=filesystem, can_drop=can_drop, target=target
        ),
        mount_point=mount.mount_point if mount else "",
        rotational=rotational,
        engine=measured.engine,
    )


def device_name(mount: Mount | None) -> str:
    """Return the device node of a mount, or its number where it has no node."""
    if mount is None:
        return ""
    return mount.source if mount.source.startswith("/") else mount.device or mount.source
