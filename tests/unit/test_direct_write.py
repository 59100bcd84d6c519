"""What is appended past the page cache is in the file, wherever it begins and however it is cut."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from nexus_ext.formats import direct_write
from nexus_ext.formats.direct_write import DirectAppender

PIECE = 16384


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_write, "PIECE_NBYTES", PIECE)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    path = tmp_path / "file"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    yield path, descriptor
    os.close(descriptor)


def appender(path: Path, descriptor: int, end: int) -> DirectAppender:
    try:
        return DirectAppender(str(path), descriptor, end)
    except OSError as error:
        pytest.skip(f"no direct writes here: {error}")


@pytest.mark.parametrize("begin", [0, 1, 4095, 4096, 5000, PIECE, PIECE + 1])
def test_pieces_and_gaps_of_any_size(begin: int, file: tuple[Path, int]) -> None:
    path, descriptor = file
    rng = random.Random(begin)
    expected = bytearray(rng.randbytes(begin))
    os.pwrite(descriptor, expected, 0)
    out = appender(path, descriptor, begin)
    for number in range(60):
        gap = rng.choice((0, 0, 1, 4096, rng.randrange(2 * PIECE)))
        data = rng.randbytes(rng.choice((0, 1, 4095, 4096, PIECE, rng.randrange(3 * PIECE))))
        out.append(data, len(expected) + gap)
        expected += bytes(gap) + data
        assert out.end == len(expected)
        if number % 20 == 19:
            out.flush()
            found = path.read_bytes()
            assert found[: len(expected)] == expected
            assert not any(found[len(expected) :]) and len(found) - len(expected) < 4096
    out.close()


def test_what_is_written_elsewhere_stays(file: tuple[Path, int]) -> None:
    path, descriptor = file
    os.pwrite(descriptor, bytes(8192), 0)
    out = appender(path, descriptor, 8192)
    for number in range(100):
        out.append(b"chunk %04d" % number * 300, out.end)
        os.pwrite(descriptor, b"%03d" % number, 10 * number)
    out.flush()
    out.close()
    data = path.read_bytes()
    for number in range(100):
        assert data[10 * number :][:3] == b"%03d" % number
        assert data[8192 + 3000 * number :][:3000] == b"chunk %04d" % number * 300


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failure_is_told_by_a_later_call(
    code: int, file: tuple[Path, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, descriptor = file
    out = appender(path, descriptor, 0)

    def fail(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(OSError, match=os.strerror(code)):
        for _ in range(8):
            out.append(bytes(PIECE), out.end)
        out.flush()
    out.close()


@pytest.mark.parametrize("most", [0, 1000, 4096])
def test_writes_that_end_early_or_are_refused_go_on(
    most: int, file: tuple[Path, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, descriptor = file
    out = appender(path, descriptor, 0)
    pwrite = os.pwrite

    def some(fd: int, data: memoryview, offset: int) -> int:
        if fd == descriptor:
            return pwrite(fd, data, offset)
        if not most:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return pwrite(descriptor, data[:most], offset)

    monkeypatch.setattr(os, "pwrite", some)
    data = random.Random(0).randbytes(5 * PIECE + 77)
    out.append(data, 0)
    out.flush()
    out.close()
    assert path.read_bytes()[: len(data)] == data
