"""The disk probe: what it reads, for how long, on what file, and that it leaves nothing behind."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nexus_ext.errors import ReadFailed, UsageError
from nexus_ext.hardware.disk import (
    REPEATS,
    SHAPES,
    DirectIO,
    Measured,
    Shape,
    build_disk,
    how_cold,
    measure_disk,
)
from nexus_ext.hardware.mounts import Mount
from nexus_ext.hardware.profile import DiskPoint
from nexus_ext.hardware.scratch import (
    SMALLEST_TARGET_BYTES,
    Target,
    probe_target,
    scratch_size,
)
from nexus_ext.units import GIB, KIB, MIB

SECOND = 1_000_000_000


class FakeDisk:
    """A disk of a given speed with a clock of its own; remembers every call."""

    def __init__(self, bytes_s: float = 1e9, *, direct: bool = True, overrun: int = 1) -> None:
        self.now_ns = 0
        self.calls: list[tuple[Shape, int, int]] = []
        self.bytes_s = bytes_s
        self.direct = direct
        self.overrun = overrun  # how many times longer than allowed a call takes

    def read(
        self, path: str, block_bytes: int, depth: int, random: bool, max_bytes: int, max_ns: int
    ) -> tuple[int, int, bool, str]:
        self.calls.append((Shape(block_bytes, depth, random), max_bytes, max_ns))
        ns = max_ns * self.overrun
        self.now_ns += ns
        return int(self.bytes_s * ns / 1e9), ns, self.direct, "fake"

    def clock(self) -> int:
        return self.now_ns


@pytest.fixture
def target(tmp_path: Path) -> Target:
    file = tmp_path / "model"
    file.write_bytes(b"m" * MIB)
    return Target(str(file), 4 * GIB, scratch=False)


def test_every_shape_is_measured_three_times_within_the_budget(target: Target) -> None:
    disk = FakeDisk()
    measured = measure_disk(target, disk.read, budget_ns=8 * SECOND, clock=disk.clock)
    assert disk.now_ns <= 8 * SECOND
    assert len(disk.calls) == REPEATS * len(SHAPES)
    assert {shape for shape, _, _ in disk.calls} == set(SHAPES)
    assert all(max_bytes == GIB for _, max_bytes, _ in disk.calls)
    assert len(measured.points) == len(SHAPES)
    assert all(point.bytes_s == pytest.approx(1e9, rel=1e-3) for point in measured.points)
    assert (measured.direct, measured.engine) == (True, "fake")


def test_the_shapes_are_those_that_the_solver_asks_for() -> None:
    sequential = {(s.block_bytes, s.depth) for s in SHAPES if not s.random}
    assert sequential == {
        (block, depth) for block in (128 * KIB, 512 * KIB, MIB, 2 * MIB) for depth in (1, 8, 16, 32)
    }
    random = {(s.block_bytes, s.depth) for s in SHAPES if s.random}
    assert random == {(block, 16) for block in (64 * KIB, 256 * KIB, MIB, 4 * MIB)}


def test_runs_of_one_point_are_spread_over_the_whole_time(target: Target) -> None:
    disk = FakeDisk()
    measure_disk(target, disk.read, budget_ns=SECOND, clock=disk.clock)
    order = [shape for shape, _, _ in disk.calls]
    for round_index in range(REPEATS):
        part = order[round_index * len(SHAPES) : (round_index + 1) * len(SHAPES)]
        assert set(part) == set(SHAPES)


def test_one_slow_run_does_not_change_a_point(target: Target) -> None:
    rates = iter([100, 3, 90])

    def reader(*_: Any) -> tuple[int, int, bool, str]:
        return next(rates) * MIB, SECOND, True, "fake"

    shapes = (Shape(MIB, 8, False),)
    measured = measure_disk(target, reader, budget_ns=SECOND, shapes=shapes, clock=lambda: 0)
    assert measured.points == (DiskPoint(MIB, 8, "sequential", 90 * MIB),)


def test_a_disk_slower_than_its_time_slices_ends_at_the_budget(
    target: Target, caplog: pytest.LogCaptureFixture
) -> None:
    disk = FakeDisk(1e8, overrun=10)
    measured = measure_disk(target, disk.read, budget_ns=8 * SECOND, clock=disk.clock)
    assert disk.now_ns <= 8 * SECOND + 10 * disk.calls[0][2]
    assert measured.points[0].pattern == "sequential"
    assert "slow" in caplog.text


def test_a_disk_slower_than_the_whole_budget_gives_one_sequential_point(target: Target) -> None:
    disk = FakeDisk(1e6, overrun=1000)
    measured = measure_disk(target, disk.read, budget_ns=SECOND, clock=disk.clock)
    assert [point.pattern for point in measured.points] == ["sequential"]
    assert len(disk.calls) == 1


def test_blocks_larger_than_the_file_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "small"
    file.write_bytes(b"m" * 300 * KIB)
    disk = FakeDisk()
    measured = measure_disk(
        Target(str(file), 300 * KIB, scratch=False), disk.read, budget_ns=SECOND, clock=disk.clock
    )
    assert {point.block_bytes for point in measured.points} == {64 * KIB, 128 * KIB, 256 * KIB}


def test_a_file_that_gives_nothing_is_a_read_error(target: Target) -> None:
    with pytest.raises(ReadFailed, match="gave no bytes"):
        measure_disk(target, lambda *_: (0, 0, True, "fake"), budget_ns=SECOND, clock=lambda: 0)


def test_errors_of_the_reader_are_not_swallowed(target: Target) -> None:
    def reader(*_: Any) -> tuple[int, int, bool, str]:
        raise ReadFailed("bad sector", errno=errno.EIO)

    with pytest.raises(ReadFailed, match="bad sector"):
        measure_disk(target, reader, budget_ns=SECOND)


@pytest.mark.parametrize(
    ("direct", "filesystem", "can_drop", "words"),
    [
        (True, "ext4", True, "direct reads"),
        (False, "overlay", True, "DONTNEED"),
        (False, "apfs", False, "not cold"),
        (False, "tmpfs", True, "not cold: tmpfs"),
        (True, "tmpfs", True, "not cold: tmpfs"),
    ],
)
def test_how_cold_says_what_kept_the_page_cache_out(
    direct: bool, filesystem: str, can_drop: bool, words: str
) -> None:
    file = Target("/m", GIB, scratch=True)
    text = how_cold(direct=direct, filesystem=filesystem, can_drop=can_drop, target=file)
    assert text.startswith(words) or words in text
    assert "scratch file" in text
    assert "1.0 GiB" in text


def test_a_fallback_to_buffered_reads_is_explained() -> None:
    measured = Measured((DiskPoint(MIB, 1, "sequential", 1.0),), False, "threads")
    mount = Mount("/", "/", "0:54", "overlay", "overlay", ())
    file = Target("/m", GIB, scratch=False)
    told = DirectIO(False, "the file system refuses O_DIRECT", 1, 1)
    for direct_io, reason in ((told, told.reason), (None, "the reader had to use buffered reads")):
        disk = build_disk(
            "/m", file, measured, mount, rotational=None, direct_io=direct_io, can_drop=True
        )
        assert (disk.direct, disk.direct_reason) == (False, reason)
        assert disk.device == "0:54"


def test_a_large_file_is_measured_itself(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    with open(file, "wb") as stream:
        stream.truncate(SMALLEST_TARGET_BYTES)
    with probe_target(str(file), scratch_bytes=GIB, write_ns=SECOND) as target:
        assert target == Target(str(file), SMALLEST_TARGET_BYTES, scratch=False)
        assert os.listdir(tmp_path) == ["model.gguf"]
    assert file.exists()


@pytest.mark.parametrize("small_file", [False, True])
def test_a_directory_or_a_small_file_gets_a_scratch_file_that_is_removed(
    tmp_path: Path, small_file: bool
) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"GGUF")
    with probe_target(
        str(path if small_file else tmp_path), scratch_bytes=17 * MIB + 5, write_ns=SECOND
    ) as target:
        assert target.scratch
        assert target.nbytes == 17 * MIB == os.path.getsize(target.path)
        assert os.path.dirname(target.path) == str(tmp_path)
        data = Path(target.path).read_bytes()
        # Nothing that a file system could compress or share.
        blocks = [data[i : i + 4096] for i in range(0, len(data), 4096)]
        assert len(set(blocks)) == len(blocks)
    assert os.listdir(tmp_path) == ["tiny.gguf"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ReadFailed("no")])
def test_a_scratch_file_is_removed_whatever_happens(
    tmp_path: Path, error: BaseException | type[BaseException]
) -> None:
    with pytest.raises((KeyboardInterrupt, SystemExit, ReadFailed)):
        with probe_target(str(tmp_path), scratch_bytes=MIB, write_ns=SECOND):
            assert len(os.listdir(tmp_path)) == 1
            raise error
    assert os.listdir(tmp_path) == []


def test_an_interrupt_while_writing_removes_the_scratch_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(fd: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with (
        pytest.raises(KeyboardInterrupt),
        probe_target(str(tmp_path), scratch_bytes=MIB, write_ns=SECOND),
    ):
        pass
    assert os.listdir(tmp_path) == []


def test_what_a_killed_probe_left_is_removed_and_a_running_ones_file_is_not(tmp_path: Path) -> None:
    (tmp_path / ".nexus-probe-1-dead.tmp").write_bytes(b"x")
    with probe_target(str(tmp_path), scratch_bytes=MIB, write_ns=SECOND) as running:
        assert len(os.listdir(tmp_path)) == 1
        # Another process, because a lock never keeps out its own holder's process on all systems.
        script = (
            "import sys\nfrom nexus_ext.hardware.scratch import probe_target\n"
            "with probe_target(sys.argv[1], scratch_bytes=1 << 20, write_ns=10**9): pass\n"
        )
        subprocess.run(
            [sys.executable, "-c", script, str(tmp_path)], check=True, timeout=60,
            env={"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )  # fmt: skip
        assert os.listdir(tmp_path) == [os.path.basename(running.path)]
    assert os.listdir(tmp_path) == []


def test_a_nearly_full_disk_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with (
        pytest.raises(UsageError, match=r"100\.0 MiB free") as caught,
        probe_target(
            str(tmp_path), scratch_bytes=GIB, write_ns=SECOND, free_bytes=lambda _: 100 * MIB
        ),
    ):
        pass
    assert "existing large file" in caught.value.hint
    assert os.listdir(tmp_path) == []


def test_a_scratch_file_takes_a_quarter_of_the_free_space_at_most() -> None:
    assert scratch_size("/d", GIB, 100 * GIB) == GIB
    assert scratch_size("/d", GIB, 2 * GIB) == GIB // 2
    assert scratch_size("/d", GIB, 256 * MIB) == 64 * MIB
    with pytest.raises(UsageError):
        scratch_size("/d", GIB, 256 * MIB - 1)


def test_writing_stops_when_the_time_is_over(tmp_path: Path) -> None:
    times = iter(range(0, 100 * SECOND, 10 * SECOND))
    with probe_target(
        str(tmp_path), scratch_bytes=GIB, write_ns=SECOND,
        free_bytes=lambda _: 100 * GIB, clock=lambda: next(times),
    ) as target:  # fmt: skip
        assert target.nbytes == SMALLEST_TARGET_BYTES


@pytest.mark.parametrize(("after", "works"), [(SMALLEST_TARGET_BYTES, True), (8 * MIB, False)])
def test_a_quota_met_while_writing_is_fine_once_there_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, works: bool
) -> None:
    real_write = os.write
    total = 0

    def write(fd: int, data: memoryview) -> int:
        nonlocal total
        if total >= after:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        n = real_write(fd, data)
        total += n
        return n

    monkeypatch.setattr(os, "write", write)
    target_of = probe_target(
        str(tmp_path), scratch_bytes=GIB, write_ns=SECOND * 600, free_bytes=lambda _: 100 * GIB
    )
    if works:
        with target_of as target:
            assert target.nbytes == SMALLEST_TARGET_BYTES
    else:
        with pytest.raises(UsageError, match=r"8\.0 MiB"), target_of:
            pass
    assert os.listdir(tmp_path) == []


def test_a_small_file_is_measured_itself_where_no_scratch_file_can_be(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(bytes(2 * MIB))
    with probe_target(
        str(file), scratch_bytes=GIB, write_ns=SECOND, free_bytes=lambda _: 0
    ) as target:
        assert target == Target(str(file), 2 * MIB, scratch=False)
    assert "small file" in caplog.text
    assert file.exists()


def test_a_path_that_does_not_exist_is_a_usage_error(tmp_path: Path) -> None:
    with (
        pytest.raises(UsageError, match="No such file"),
        probe_target(str(tmp_path / "no"), scratch_bytes=MIB, write_ns=SECOND),
    ):
        pass


def test_a_directory_without_write_permission_is_a_usage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "open", refuse)
    with (
        pytest.raises(UsageError, match="Permission denied") as caught,
        probe_target(str(tmp_path), scratch_bytes=MIB, write_ns=SECOND),
    ):
        pass
    assert "existing large file" in caught.value.hint
