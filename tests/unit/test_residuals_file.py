"""Sidecars of residuals hold what was written, and a damaged one is refused before it is used."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import xxhash

from nexus_ext import kernels
from nexus_ext.errors import FormatError, ReadFailed, UsageError
from nexus_ext.formats.residuals import (
    MAGIC,
    read_residual,
    read_residuals,
    row_nbytes,
    write_residuals,
)

FOOTER = 40


def written(path: Path) -> dict[str, tuple[bytes, bytes]]:
    rng = np.random.default_rng(0)
    parts = {}
    for name, n_in, n_out in (("blk.0.a.weight", 40, 300), ("blk.1.b.weight", 7, 128)):
        codes = rng.integers(0, 256, (n_in, row_nbytes(n_out)), np.uint8)
        parts[name] = (codes, rng.random(n_out, np.float32))
    entries = ((name, *arrays) for name, arrays in parts.items())
    write_residuals(str(path), "f" * 32, entries, expected_nbytes=10_000)
    return {name: (c.tobytes(), s.tobytes()) for name, (c, s) in parts.items()}


@pytest.mark.parametrize("n_out", [1, 127, 128, 129, 4096])
def test_rows_are_as_long_as_the_kernels_have_them(n_out: int) -> None:
    assert row_nbytes(n_out) == kernels.row_bytes(n_out)


def test_a_file_holds_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "a.nxr"
    parts = written(path)
    table = read_residuals(path)
    assert table.fingerprint == "f" * 32
    assert [t.name for t in table.tensors] == list(parts)
    assert [t.offset % 4096 for t in table.tensors] == [0, 0]
    for stored in table.tensors:
        assert read_residual(table, stored) == parts[stored.name]
    assert table.nbytes == sum(len(c) + len(s) for c, s in parts.values())
    with pytest.raises(UsageError, match="exists already"):
        written(path)


def test_every_damaged_byte_of_table_and_footer_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.nxr"
    written(path)
    good = path.read_bytes()
    (at,) = struct.unpack("<Q", good[-FOOTER:][:8])
    for place in range(at, len(good)):
        path.write_bytes(good[:place] + bytes([good[place] ^ 0x41]) + good[place + 1 :])
        with pytest.raises(FormatError):
            read_residuals(path)
    for length in (0, 7, 4096, len(good) - 1, len(good) - FOOTER):
        path.write_bytes(good[:length])
        with pytest.raises(FormatError):
            read_residuals(path)


def test_a_damaged_residual_is_noticed_when_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.nxr"
    written(path)
    table = read_residuals(path)
    for stored in table.tensors:
        data = bytearray(path.read_bytes())
        data[stored.offset + stored.nbytes - 1] ^= 1
        path.write_bytes(data)
        with pytest.raises(FormatError, match="not what was written"):
            read_residual(table, stored)
    path.unlink()
    with pytest.raises(ReadFailed, match="cannot be read"):
        read_residual(table, table.tensors[0])
    with pytest.raises(ReadFailed, match="cannot be read"):
        read_residuals(path)
    with pytest.raises(FormatError, match="not a regular file"):
        read_residuals(tmp_path)


def made(path: Path, table: bytes, count: int, *, payload: int = 4096) -> Path:
    """A file whose table is `table`, with hashes that are right."""
    footer = struct.pack(
        "<QQQQ8s", 4096 + payload, len(table), xxhash.xxh3_64(table).intdigest(), count, MAGIC
    )
    path.write_bytes(MAGIC + bytes(4088 + payload) + table + footer)
    return path


def entry(name: bytes, n_in: int, n_out: int, offset: int) -> bytes:
    return struct.pack("<I", len(name)) + name + struct.pack("<IIQQ", n_in, n_out, offset, 0)


HEAD = struct.pack("<I", 2) + b"ab"


@pytest.mark.parametrize(
    ("table", "count", "message"),
    [
        (HEAD, 1 << 60, "no room for"),
        (HEAD + entry(b"w", 2, 8, 4096)[:-1], 1, "ends at byte"),
        (HEAD + entry(b"w", 0, 8, 4096), 1, "of 0 to 8 channels"),
        (HEAD + entry(b"w", 2**32 - 1, 2**32 - 1, 4096), 1, "channels"),
        (HEAD + entry(b"w", 2, 8, 0), 1, "which belongs at 4096"),
        (HEAD + entry(b"w", 2000, 8, 4096), 1, "behind the last"),
        (HEAD + entry(b"w", 2, 8, 4096) * 2, 2, "twice"),
        (HEAD + entry(b"w", 2, 8, 4096) + b"more", 1, "belong to nothing"),
        (HEAD + entry(b"", 2, 8, 4096) + bytes(40), 1, "a name of 0 bytes"),
        (HEAD + entry(b"w" * 64, 2, 8, 4096), 1, "a name of 64 bytes"),
        (HEAD + entry(b"\xff", 2, 8, 4096), 1, "no UTF-8"),
        (struct.pack("<I", 0) + bytes(40), 0, "a fingerprint of 0 bytes"),
    ],
)
def test_a_table_that_lies_is_refused(
    tmp_path: Path, table: bytes, count: int, message: str
) -> None:
    with pytest.raises(FormatError, match=message):
        read_residuals(made(tmp_path / "a.nxr", table, count))


def test_other_files_are_no_sidecars(tmp_path: Path) -> None:
    path = tmp_path / "other"
    path.write_bytes(b"GGUF" + bytes(10_000))
    with pytest.raises(FormatError, match="no file of residuals"):
        read_residuals(path)
