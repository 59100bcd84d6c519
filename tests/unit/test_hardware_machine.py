"""Processor, memory and mounts, from the texts that Linux and macOS give."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from nexus_ext.errors import UsageError
from nexus_ext.hardware.cpu import count_cores, parse_cpu_list, parse_cpuinfo, read_cpu
from nexus_ext.hardware.disk import is_rotational
from nexus_ext.hardware.memory import (
    available_bytes,
    bandwidth_buffer_bytes,
    meminfo_bytes,
    parse_kb_fields,
    parse_vm_stat,
    process_peak_bytes,
    read_memory,
)
from nexus_ext.hardware.mounts import Mount, mount_of, parse_darwin_mount, parse_mountinfo
from nexus_ext.hardware.system import System
from nexus_ext.units import GIB, MIB

XEON = """\
processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Processor
flags\t\t: fpu sse4_2 ssse3 fma avx f16c avx2 bmi2 avx512f avx512_vnni avx_vnni amx_tile amx_int8

processor\t: 1
model name\t: another
"""
GRAVITON = """\
processor\t: 0
BogoMIPS\t: 2100.00
Features\t: fp asimd evtstrm aes fphp asimdhp asimddp sve i8mm bf16
CPU implementer\t: 0x41
"""
M1_MAX_SYSCTL_HW = """\
hw.ncpu: 10
hw.memsize: 34359738368
hw.physicalcpu: 10
hw.logicalcpu: 10
hw.perflevel0.physicalcpu: 8
hw.perflevel1.physicalcpu: 2
hw.optional.neon: 1
hw.optional.arm.FEAT_DotProd: 1
hw.optional.arm.FEAT_FP16: 1
hw.optional.arm.FEAT_I8MM: 0
"""
M1_MAX_SYSCTL_CPU = "machdep.cpu.cores_per_package: 10\nmachdep.cpu.brand_string: Apple M1 Max\n"
M1_MAX_VM_STAT = """\
Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                              123456.
Pages active:                            700000.
Pages inactive:                          600000.
Pages speculative:                        10000.
Pages throttled:                              0.
Pages wired down:                        200000.
Pages purgeable:                           5000.
"Translation faults":                 987654321.
"""
M1_MAX_MOUNT = """\
/dev/disk3s1s1 on / (apfs, sealed, local, read-only, journaled)
devfs on /dev (devfs, local, nobrowse)
/dev/disk3s5 on /System/Volumes/Data (apfs, local, journaled, nobrowse, protect)
/dev/disk5s1 on /Volumes/My (old) Disk (apfs, local, nodev)
"""


def m1_max() -> System:
    return System(
        platform="darwin",
        commands={
            ("sysctl", "hw"): M1_MAX_SYSCTL_HW,
            ("sysctl", "machdep.cpu"): M1_MAX_SYSCTL_CPU,
            ("vm_stat",): M1_MAX_VM_STAT,
            ("mount",): M1_MAX_MOUNT,
        },
    )


def test_instruction_sets_and_name_of_an_x86_processor() -> None:
    name, isa = parse_cpuinfo(XEON)
    assert name == "Intel(R) Xeon(R) Processor"
    assert {"avx2", "avx512f", "avx512_vnni", "amx_int8"} <= set(isa)
    assert "neon" not in isa


def test_instruction_sets_of_an_arm_processor() -> None:
    assert parse_cpuinfo(GRAVITON) == ("", ("neon", "fp16", "dotprod", "i8mm", "bf16", "sve"))


def test_cpu_lists_are_read_as_the_kernel_writes_them() -> None:
    assert parse_cpu_list("0-2,8\n") == {0, 1, 2, 8}
    assert parse_cpu_list("") == parse_cpu_list("\n") == parse_cpu_list("a-b") == frozenset()


def test_cores_are_counted_once_for_all_their_allowed_threads() -> None:
    siblings = {0: "0,4", 4: "0,4", 1: "1,5", 5: "1,5"}
    assert count_cores(siblings, [0, 1, 4, 5]) == 2
    assert count_cores(siblings, [0, 4]) == 1
    assert count_cores({}, [0, 1, 2]) == 3


def test_a_process_bound_to_some_cpus_counts_only_those(tmp_path: Path) -> None:
    for number in range(8):
        topology = tmp_path / f"sys/devices/system/cpu/cpu{number}/topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(f"{number % 4},{number % 4 + 4}\n")
    fast = tmp_path / "sys/devices/cpu_core/cpus"
    fast.parent.mkdir(parents=True)
    fast.write_text("0,4\n")
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(XEON)
    cpu = read_cpu(System(str(tmp_path), platform="linux"), frozenset({0, 1, 4}))
    assert (cpu.n_cores, cpu.n_threads, cpu.n_performance_cores) == (2, 3, 1)


def test_macos_tells_cores_memory_and_instruction_sets() -> None:
    cpu = read_cpu(m1_max())
    assert (cpu.n_cores, cpu.n_threads, cpu.n_performance_cores) == (10, 10, 8)
    assert (cpu.name, cpu.isa) == ("Apple M1 Max", ("neon", "fp16", "dotprod"))
    memory = read_memory(m1_max())
    assert memory.total_bytes == 32 * GIB
    assert memory.available_bytes == 16384 * (123456 + 10000 + 600000)
    assert memory.limit_bytes is None


def test_vm_stat_without_anything_known_is_nothing_available() -> None:
    assert parse_vm_stat("") == 0


def test_meminfo_of_old_kernels_has_no_available_field() -> None:
    fields = parse_kb_fields("MemTotal: 1000 kB\nMemFree: 100 kB\nBuffers: 1 kB\nCached: 200 kB\n")
    assert meminfo_bytes(fields) == (1000 * 1024, 301 * 1024)


def test_a_system_that_does_not_tell_its_memory_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="main memory"):
        read_memory(System(str(tmp_path), platform="linux"))


def test_the_peak_of_a_process_covers_what_it_allocated_and_gave_back() -> None:
    before = process_peak_bytes()
    block = bytearray(b"x") * (64 * MIB)
    del block
    after = process_peak_bytes()
    assert after >= before
    assert after >= 64 * MIB


def test_the_peak_is_this_process_own_and_not_its_parents() -> None:
    block = bytearray(b"x") * (300 * MIB)
    script = "from nexus_ext.hardware import process_peak_bytes; print(process_peak_bytes())"
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True, text=True, check=True, timeout=60,
        env={"PYTHONPATH": ":".join(filter(None, sys.path))},
    )  # fmt: skip
    assert len(block) == 300 * MIB
    assert 4 * MIB < int(done.stdout) < 200 * MIB


def test_available_memory_lies_within_the_machine() -> None:
    assert 0 < available_bytes() <= read_memory(System()).total_bytes


def test_measuring_bandwidth_takes_a_tenth_of_what_is_available_at_most() -> None:
    assert bandwidth_buffer_bytes(64 * GIB) == GIB
    assert bandwidth_buffer_bytes(4 * GIB) == 4 * GIB // 10
    assert bandwidth_buffer_bytes(0) == 16 * MIB


MOUNTINFO = """\
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw
30 27 259:3 / /data rw shared:7 master:2 - xfs /dev/nvme0n1p3 rw
31 30 0:40 / /data/my\\040models rw - btrfs /dev/sdb1 rw
32 30 259:9 / /data rw - ext4 /dev/nvme1n1 rw
"""


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("/", "/dev/vda"),
        ("/database/m.gguf", "/dev/vda"),
        ("/data", "/dev/nvme1n1"),  # the later mount lies on top
        ("/data/m.gguf", "/dev/nvme1n1"),
        ("/data/my models/m.gguf", "/dev/sdb1"),
    ],
)
def test_the_longest_mount_point_holds_a_path(path: str, source: str) -> None:
    mount = mount_of(path, parse_mountinfo(MOUNTINFO))
    assert mount is not None
    assert mount.source == source


def test_macos_mounts_are_read_with_parentheses_in_names() -> None:
    mounts = parse_darwin_mount(M1_MAX_MOUNT)
    disk = mount_of("/Volumes/My (old) Disk/m.gguf", mounts)
    assert disk is not None
    assert (disk.source, disk.filesystem) == ("/dev/disk5s1", "apfs")
    assert len(mounts) == 4


def test_a_partition_takes_rotational_from_its_disk(tmp_path: Path) -> None:
    disk = tmp_path / "sys/devices/pci/block/sda"
    (disk / "sda1").mkdir(parents=True)
    (disk / "queue").mkdir()
    (disk / "queue/rotational").write_text("1\n")
    nodes = tmp_path / "sys/dev/block"
    nodes.mkdir(parents=True)
    (nodes / "8:1").symlink_to(disk / "sda1")
    (nodes / "8:0").symlink_to(disk)
    system = System(str(tmp_path), platform="linux")
    for device, expected in (("8:1", True), ("8:0", True), ("9:0", None)):
        mount = Mount("/", "/", device, "ext4", "/dev/sda1", ())
        assert is_rotational(system, mount) is expected
    assert is_rotational(system, Mount("/", "/", "0:40", "nfs", "server:/x", ())) is None
