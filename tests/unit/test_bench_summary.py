"""What a benchmark concludes from its runs."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from nexus_ext.cli.bench import stall_of
from nexus_ext.hardware.mounts import MEMORY_FILESYSTEMS, mount_of, read_mounts
from nexus_ext.hardware.system import System
from nexus_ext.runtime import disk_sample as disk_module
from nexus_ext.runtime.bench import (
    Phase,
    Run,
    Side,
    Spread,
    bound_of,
    context_for,
    loading_of,
    shares_of,
    summarize,
)
from nexus_ext.runtime.disk_sample import DiskSample, cached_bytes, disk_sample, drop_files
from nexus_ext.testing.hardware import machine

DISK = tuple(DiskSample(rate, direct=True) for rate in (900.0, 1000.0, 1600.0))


def run(side: Side = "paged", *, seconds: float = 2.0, device: int | None = 4000) -> Run:
    paged = side == "paged"
    phase = Phase(seconds, 4, 4000 if paged else None, device, 0.5, 1.5 if paged else None)
    loaded = {"loaded_bytes": 3000, "loaded_s": seconds} if paged else {}
    disk = DISK if paged else ()
    return Run(side, load_s=1.0, **loaded, prefill=phase, decode=phase, disk=disk, peak_bytes=7)


def test_rates_are_medians_with_their_spread() -> None:
    summary = summarize("paged", (run(seconds=1), run(seconds=2), run(seconds=8), run("stock")))
    assert summary.decode_tok_s == Spread(median=2.0, low=0.5, high=4.0)
    assert (summary.n_runs, summary.n_died, summary.read_per_token_bytes) == (3, 0, 1000.0)


def test_the_bound_is_measured_bytes_over_measured_bandwidth() -> None:
    fast = replace(run(seconds=5), disk=(DiskSample(2000.0, direct=True),) * 3)
    runs = (run(seconds=5), run("stock", seconds=1), fast, Run("paged", died="gone"))
    bound = bound_of(summarize("paged", runs), runs)
    assert bound is not None
    assert bound.disk_bytes_s == Spread(1800.0, 900.0, 2000.0)
    assert (bound.read_per_token_bytes, bound.tok_s) == (1000.0, 1.8)
    # each by the disk of its own pauses: 4000 bytes in 5 s, of 1000 and of 2000 bytes a second
    assert bound.fraction == Spread(pytest.approx(0.6), 0.4, 0.8)


@pytest.mark.parametrize("device", [0, 1000])
def test_there_is_no_bound_of_the_disk_when_the_page_cache_served(device: int) -> None:
    runs = (run(device=device),)
    assert bound_of(summarize("paged", runs), runs) is None


def test_the_engine_counts_where_the_kernel_does_not() -> None:
    assert summarize("paged", (run(device=None),)).read_per_token_bytes == 1000.0


def test_the_longer_of_reading_and_computing_is_compared_with_what_a_phase_took() -> None:
    runs = (run(seconds=8), run(seconds=5), run(seconds=2), run("stock", seconds=1))
    for share in shares_of(runs):
        assert (share.read_s, share.compute_s, share.seconds) == (4.0, 1.5, 5)
        assert share.fraction == 0.8
    computed = shares_of((run(seconds=2, device=1000),))
    assert [(share.phase, share.fraction) for share in computed] == [
        ("prefill", 0.75),
        ("decode", 0.75),
    ]
    assert shares_of((run("stock"), Run("paged", died="gone"))) == ()


def test_loading_is_compared_with_the_disk() -> None:
    loading = loading_of((run(seconds=2), run(seconds=4), run("stock")), DISK)
    assert loading is not None and loading.nbytes == 3000
    assert (loading.bytes_s.median, loading.fraction) == (1125.0, 1.125)
    assert loading_of((run("stock"),), DISK) is None


def test_a_killed_side_is_a_result() -> None:
    dead = Run("stock", died="killed at its memory limit")
    alive = summarize("stock", (run("stock"), dead))
    assert (alive.n_runs, alive.n_died, alive.died) == (2, 1, dead.died)
    assert alive.decode_tok_s is not None
    gone = summarize("stock", (dead,))
    assert gone.load_s is gone.decode_tok_s is gone.peak_bytes is None


@pytest.mark.parametrize(
    ("lengths", "n_ctx"),
    [((1, 1, 0), 256), ((200, 48, 1), 256), ((200, 49, 1), 512), ((512, 32, 1), 768)],
)
def test_the_context_holds_the_whole_run(lengths: tuple[int, int, int], n_ctx: int) -> None:
    assert context_for(*lengths) == n_ctx


@pytest.mark.parametrize(
    ("record_bytes", "expected"),
    [(None, (False, None)), (10_000, (True, 12_288)), (1 << 30, (True, 1 << 20))],
)
def test_the_disk_is_sampled_as_weights_are_read(
    record_bytes: int | None,
    expected: tuple[bool, int | None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, hardware, asked = tmp_path / "file", machine(), []
    path.write_bytes(bytes(1 << 20))

    def read_disk(
        path: str, block: int, depth: int, random: bool, *most: int
    ) -> tuple[int, int, bool, str]:
        asked.append((random, block))
        return 4096, 2048, True, "threads"

    monkeypatch.setattr(disk_module.core, "read_disk", read_disk)
    assert disk_sample([str(path)], hardware, record_bytes) == DiskSample(2e9, direct=True)
    [(random, block)] = asked
    best = max(
        (p for p in hardware.disk.points if p.pattern == "sequential"), key=lambda p: p.bytes_s
    )
    assert (random, block) == (expected[0], expected[1] or min(best.block_bytes, 1 << 20))


def test_what_cannot_be_read_directly_is_measured_cold_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, events = tmp_path / "file", []
    path.write_bytes(bytes(4096))

    def read_disk(*_: object) -> tuple[int, int, bool, str]:
        events.append("read")
        return 4096, 2048, False, "threads"

    monkeypatch.setattr(disk_module.core, "read_disk", read_disk)
    monkeypatch.setattr(disk_module, "drop_files", lambda files: events.append("drop"))
    assert disk_sample([str(path)], machine()) == DiskSample(2e9, direct=False)
    assert events == ["read", "drop", "read", "drop"]


def test_a_dropped_file_is_no_longer_in_the_page_cache(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    files = [str(path)]
    mount = mount_of(os.path.realpath(files[0]), read_mounts(System()))
    if mount is not None and mount.filesystem in MEMORY_FILESYSTEMS:
        pytest.skip("this file system keeps its files in memory")
    before = cached_bytes(files)
    if before is None:
        pytest.skip("this system does not tell what is in the page cache")
    assert before == 1 << 20
    drop_files(files)
    assert cached_bytes(files) == 0


def test_stalls_and_what_was_read_in_vain_are_told() -> None:
    phase = Phase(2.0, 4, 4000, 4000, 0.5, 1.0, prefetched_bytes=4096, prefetch_wasted_bytes=2048)
    text = stall_of((Run("paged", decode=phase), Run("paged", died="killed")))
    assert text == (
        "waiting for reads 25% of the time; 1.0 KiB of experts read ahead a token, 512 B in vain"
    )
    assert stall_of((run(),)) == "waiting for reads 25% of the time"
    assert stall_of((Run("stock", decode=Phase(2.0, 4, None, 4000, None, None)),)) == ""
