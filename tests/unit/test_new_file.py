"""A new file is there whole or not at all."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest

from nexus_ext.errors import UsageError, WriteFailed
from nexus_ext.formats import direct_write, new_file
from nexus_ext.formats.new_file import NewFile


@pytest.fixture(params=["buffered", "direct"], autouse=True)
def _writing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the page cache, as small files are written, and past it."""
    if request.param == "direct":
        monkeypatch.setattr(new_file, "DIRECT_FROM_NBYTES", 0)
        monkeypatch.setattr(direct_write, "PIECE_NBYTES", 8192)


def test_a_file_appears_when_it_is_committed(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with NewFile(path, expected_nbytes=8) as file:
        file.write(b"abc")
        file.pad(8)
        file.write(memoryview(b"xyz"))
        assert file.nbytes == 11 and not path.exists()
        file.commit()
    assert path.read_bytes() == b"abc\0\0\0\0\0xyz"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_an_error_on_the_way_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), NewFile(tmp_path / "a.bin", expected_nbytes=1) as file:
        file.write(b"abc")
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_an_existing_file_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(UsageError, match="exists already") as info:
        NewFile(path, expected_nbytes=1)
    assert "--force" in info.value.hint
    with NewFile(path, expected_nbytes=1, overwrite=True) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
        file.commit()
    assert path.read_bytes() == b"new"


def test_a_file_of_many_pieces(tmp_path: Path) -> None:
    data = random.Random(0).randbytes(100_000)
    with NewFile(tmp_path / "a.bin", expected_nbytes=1) as file:
        for at in range(0, len(data), 7001):
            file.write(data[at : at + 7001])
        file.pad(4096)
        file.commit()
    found = (tmp_path / "a.bin").read_bytes()
    assert found[: len(data)] == data and len(found) == 102_400 and not any(found[len(data) :])


def test_a_file_that_appeared_meanwhile_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with NewFile(path, expected_nbytes=1) as file:
        path.write_bytes(b"theirs")
        with pytest.raises(UsageError, match="exists already"):
            file.commit()
    assert path.read_bytes() == b"theirs"


def test_what_a_killed_run_left_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / "a.bin.part").write_bytes(b"half")
    with NewFile(tmp_path / "a.bin", expected_nbytes=1) as file:
        file.write(b"whole")
        file.commit()
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_places_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        NewFile(tmp_path / "no" / "a.bin", expected_nbytes=1)
    with pytest.raises(UsageError, match="is a directory"):
        NewFile(tmp_path, expected_nbytes=1, overwrite=True)


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(WriteFailed, match=r"are to be written, .* are free") as info:
        NewFile(tmp_path / "a.bin", expected_nbytes=1 << 60)
    assert info.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_on_the_way_is_said_and_cleaned_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, data: memoryview, offset: int = 0) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with NewFile(tmp_path / "a.bin", expected_nbytes=1) as file:
        monkeypatch.setattr(os, "write", full)
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(WriteFailed, match="No space left") as info:
            file.write(b"abc")
            file.commit()
    assert info.value.errno == errno.ENOSPC and "another disk" in info.value.hint
    assert not list(tmp_path.iterdir())
