"""Measure this machine, or take the measurements of an earlier run.

Here the parts of the probe meet the world: files of the system, the clock, the cache directory.
What needs native code comes in as callables (disk reads, memory bandwidth, GPUs), so this package
depends on no binding and no model runtime.
"""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

from nexus_ext.errors import UsageError
from nexus_ext.hardware import cache
from nexus_ext.hardware.cpu import read_cpu
from nexus_ext.hardware.disk import (
    DirectIO,
    DiskReader,
    build_disk,
    drop_page_cache,
    is_rotational,
    measure_disk,
)
from nexus_ext.hardware.memory import bandwidth_buffer_bytes, read_memory
from nexus_ext.hardware.mounts import MEMORY_FILESYSTEMS, Mount, mount_of, read_mounts
from nexus_ext.hardware.profile import Cpu, Disk, Gpu, HardwareProfile, Memory
from nexus_ext.hardware.scratch import SMALLEST_TARGET_BYTES, probe_target
from nexus_ext.hardware.system import System
from nexus_ext.units import GIB

_log = logging.getLogger("nexus_ext.hardware")

# (threads, bytes of memory to use at most) -> bytes a second, read by all threads together
MemoryBandwidth = Callable[[int, int], float]

DISK_SECONDS: Final = 8.0


def probe(
    path: str | os.PathLike[str],
    *,
    disk_reader: DiskReader,
    memory_bandwidth: MemoryBandwidth,
    gpus: Callable[[], Sequence[Gpu]],
    direct_io: Callable[[str], DirectIO] | None = None,
    refresh: bool = False,
    disk_seconds: float = DISK_SECONDS,
    scratch_bytes: int = GIB,
    cache_dir: str | None = None,
    now_unix_s: int | None = None,
    system: System | None = None,
) -> HardwareProfile:
    """Return what this machine can do with the disk that holds `path`.

    `path` is the model, or any large file, or a directory; for a directory or a small file a
    scratch file of up to `scratch_bytes` is written next to it and removed. Reading the disk takes
    about `disk_seconds`, writing a scratch file half of that at most (64 MiB are always written).

    `direct_io` tells of a file whether and how it can be read around the page cache. Rates that
    were measured on this host and disk in the last 30 days are reused unless `refresh` is set; what
    changes from hour to hour (free memory, limits, GPUs) is asked each time.

    Raises UsageError for a path that cannot be used, ReadFailed when the disk gives nothing.
    """
    if not 0.0 < disk_seconds <= 3600.0:
        raise UsageError(f"disk_seconds is {disk_seconds}, which is not above 0 and up to 3600")
    system = system or System()
    real = os.path.realpath(path)
    now = int(time.time()) if now_unix_s is None else now_unix_s
    host = platform.node()
    mount = mount_of(real, read_mounts(system))
    if cache_dir is None:
        cache_dir = cache.default_cache_dir(os.environ, os.path.expanduser("~"))
    file = cache.cache_file(cache_dir, host, _disk_identity(real, mount))

    cpu = read_cpu(system)
    found_gpus = tuple(gpus())
    stored = None if refresh else cache.load_cached(file, host=host, now_unix_s=now)
    if stored is None:
        disk = _probe_disk(real, mount, disk_reader, direct_io, disk_seconds, scratch_bytes, system)
        created = now
    else:
        disk, created = replace(stored.disk, path=real), stored.created_unix_s
    if stored is None or _other_cores(cpu, stored.cpu):
        threads = cpu.n_usable_cores
        buffer_bytes = bandwidth_buffer_bytes(read_memory(system).available_bytes)
        bandwidth = memory_bandwidth(threads, buffer_bytes)
    else:
        bandwidth = stored.memory.bandwidth_bytes_s
    # Asked last: measuring takes memory of its own for a moment, and page cache is given back.
    state = read_memory(system)
    memory = Memory(
        total_bytes=state.total_bytes,
        available_bytes=state.available_bytes,
        limit_bytes=state.limit_bytes,
        bandwidth_bytes_s=bandwidth,
        limit_source=state.limit_source,
    )
    profile = HardwareProfile(cpu, memory, found_gpus, disk, host=host, created_unix_s=created)
    if stored is None or bandwidth != stored.memory.bandwidth_bytes_s:
        cache.store(file, profile)
    return profile


def load_profile(file: str | os.PathLike[str]) -> HardwareProfile:
    """Return the profile in a file, which may be of another machine.

    Where there is no such file, the name of an example that comes with the package does too.
    Raises UsageError when the file cannot be read, FormatError when it is not a profile.
    """
    name = os.fspath(file)
    known = example_profiles()
    place = known[name] if name in known and not os.path.exists(name) else name
    try:
        with open(place, encoding="utf-8") as stream:
            text = stream.read()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"the hardware profile {name!r} cannot be read: {error}",
            hint=f"Give a file that the probe wrote, or one of: {', '.join(known)}.",
        ) from error
    return HardwareProfile.from_json(text, source=name)


def example_profiles() -> dict[str, str]:
    """Return name -> path of the profiles that come with the package: typical, not measured."""
    directory = os.path.join(os.path.dirname(__file__), "examples")
    names = sorted(name for name in os.listdir(directory) if name.endswith(".json"))
    return {name.removesuffix(".json"): os.path.join(directory, name) for name in names}


def _probe_disk(
    real: str,
    mount: Mount | None,
    reader: DiskReader,
    direct_io: Callable[[str], DirectIO] | None,
    seconds: float,
    scratch_bytes: int,
    system: System,
) -> Disk:
    budget_ns = int(seconds * 1e9)
    if mount is not None and mount.filesystem in MEMORY_FILESYSTEMS:
        # A scratch file there takes memory, and its speed says little of any disk.
        scratch_bytes = min(scratch_bytes, SMALLEST_TARGET_BYTES)
    with probe_target(real, scratch_bytes=scratch_bytes, write_ns=budget_ns // 2) as target:
        _log.info("measuring the disk of %s for about %.0f s", target.path, seconds)
        can_drop = drop_page_cache(target.path)
        info = None if direct_io is None else direct_io(target.path)
        measured = measure_disk(target, reader, budget_ns=budget_ns)
    rotational = None if mount is None else is_rotational(system, mount)
    return build_disk(
        real, target, measured, mount, rotational=rotational, direct_io=info, can_drop=can_drop
    )


def _disk_identity(real: str, mount: Mount | None) -> str:
    """Return what tells one disk of a host from another.

    st_dev alone does not: virtual file systems are numbered anew at each boot.
    """
    try:
        device = os.stat(real).st_dev
    except OSError as error:
        raise UsageError(
            f"{real!r} cannot be probed: {error.strerror}",
            hint="Give an existing file, best the model, or a directory.",
        ) from error
    if mount is None:
        return str(device)
    return f"{device} {mount.source} {mount.filesystem} {mount.mount_point}"


def _other_cores(now: Cpu, then: Cpu) -> bool:
    return (now.name, now.n_usable_cores) != (then.name, then.n_usable_cores)
