"""The probe as a whole, and the profiles that it keeps between runs."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nexus_ext.errors import UsageError
from nexus_ext.hardware import DirectIO, Gpu, HardwareProfile, load_profile, probe
from nexus_ext.hardware.cache import MAX_AGE_S, cache_file, default_cache_dir, load_cached, store
from nexus_ext.units import GIB, MIB

NOW = 1_750_000_000
DAY = 86400
GPU = Gpu("A GPU", 8 * GIB, 7 * GIB, 8 * GIB, False)


class Machine:
    """Stands in for the native parts, and counts what is asked of them."""

    def __init__(self) -> None:
        self.reads = 0
        self.bandwidths: list[tuple[int, int]] = []
        self.paths: set[str] = set()

    def read(self, path: str, *_: Any) -> tuple[int, int, bool, str]:
        self.reads += 1
        self.paths.add(path)
        return 10 * MIB, 1_000_000, True, "fake"

    def bandwidth(self, n_threads: int, buffer_bytes: int) -> float:
        self.bandwidths.append((n_threads, buffer_bytes))
        return 20e9


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    file = tmp_path / "models" / "model.gguf"
    file.parent.mkdir()
    with open(file, "wb") as stream:
        stream.truncate(64 * MIB)
    return file


def run(machine: Machine, model: Path, **changes: Any) -> HardwareProfile:
    arguments: dict[str, Any] = {
        "disk_reader": machine.read,
        "memory_bandwidth": machine.bandwidth,
        "gpus": lambda: [GPU],
        "cache_dir": str(model.parent.parent / "cache"),
        "now_unix_s": NOW,
    }
    return probe(model, **{**arguments, **changes})


def test_a_probe_fills_in_every_part(machine: Machine, model: Path) -> None:
    told = DirectIO(True, "", 512, 4)
    profile = run(machine, model, direct_io=lambda path: told)
    assert profile.cpu.n_usable_cores >= 1
    assert 0 < profile.memory.available_bytes <= profile.memory.usable_bytes
    assert profile.memory.bandwidth_bytes_s == 20e9
    assert profile.gpus == (GPU,)
    assert profile.disk.path == str(model.resolve())
    assert profile.disk.device
    assert profile.disk.filesystem
    assert profile.disk.sequential_bytes_s == pytest.approx(10 * MIB * 1e3)
    assert (profile.disk.offset_align, profile.disk.mem_align) == (512, 4)
    assert machine.paths == {str(model.resolve())}
    assert machine.bandwidths == [(profile.cpu.n_usable_cores, machine.bandwidths[0][1])]
    assert machine.bandwidths[0][1] <= GIB
    assert profile.created_unix_s == NOW


def test_what_the_probe_writes_is_a_profile_that_loads(machine: Machine, model: Path) -> None:
    profile = run(machine, model)
    file = model.parent / "box.json"
    file.write_text(profile.to_json())
    assert load_profile(file) == profile


def test_a_directory_is_measured_through_a_scratch_file(machine: Machine, model: Path) -> None:
    profile = run(machine, model.parent, cache_dir=str(model.parent.parent), scratch_bytes=MIB)
    assert "scratch file" in profile.disk.how_cold
    assert profile.disk.path == str(model.parent.resolve())
    assert os.listdir(model.parent) == ["model.gguf"]


def test_the_second_probe_measures_nothing_but_asks_again_what_changes(
    machine: Machine, model: Path
) -> None:
    first = run(machine, model)
    reads = machine.reads
    busy = replace(GPU, free_bytes=GIB)
    second = run(machine, model, gpus=lambda: [busy], now_unix_s=NOW + 29 * DAY)
    assert machine.reads == reads
    assert len(machine.bandwidths) == 1
    assert second.disk == first.disk
    assert second.gpus == (busy,)
    assert second.created_unix_s == NOW


def test_another_file_on_the_same_disk_uses_the_same_measurement(
    machine: Machine, model: Path
) -> None:
    run(machine, model)
    reads = machine.reads
    other = model.parent / "other.gguf"
    other.write_bytes(b"GGUF")
    assert run(machine, other, cache_dir=str(model.parent.parent / "cache")).disk.path == str(
        other.resolve()
    )
    assert machine.reads == reads


@pytest.mark.parametrize(
    "changes", [{"refresh": True}, {"now_unix_s": NOW + 31 * DAY}, {"now_unix_s": NOW - DAY}]
)
def test_old_unwanted_or_future_profiles_are_measured_again(
    machine: Machine, model: Path, changes: dict[str, Any]
) -> None:
    run(machine, model)
    reads = machine.reads
    run(machine, model, **changes)
    assert machine.reads == 2 * reads
    assert len(machine.bandwidths) == 2


@pytest.mark.parametrize("rubbish", [b"", b"{", b"\xff\xfe", b'{"version": 99}', b"[" * 100_000])
def test_a_damaged_stored_profile_is_reported_and_replaced(
    machine: Machine, model: Path, rubbish: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    run(machine, model)
    reads = machine.reads
    (file,) = (model.parent.parent / "cache").iterdir()
    file.write_bytes(rubbish)
    run(machine, model)
    assert machine.reads == 2 * reads
    assert "ignored" in caplog.text
    run(machine, model)
    assert machine.reads == 2 * reads


def test_memory_is_measured_again_when_the_process_may_use_other_cores(
    machine: Machine, model: Path
) -> None:
    run(machine, model)
    (file,) = (model.parent.parent / "cache").iterdir()
    stored = load_profile(file)
    cores = stored.cpu.n_cores + 3
    file.write_text(replace(stored, cpu=replace(stored.cpu, n_cores=cores)).to_json())
    reads = machine.reads
    run(machine, model)
    assert machine.reads == reads
    assert len(machine.bandwidths) == 2


def test_a_cache_that_cannot_be_written_is_only_a_warning(
    machine: Machine, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    blocker = model.parent.parent / "cache"
    blocker.write_text("a file where the directory should be")
    with caplog.at_level(logging.WARNING):
        assert run(machine, model).disk.points
    assert "not stored" in caplog.text


def test_the_cache_directory_follows_the_environment(
    machine: Machine, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = model.parent.parent / "from-environment"
    monkeypatch.setenv("NEXUS_CACHE_DIR", str(place))
    run(machine, model, cache_dir=None)
    assert len(list(place.iterdir())) == 1


def test_a_path_that_is_not_there_is_a_usage_error(machine: Machine, model: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        run(machine, model.parent / "no.gguf")


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_the_time_for_the_disk_must_be_a_real_one(
    machine: Machine, model: Path, seconds: float
) -> None:
    with pytest.raises(UsageError, match="disk_seconds"):
        run(machine, model, disk_seconds=seconds)


def test_the_default_cache_directory() -> None:
    def place(platform: str = "linux", **environ: str) -> str:
        return default_cache_dir(environ, "/home/u", platform=platform)

    assert place() == "/home/u/.cache/nexus_ext"
    assert place("darwin") == "/home/u/Library/Caches/nexus_ext"
    assert place(XDG_CACHE_HOME="/x") == "/x/nexus_ext"
    assert place(XDG_CACHE_HOME="relative") == "/home/u/.cache/nexus_ext"
    assert place(XDG_CACHE_HOME="/x", NEXUS_CACHE_DIR="/n") == "/n"


def test_each_host_and_disk_has_a_file_of_its_own() -> None:
    names = {
        cache_file("/c", host, disk)
        for host in ("a", "b", "a/../../etc", "")
        for disk in ("1 /dev/a", "2 /dev/b")
    }
    assert len(names) == 8
    assert all(os.path.dirname(name) == "/c" for name in names)


def test_a_stored_profile_is_used_only_on_its_host_and_in_its_time(tmp_path: Path) -> None:
    profile = replace(load_profile("apple-m1-max-32gb"), host="a", created_unix_s=NOW)
    file = str(tmp_path / "deep" / "p.json")
    assert load_cached(file, host="a", now_unix_s=NOW) is None
    assert store(file, profile)
    assert os.listdir(tmp_path / "deep") == ["p.json"]
    assert load_cached(file, host="a", now_unix_s=NOW + MAX_AGE_S) == profile
    assert load_cached(file, host="a", now_unix_s=NOW + MAX_AGE_S + 1) is None
    assert load_cached(file, host="b", now_unix_s=NOW) is None


def test_a_failed_write_leaves_the_old_profile_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = replace(load_profile("apple-m1-max-32gb"), host="a", created_unix_s=NOW)
    file = str(tmp_path / "p.json")
    assert store(file, profile)

    def fail(source: str, destination: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    assert not store(file, replace(profile, host="b"))
    assert os.listdir(tmp_path) == ["p.json"]
    assert load_cached(file, host="a", now_unix_s=NOW) == profile
