"""The SHA-256 of a source is right in whatever order its bytes are handed over, or not at all."""

from __future__ import annotations

import functools
import hashlib
import os
import random
from pathlib import Path

import pytest

from nexus_ext.formats import file_read, new_file, source_digest
from nexus_ext.formats.file_read import FileReader, is_cold
from nexus_ext.formats.nxf_convert import to_gguf, to_nxf
from nexus_ext.formats.sections import WithSections
from nexus_ext.formats.source_digest import SourceDigest
from nexus_ext.formats.sources import GgufSource, NxfSource
from nexus_ext.testing.synthetic import MoeDims, write_moe


@pytest.fixture(autouse=True)
def _not_far_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_digest, "_BEHIND_NBYTES", 5000)
    monkeypatch.setattr(source_digest, "_SMALL_NBYTES", 300)
    monkeypatch.setattr(source_digest, "_PIECE_NBYTES", 1000)


def files(folder: Path, *sizes: int) -> list[tuple[Path, bytes]]:
    found = []
    for number, size in enumerate(sizes):
        data = random.Random(number).randbytes(size)
        path = folder / str(number)
        path.write_bytes(data)
        found.append((path, data))
    return found


@pytest.mark.parametrize("order", ["in order", "with gaps", "shuffled", "none", "twice"])
def test_any_order_gives_the_hash_of_the_files(order: str, tmp_path: Path) -> None:
    written = files(tmp_path, 40_000, 0, 1, 25_123)
    rng = random.Random(order)
    pieces = []
    for number, (_, data) in enumerate(written):
        at = 0
        while at < len(data):
            size = rng.randrange(1, 3000)
            pieces.append((number, at, data[at : at + size]))
            at += size + (rng.choice((0, 17, 200, 900)) if order == "with gaps" else 0)
    if order == "shuffled":
        rng.shuffle(pieces)
    digest = SourceDigest([str(path) for path, _ in written])
    done, released = 0, []
    for number, at, data in [] if order == "none" else pieces * (1 + (order == "twice")):
        done += len(data)
        digest.feed(number, at, memoryview(data), done, lambda: released.append(1))
    assert digest.result() == tuple(hashlib.sha256(data).hexdigest() for _, data in written)
    assert len(released) == (0 if order == "none" else len(pieces) * (1 + (order == "twice")))


def test_it_can_be_stopped_at_any_time(tmp_path: Path) -> None:
    written = files(tmp_path, 100_000)
    for n_pieces in (0, 1, 200):
        digest = SourceDigest([str(written[0][0])])
        released: list[int] = []
        for number in range(n_pieces):
            free = functools.partial(released.append, 1)
            digest.feed(0, 0, memoryview(b"x"), 10 * number, free)
        digest.stop()
        digest.stop()
        assert len(released) == n_pieces


def test_a_file_that_ends_early_is_an_error(tmp_path: Path) -> None:
    written = files(tmp_path, 100_000)
    digest = SourceDigest([str(written[0][0])])
    os.truncate(written[0][0], 50_000)
    with pytest.raises(OSError, match="ended at byte"):
        digest.result()


@pytest.mark.parametrize("experts", [0, 4])
def test_conversions_record_it_whichever_way_they_read(
    experts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past the cache and through it; experts are read out of their order."""
    dims = MoeDims(n_layers=2, n_experts=experts or 2)
    (gguf,) = write_moe(tmp_path / "m.gguf", dims=dims, quant="F16")
    expected = hashlib.sha256(gguf.read_bytes()).hexdigest()
    (tmp_path / "plan").write_bytes(b"{}")
    for number, cold in enumerate((True, False)):
        monkeypatch.setattr(new_file, "DIRECT_FROM_NBYTES", 0)
        monkeypatch.setattr("nexus_ext.formats.sources.DIRECT_FROM_NBYTES", 0)
        monkeypatch.setattr("nexus_ext.formats.sources.is_cold", lambda path, cold=cold: cold)
        source = WithSections(GgufSource(str(gguf)), {"plan": str(tmp_path / "plan")})
        nxf = tmp_path / f"{number}.nxf"
        assert to_nxf(source, nxf).sha256 == (expected,)
        source.close()
        back = NxfSource(str(nxf))
        assert to_gguf(back, tmp_path / f"{number}.gguf").sha256 == (expected,)
        back.close()
        assert (tmp_path / f"{number}.gguf").read_bytes() == gguf.read_bytes()


def test_direct_reads_land_in_the_memory_that_is_given(tmp_path: Path) -> None:
    import mmap

    ((path, data),) = files(tmp_path, 100_001)
    reader = FileReader(str(path), "direct")
    memory, small = mmap.mmap(-1, 16384), bytearray(10)
    for offset, nbytes in ((0, 8192), (1, 8192), (4095, 2), (91_817, 8184), (100_000, 1)):
        view = reader.view(offset, nbytes, memory)
        assert view == data[offset : offset + nbytes]
        if reader.mode == "direct":
            assert view.obj is memory
        assert reader.view(offset, nbytes, small) == data[offset : offset + nbytes]
    reader.close()


def test_what_is_in_the_cache_is_not_cold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ((path, _),) = files(tmp_path, 1 << 20)
    path.read_bytes()
    assert not is_cold(str(path))
    monkeypatch.setattr(file_read, "_NOWAIT", 0)
    assert not is_cold(str(path))  # nobody knows: as if it were there

    def absent(*_: object) -> int:
        raise BlockingIOError

    monkeypatch.setattr(file_read, "_NOWAIT", 8)
    monkeypatch.setattr(os, "preadv", absent)
    assert is_cold(str(path))
