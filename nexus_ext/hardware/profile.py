"""What a machine can do, as plain values, and the JSON form that carries them to another machine.

Nothing is measured here and no file is opened. A profile is filled in by `hardware.probe` or
read from a file that describes some other machine; the solver cannot tell the two apart.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Final

from nexus_ext.hardware._json import Fields, parse_object

VERSION: Final = 1
PATTERNS: Final = ("sequential", "random")


@dataclass(frozen=True, slots=True)
class Cpu:
    """The processor, as far as this process may use it."""

    n_cores: int  # physical cores that the process may run on
    n_threads: int  # logical CPUs that the process may run on
    isa: tuple[str, ...]  # instruction sets that matter for kernels: "avx2", "neon", ...
    name: str
    n_performance_cores: int | None = None  # None: all cores are alike, or it is not known
    quota_cpus: float | None = None  # CPU time a second that cgroups allow; None: no quota

    @property
    def n_usable_cores(self) -> int:
        """Physical cores that the affinity mask and the quota leave, at least 1."""
        quota = self.n_cores if self.quota_cpus is None else math.ceil(self.quota_cpus)
        return max(1, min(self.n_cores, quota))


@dataclass(frozen=True, slots=True)
class Memory:
    """Main memory, and what the cgroups around this process leave of it."""

    total_bytes: int  # of the machine
    available_bytes: int  # when probed: of the machine and of every cgroup, the smallest
    limit_bytes: int | None  # the tightest cgroup limit; None: no limit below total_bytes
    bandwidth_bytes_s: float  # reading, all usable cores together
    limit_source: str = ""  # the cgroup that sets limit_bytes

    @property
    def usable_bytes(self) -> int:
        """Bytes that this process could ever have: the total, or the cgroup limit below it."""
        return self.total_bytes if self.limit_bytes is None else self.limit_bytes


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU as the runtime lists it."""

    name: str
    total_bytes: int
    free_bytes: int
    working_set_bytes: int  # what the driver lets one process use; total_bytes if no such limit
    unified: bool  # shares main memory: what it uses is taken from Memory
    bandwidth_bytes_s: float | None = None


@dataclass(frozen=True, slots=True)
class DiskPoint:
    """Cold read bandwidth for one way of reading."""

    block_bytes: int  # per request
    depth: int  # requests in flight
    pattern: str  # one of PATTERNS
    bytes_s: float


@dataclass(frozen=True, slots=True)
class Disk:
    """The disk that holds a path, and how fast it was read. Holds one sequential point or more."""

    path: str
    device: str
    filesystem: str
    direct: bool  # reads bypass the page cache
    direct_reason: str  # why not, when not direct
    offset_align: int
    mem_align: int
    points: tuple[DiskPoint, ...]
    how_cold: str  # what was done so that the points are not those of the page cache
    mount_point: str = ""
    rotational: bool | None = None  # None: the system does not tell
    engine: str = ""  # how the requests were issued

    @property
    def sequential_bytes_s(self) -> float:
        """The best sequential point: what the disk gives with the right block and depth."""
        return max(point.bytes_s for point in self.points if point.pattern == "sequential")

    def random_bytes_s(self, block_bytes: int) -> float:
        """Return the bandwidth of random reads of `block_bytes` each.

        Between measured blocks the bandwidth is interpolated over log2 of the block. Below the
        smallest one a request is taken to cost the same time; above the largest one bandwidth
        no longer grows. Without any random point the sequential ones stand in.
        """
        best = _best_by_block(p for p in self.points if p.pattern == "random")
        best = best or _best_by_block(self.points)
        blocks = sorted(best)
        if block_bytes <= blocks[0]:
            return best[blocks[0]] * max(block_bytes, 1) / blocks[0]
        for low, high in pairwise(blocks):
            if block_bytes <= high:
                share = math.log2(block_bytes / low) / math.log2(high / low)
                return best[low] + share * (best[high] - best[low])
        return best[blocks[-1]]


def _best_by_block(points: Iterable[DiskPoint]) -> dict[int, float]:
    best: dict[int, float] = {}
    for point in points:
        best[point.block_bytes] = max(point.bytes_s, best.get(point.block_bytes, 0.0))
    return best


@dataclass(frozen=True, slots=True)
class HardwareProfile:
    """All that the solver needs to know of a machine."""

    cpu: Cpu
    memory: Memory
    gpus: tuple[Gpu, ...]
    disk: Disk
    host: str = ""
    created_unix_s: int = 0  # when the bandwidths were measured; 0: not known

    def to_json(self) -> str:
        """Return the profile as JSON text that `from_json` reads back to an equal profile."""
        return json.dumps({"version": VERSION, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, *, source: str = "hardware profile") -> HardwareProfile:
        """Return the profile in `text`. FormatError names `source` and the field that is wrong."""
        fields = parse_object(text, source)
        version = fields.integer("version")
        if version != VERSION:
            raise fields.error("version", version, f"not {VERSION}, the version that is known")
        profile = cls(
            cpu=_cpu(fields.nested("cpu")),
            memory=_memory(fields.nested("memory")),
            gpus=tuple(_gpu(gpu) for gpu in fields.nested_list("gpus")),
            disk=_disk(fields.nested("disk")),
            host=fields.text("host", default=""),
            created_unix_s=fields.integer("created_unix_s", default=0),
        )
        fields.finish()
        return profile


def _cpu(fields: Fields) -> Cpu:
    cpu = Cpu(
        n_cores=fields.integer("n_cores", minimum=1),
        n_threads=fields.integer("n_threads", minimum=1),
        isa=fields.texts("isa"),
        name=fields.text("name"),
        n_performance_cores=fields.optional_integer("n_performance_cores", minimum=1),
        quota_cpus=fields.optional_rate("quota_cpus"),
    )
    fields.finish()
    return cpu


def _memory(fields: Fields) -> Memory:
    memory = Memory(
        total_bytes=fields.integer("total_bytes", minimum=1),
        available_bytes=fields.integer("available_bytes"),
        limit_bytes=fields.optional_integer("limit_bytes", minimum=1),
        bandwidth_bytes_s=fields.rate("bandwidth_bytes_s"),
        limit_source=fields.text("limit_source", default=""),
    )
    if memory.available_bytes > memory.usable_bytes:
        why = f"more than the {memory.usable_bytes} bytes that the machine or its limit has"
        raise fields.error("available_bytes", memory.available_bytes, why)
    if memory.limit_bytes is not None and memory.limit_bytes > memory.total_bytes:
        why = f"more than total_bytes, {memory.total_bytes}"
        raise fields.error("limit_bytes", memory.limit_bytes, why)
    fields.finish()
    return memory


def _gpu(fields: Fields) -> Gpu:
    gpu = Gpu(
        name=fields.text("name"),
        total_bytes=fields.integer("total_bytes", minimum=1),
        free_bytes=fields.integer("free_bytes"),
        working_set_bytes=fields.integer("working_set_bytes"),
        unified=fields.boolean("unified"),
        bandwidth_bytes_s=fields.optional_rate("bandwidth_bytes_s"),
    )
    for name, value in (("free", gpu.free_bytes), ("working_set", gpu.working_set_bytes)):
        if value > gpu.total_bytes:
            why = f"more than total_bytes, {gpu.total_bytes}"
            raise fields.error(f"{name}_bytes", value, why)
    fields.finish()
    return gpu


def _disk(fields: Fields) -> Disk:
    disk = Disk(
        path=fields.text("path"),
        device=fields.text("device"),
        filesystem=fields.text("filesystem"),
        direct=fields.boolean("direct"),
        direct_reason=fields.text("direct_reason"),
        offset_align=_alignment(fields, "offset_align"),
        mem_align=_alignment(fields, "mem_align"),
        points=tuple(_point(point) for point in fields.nested_list("points")),
        how_cold=fields.text("how_cold"),
        mount_point=fields.text("mount_point", default=""),
        rotational=fields.optional_boolean("rotational"),
        engine=fields.text("engine", default=""),
    )
    if not any(point.pattern == "sequential" for point in disk.points):
        raise fields.error("points", [], "without a sequential point")
    fields.finish()
    return disk


def _alignment(fields: Fields, name: str) -> int:
    value = fields.integer(name, minimum=1)
    if value & (value - 1):
        raise fields.error(name, value, "not a power of two")
    return value


def _point(fields: Fields) -> DiskPoint:
    point = DiskPoint(
        block_bytes=fields.integer("block_bytes", minimum=1),
        depth=fields.integer("depth", minimum=1),
        pattern=fields.text("pattern"),
        bytes_s=fields.rate("bytes_s"),
    )
    if point.pattern not in PATTERNS:
        raise fields.error("pattern", point.pattern, f"not one of {', '.join(PATTERNS)}")
    fields.finish()
    return point
