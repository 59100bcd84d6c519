"""A hardware profile survives JSON, and rubbish is refused with the name of the field."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus_ext.errors import FormatError, UsageError
from nexus_ext.hardware import (
    Cpu,
    Disk,
    DiskPoint,
    Gpu,
    HardwareProfile,
    Memory,
    example_profiles,
    load_profile,
)
from nexus_ext.units import GIB, KIB, MIB

POINTS = (
    DiskPoint(128 * KIB, 1, "sequential", 1e9),
    DiskPoint(MIB, 16, "sequential", 2e9),
    DiskPoint(64 * KIB, 16, "random", 0.5e9),
    DiskPoint(256 * KIB, 16, "random", 1.5e9),
    DiskPoint(256 * KIB, 8, "random", 1.0e9),
)


def a_disk(points: tuple[DiskPoint, ...] = POINTS) -> Disk:
    return Disk("/m", "/dev/sda1", "ext4", True, "", 512, 4, points, "direct", "/", False, "uring")


def a_profile() -> HardwareProfile:
    return HardwareProfile(
        Cpu(4, 8, ("avx2", "fma"), "A processor", None, 2.5),
        Memory(16 * GIB, 3 * GIB, 4 * GIB, 20e9, "/sys/fs/cgroup/x"),
        (Gpu("A GPU", 8 * GIB, 7 * GIB, 8 * GIB, False, None),),
        a_disk(),
        "host",
        1_700_000_000,
    )


def test_a_profile_reads_back_equal() -> None:
    assert HardwareProfile.from_json(a_profile().to_json()) == a_profile()


def test_optional_fields_may_be_left_out_of_a_profile_written_by_hand() -> None:
    data = json.loads(a_profile().to_json())
    for owner, name in [("cpu", "quota_cpus"), ("cpu", "n_performance_cores"),
                        ("memory", "limit_bytes"), ("memory", "limit_source"),
                        ("disk", "engine"), ("disk", "rotational"),
                        ("disk", "mount_point")]:  # fmt: skip
        del data[owner][name]
    del data["host"], data["created_unix_s"], data["gpus"][0]["bandwidth_bytes_s"]
    profile = HardwareProfile.from_json(json.dumps(data))
    assert profile.memory.usable_bytes == 16 * GIB
    assert profile.disk.rotational is None


def _set(*path: str | int, to: Any) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        for step in path[:-1]:
            data = data[step]
        data[path[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (_set("version", to=2), "version is 2"),
        (_set("version", to=True), "version is True"),
        (_set("cpu", to=[]), "cpu"),
        (_set("cpu", "n_cores", to=0), "cpu: n_cores is 0"),
        (_set("cpu", "isa", to=["avx2", 1]), "cpu: isa"),
        (_set("cpu", "isa", to="avx2"), "cpu: isa"),
        (_set("cpu", "quota_cpus", to=0), "cpu: quota_cpus"),
        (_set("memory", "total_bytes", to=-1), "memory: total_bytes is -1"),
        (_set("memory", "total_bytes", to=1.5), "memory: total_bytes is 1.5"),
        (_set("memory", "total_bytes", to=1 << 63), "memory: total_bytes"),
        (_set("memory", "limit_bytes", to=64 * GIB), "memory: limit_bytes"),
        (_set("memory", "available_bytes", to=5 * GIB), "memory: available_bytes"),
        (_set("memory", "bandwidth_bytes_s", to=float("inf")), "memory: bandwidth_bytes_s is inf"),
        (_set("memory", "bandwidth_bytes_s", to=float("nan")), "memory: bandwidth_bytes_s is nan"),
        (_set("memory", "bandwith", to=1), "unknown field 'bandwith'"),
        (_set("gpus", to={}), "gpus"),
        (_set("gpus", 0, "unified", to=1), r"gpus\[0\]: unified is 1"),
        (_set("gpus", 0, "free_bytes", to=9 * GIB), r"gpus\[0\]: free_bytes"),
        (_set("gpus", 0, "working_set_bytes", to=9 * GIB), r"gpus\[0\]: working_set_bytes"),
        (_set("disk", "offset_align", to=768), "disk: offset_align is 768"),
        (_set("disk", "path", to=None), "disk: path is None"),
        (_set("disk", "points", to=[]), "disk: points"),
        (_set("disk", "points", 1, "pattern", to="zigzag"), r"disk: points\[1\]: pattern"),
        (_set("disk", "points", 0, "bytes_s", to=0), r"disk: points\[0\]: bytes_s is 0"),
        (_set("extra", to="x" * 500), "unknown field 'extra'"),
    ],
)
def test_a_wrong_field_is_named(change: Callable[[Any], None], names: str) -> None:
    data = json.loads(a_profile().to_json())
    change(data)
    with pytest.raises(FormatError, match=names) as caught:
        HardwareProfile.from_json(json.dumps(data), source="box.json")
    assert str(caught.value).startswith("box.json")
    assert caught.value.hint


@pytest.mark.parametrize("owner", ["cpu", "memory", "disk"])
def test_a_missing_field_is_named(owner: str) -> None:
    required = {"cpu": "n_cores", "memory": "total_bytes", "disk": "points"}[owner]
    data = json.loads(a_profile().to_json())
    del data[owner][required]
    with pytest.raises(FormatError, match=f"{owner} has no field '{required}'"):
        HardwareProfile.from_json(json.dumps(data))


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "{", "[" * 100_000, '{"version": ' + "9" * 5000 + "}", "{}"]
)
def test_text_that_is_no_profile_is_a_format_error(text: str) -> None:
    with pytest.raises(FormatError):
        HardwareProfile.from_json(text)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["version", "cpu", "memory", "gpus", "disk"]), inner)
        ),
        max_leaves=8,
    )
)
def test_any_json_is_a_profile_or_a_format_error(value: object) -> None:
    with pytest.raises(FormatError):
        HardwareProfile.from_json(json.dumps(value))


def test_sequential_bandwidth_is_that_of_the_best_way_to_read() -> None:
    assert a_disk().sequential_bytes_s == 2e9


def test_random_bandwidth_is_interpolated_between_blocks_and_bounded_outside() -> None:
    disk = a_disk()
    assert disk.random_bytes_s(64 * KIB) == 0.5e9
    assert disk.random_bytes_s(128 * KIB) == pytest.approx(1.0e9)
    assert disk.random_bytes_s(256 * KIB) == 1.5e9  # the best depth
    assert disk.random_bytes_s(32 * KIB) == pytest.approx(0.25e9)  # the same requests a second
    assert disk.random_bytes_s(8 * MIB) == 1.5e9
    assert disk.random_bytes_s(0) > 0


def test_without_random_points_sequential_ones_stand_in() -> None:
    disk = a_disk((DiskPoint(MIB, 8, "sequential", 3e9),))
    assert disk.random_bytes_s(MIB) == 3e9


def test_a_quota_leaves_whole_cores_and_never_none() -> None:
    assert Cpu(4, 8, (), "").n_usable_cores == 4
    assert Cpu(4, 8, (), "", quota_cpus=2.5).n_usable_cores == 3
    assert Cpu(4, 8, (), "", quota_cpus=0.1).n_usable_cores == 1
    assert Cpu(4, 8, (), "", quota_cpus=64.0).n_usable_cores == 4


@pytest.mark.parametrize("name", sorted(example_profiles()))
def test_every_example_is_a_valid_profile_that_claims_no_measurement(name: str) -> None:
    profile = load_profile(name)
    assert profile.gpus
    assert profile.disk.sequential_bytes_s >= profile.disk.random_bytes_s(64 * KIB)
    assert "not measured" in profile.disk.how_cold


def test_the_m1_max_example_has_unified_memory_and_a_working_set_below_it() -> None:
    profile = load_profile("apple-m1-max-32gb")
    (gpu,) = profile.gpus
    assert gpu.unified
    assert 21 * GIB < gpu.working_set_bytes < 22 * GIB
    assert profile.memory.total_bytes == 32 * GIB
    assert profile.disk.sequential_bytes_s == 5.5e9


def test_a_profile_file_that_is_not_there_is_a_usage_error_that_lists_the_examples() -> None:
    with pytest.raises(UsageError, match=r"no-such\.json") as caught:
        load_profile("no-such.json")
    assert "apple-m1-max-32gb" in caught.value.hint
