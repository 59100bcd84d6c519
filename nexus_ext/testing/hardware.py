"""Machines that are only described: what a plan depends on, and nothing of the machine at hand."""

from __future__ import annotations

from nexus_ext.hardware import Cpu, Disk, DiskPoint, Gpu, HardwareProfile, Memory
from nexus_ext.units import parse_bytes

_BLOCK_BYTES = 1 << 20


def machine(
    *,
    ram: int | str = "8G",
    available: int | str | None = None,
    limit: int | str | None = None,
    cores: int = 2,
    disk_bytes_s: float = 1e9,
    memory_bytes_s: float = 2e10,
    gpus: tuple[Gpu, ...] = (),
) -> HardwareProfile:
    """Describe a machine to plan for.

    `available` is what of `ram` is free (half of it by default), `limit` that of a memory cgroup;
    sizes are bytes or texts such as "4G". The disk reads `disk_bytes_s` past the page cache.
    """
    total = _bytes(ram, "ram")
    point = DiskPoint(
        block_bytes=_BLOCK_BYTES, depth=16, pattern="sequential", bytes_s=disk_bytes_s
    )
    return HardwareProfile(
        cpu=Cpu(n_cores=cores, n_threads=cores, isa=("avx2",), name="modelled"),
        memory=Memory(
            total_bytes=total,
            available_bytes=total // 2 if available is None else _bytes(available, "available"),
            limit_bytes=None if limit is None else _bytes(limit, "limit"),
            bandwidth_bytes_s=memory_bytes_s,
        ),
        gpus=gpus,
        disk=Disk(
            path="/models",
            device="nvme0n1",
            filesystem="ext4",
            direct=True,
            direct_reason="",
            offset_align=512,
            mem_align=512,
            points=(point,),
            how_cold="not measured",
        ),
    )


def _bytes(size: int | str, what: str) -> int:
    return parse_bytes(size, what=what) if isinstance(size, str) else size
