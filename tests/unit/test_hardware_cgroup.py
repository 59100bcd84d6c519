"""Memory and CPU limits of control groups, both versions, nested, in and out of containers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nexus_ext.hardware.cgroup import (
    cpu_quota,
    group_directories,
    memory_groups,
    parse_cgroup,
    parse_stat,
    reclaimable_v1,
    reclaimable_v2,
)
from nexus_ext.hardware.memory import read_memory
from nexus_ext.hardware.mounts import parse_mountinfo, read_mounts
from nexus_ext.hardware.system import System
from nexus_ext.units import GIB, MIB

V1_MOUNTS = """\
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
"""
V1_CGROUP = """\
9:name=systemd:/
4:memory:/batch/job7
1:cpu,cpuacct:/batch
0::/
"""
V2_MOUNTS = """\
24 29 0:22 / /proc rw,nosuid - proc proc rw
29 1 259:2 / / rw,relatime shared:1 - ext4 /dev/nvme0n1p2 rw
35 24 0:30 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate
"""
V2_CGROUP = "0::/user.slice/user-1000.slice/run.scope\n"
# Docker without a cgroup namespace: the host's path, and the own group mounted as the root.
DOCKER_V1_MOUNTS = """\
679 678 0:54 / / rw,relatime - overlay overlay rw,lowerdir=/var/lib/docker/overlay2/l/A
690 684 0:29 /docker/3f5c /sys/fs/cgroup/cpu,cpuacct ro,nosuid - cgroup cgroup rw,cpu,cpuacct
694 684 0:33 /docker/3f5c /sys/fs/cgroup/memory ro,nosuid - cgroup cgroup rw,memory
"""
DOCKER_V1_CGROUP = "11:memory:/docker/3f5c\n4:cpu,cpuacct:/docker/3f5c\n"
NO_LIMIT_V1 = "9223372036854771712\n"


def fake(root: Path, files: dict[str, str]) -> System:
    for path, text in files.items():
        place = root / path.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    return System(str(root), platform="linux")


def test_version_1_binds_through_the_tightest_ancestor(tmp_path: Path) -> None:
    memory = "/sys/fs/cgroup/memory"
    system = fake(tmp_path, {
        "/proc/self/mountinfo": V1_MOUNTS,
        "/proc/self/cgroup": V1_CGROUP,
        "/proc/meminfo": "MemTotal: 16777216 kB\nMemAvailable: 12582912 kB\n",
        f"{memory}/memory.limit_in_bytes": NO_LIMIT_V1,
        f"{memory}/batch/memory.limit_in_bytes": f"{2 * GIB}\n",
        f"{memory}/batch/memory.usage_in_bytes": f"{1536 * MIB}\n",
        f"{memory}/batch/memory.stat": f"inactive_file 5\ntotal_inactive_file {256 * MIB}\n",
        f"{memory}/batch/job7/memory.limit_in_bytes": f"{3 * GIB}\n",
        f"{memory}/batch/job7/memory.usage_in_bytes": f"{100 * MIB}\n",
    })  # fmt: skip
    state = read_memory(system)
    assert state.limit_bytes == 2 * GIB
    assert state.limit_source == f"{memory}/batch"
    assert state.available_bytes == 2 * GIB - (1536 - 256) * MIB
    assert [group.path for group in memory_groups(system)] == [
        f"{memory}/batch/job7",
        f"{memory}/batch",
    ]


def test_version_2_binds_through_the_tightest_of_max_and_high_of_all_ancestors(
    tmp_path: Path,
) -> None:
    base = "/sys/fs/cgroup/user.slice"
    scope = f"{base}/user-1000.slice/run.scope"
    system = fake(tmp_path, {
        "/proc/self/mountinfo": V2_MOUNTS,
        "/proc/self/cgroup": V2_CGROUP,
        "/proc/meminfo": "MemTotal: 33554432 kB\nMemAvailable: 31457280 kB\n",
        f"{base}/memory.max": "max\n",
        f"{base}/memory.high": "max\n",
        f"{base}/user-1000.slice/memory.max": f"{8 * GIB}\n",
        f"{base}/user-1000.slice/memory.high": f"{6 * GIB}\n",
        f"{base}/user-1000.slice/memory.current": f"{5 * GIB}\n",
        f"{base}/user-1000.slice/memory.stat":
            f"inactive_file {GIB}\nactive_file {GIB}\nfile_mapped {512 * MIB}\n"
            f"file_dirty 0\nslab_reclaimable {256 * MIB}\n",
        f"{scope}/memory.max": f"{7 * GIB}\n",
        f"{scope}/memory.current": f"{GIB}\n",
    })  # fmt: skip
    state = read_memory(system)
    assert state.limit_bytes == 6 * GIB
    assert state.limit_source == f"{base}/user-1000.slice"
    assert state.available_bytes == 6 * GIB - (5 * GIB - (1536 + 256) * MIB)


def test_a_container_sees_its_own_group_at_the_mount(tmp_path: Path) -> None:
    system = fake(tmp_path, {
        "/proc/self/mountinfo": DOCKER_V1_MOUNTS,
        "/proc/self/cgroup": DOCKER_V1_CGROUP,
        "/proc/meminfo": "MemTotal: 16777216 kB\nMemAvailable: 16000000 kB\n",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes": f"{GIB}\n",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes": f"{300 * MIB}\n",
        "/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "150000\n",
        "/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
    })  # fmt: skip
    state = read_memory(system)
    assert (state.limit_bytes, state.available_bytes) == (GIB, 724 * MIB)
    assert cpu_quota(system) == 1.5


def test_a_limit_above_the_visible_groups_is_known_from_memory_stat(tmp_path: Path) -> None:
    system = fake(tmp_path, {
        "/proc/self/mountinfo": DOCKER_V1_MOUNTS,
        "/proc/self/cgroup": DOCKER_V1_CGROUP,
        "/proc/meminfo": "MemTotal: 16777216 kB\nMemAvailable: 16000000 kB\n",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes": NO_LIMIT_V1,
        "/sys/fs/cgroup/memory/memory.usage_in_bytes": "0\n",
        "/sys/fs/cgroup/memory/memory.stat": f"hierarchical_memory_limit {2 * GIB}\n",
    })  # fmt: skip
    assert read_memory(system).limit_bytes == 2 * GIB


@pytest.mark.parametrize("path", ["/", "/../../other.scope", "/elsewhere"])
def test_a_group_outside_of_the_mount_falls_back_to_the_mount(path: str) -> None:
    mounts = parse_mountinfo("35 24 0:30 /a/b /cg rw - cgroup2 cgroup2 rw\n")
    assert group_directories("memory", {"": path}, mounts) == ((), ("/cg",))


def test_no_control_groups_means_no_limit(tmp_path: Path) -> None:
    system = fake(tmp_path, {"/proc/meminfo": "MemTotal: 2048 kB\nMemAvailable: 1024 kB\n"})
    state = read_memory(system)
    assert (state.total_bytes, state.available_bytes, state.limit_bytes) == (2 * MIB, MIB, None)
    assert cpu_quota(system) is None


def test_a_limit_beyond_the_machine_is_no_limit(tmp_path: Path) -> None:
    system = fake(tmp_path, {
        "/proc/self/mountinfo": V2_MOUNTS,
        "/proc/self/cgroup": "0::/\n",
        "/proc/meminfo": "MemTotal: 1048576 kB\nMemAvailable: 524288 kB\n",
        "/sys/fs/cgroup/memory.max": f"{64 * GIB}\n",
        "/sys/fs/cgroup/memory.current": "0\n",
    })  # fmt: skip
    state = read_memory(system)
    assert (state.limit_bytes, state.available_bytes) == (None, 512 * MIB)


def test_a_group_over_its_limit_has_nothing_available(tmp_path: Path) -> None:
    system = fake(tmp_path, {
        "/proc/self/mountinfo": V2_MOUNTS,
        "/proc/self/cgroup": "0::/\n",
        "/proc/meminfo": "MemTotal: 1048576 kB\nMemAvailable: 524288 kB\n",
        "/sys/fs/cgroup/memory.max": f"{64 * MIB}\n",
        "/sys/fs/cgroup/memory.current": f"{65 * MIB}\n",
    })  # fmt: skip
    assert read_memory(system).available_bytes == 0


def test_the_tightest_cpu_quota_counts(tmp_path: Path) -> None:
    base = "/sys/fs/cgroup/user.slice"
    system = fake(tmp_path, {
        "/proc/self/mountinfo": V2_MOUNTS,
        "/proc/self/cgroup": V2_CGROUP,
        f"{base}/cpu.max": "200000 100000\n",
        f"{base}/user-1000.slice/cpu.max": "max 100000\n",
        f"{base}/user-1000.slice/run.scope/cpu.max": "350000 100000\n",
    })  # fmt: skip
    assert cpu_quota(system) == 2.0


def test_version_1_writes_no_cpu_quota_as_minus_one(tmp_path: Path) -> None:
    cpu = "/sys/fs/cgroup/cpu,cpuacct"
    system = fake(tmp_path, {
        "/proc/self/mountinfo": V1_MOUNTS,
        "/proc/self/cgroup": V1_CGROUP,
        f"{cpu}/cpu.cfs_quota_us": "-1\n",
        f"{cpu}/cpu.cfs_period_us": "100000\n",
        f"{cpu}/batch/cpu.cfs_quota_us": "50000\n",
        f"{cpu}/batch/cpu.cfs_period_us": "100000\n",
    })  # fmt: skip
    assert cpu_quota(system) == 0.5


def test_mapped_and_dirty_page_cache_is_not_available() -> None:
    v1 = parse_stat(
        "inactive_file 9\ntotal_inactive_file 100\ntotal_active_file 50\n"
        "total_mapped_file 30\ntotal_dirty 5\ntotal_writeback 5\n"
    )
    assert reclaimable_v1(v1) == 110
    v2 = parse_stat("inactive_file 10\nactive_file 10\nfile_mapped 500\nslab_reclaimable 7\n")
    assert reclaimable_v2(v2) == 7


def test_damaged_texts_are_survived() -> None:
    assert parse_cgroup("\n:::\nx:memory:/a\n4:memory\n3:memory:/b:c\n") == {"memory": "/b:c"}
    assert parse_mountinfo("\n1 2 3\n35 24 0:30 / /x rw - cgroup2\n - \n") == ()
    assert parse_stat("a\nb x\nc 5\n") == {"c": 5}


_SHOW_LIMIT = """
import os, sys
with open(sys.argv[1], "w") as procs:
    procs.write(str(os.getpid()))
from nexus_ext.hardware.memory import read_memory
from nexus_ext.hardware.system import System
state = read_memory(System())
print(state.limit_bytes, state.available_bytes, state.limit_source)
"""


def _memory_mount() -> tuple[str, str] | None:
    """Return (mount point, name of the limit file) of this machine's memory controller."""
    for mount in read_mounts(System()):
        if mount.filesystem == "cgroup" and "memory" in mount.options:
            return mount.mount_point, "memory.limit_in_bytes"
        if mount.filesystem == "cgroup2":
            control = System().read(f"{mount.mount_point}/cgroup.subtree_control") or ""
            if "memory" in control.split():
                return mount.mount_point, "memory.max"
    return None


def test_a_process_inside_a_limited_group_reads_that_limit() -> None:
    found = _memory_mount()
    if found is None:
        pytest.skip("no memory controller is mounted here")
    mount_point, limit_file = found
    outer = Path(mount_point) / f"nexus-test-{os.getpid()}"
    inner = outer / "inner"
    try:
        outer.mkdir()
    except OSError as error:
        pytest.skip(f"this user may not make control groups: {error.strerror}")
    try:
        (outer / limit_file).write_text(str(256 * MIB))
        if limit_file == "memory.max":
            (outer / "cgroup.subtree_control").write_text("+memory")
        inner.mkdir()
        (inner / limit_file).write_text(str(300 * MIB))
        done = subprocess.run(
            [sys.executable, "-c", _SHOW_LIMIT, str(inner / "cgroup.procs")],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        assert done.returncode == 0, done.stderr
        limit, available, source = done.stdout.split()
        assert int(limit) == 256 * MIB
        assert 128 * MIB < int(available) <= 256 * MIB
        assert source == str(outer)
    finally:
        for group in (inner, outer):
            if group.exists():
                group.rmdir()
