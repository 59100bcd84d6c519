"""Files of what was learned: what is written is read, and nothing else is."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from nexus_ext.errors import FormatError, ReadFailed, UsageError, WriteFailed
from nexus_ext.formats import Learned

ARRAYS = {
    "a": np.arange(6, dtype=np.int8).reshape(2, 3),
    "b": np.array([0.5, -1.5], np.float16),
    "c": np.zeros((0, 4), np.float32),
    "d": np.array(7, np.int32),
}
LEARNED = Learned("chain", 3, "f" * 32, {"layers": [1, 2], "x": 0.5}, ARRAYS)
DATA = LEARNED.to_bytes()


def read(data: bytes) -> Learned:
    return Learned.from_bytes(data, "chain", 3, source="file")


def signed(body: bytes) -> bytes:
    return body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body))


def with_header(**changes: object) -> bytes:
    (size,) = struct.unpack_from("<I", DATA, 12)
    text = json.dumps({**json.loads(DATA[16 : 16 + size]), **changes}).encode()
    return signed(DATA[:12] + struct.pack("<I", len(text)) + text + DATA[16 + size : -8])


def with_array(**changes: object) -> bytes:
    return with_header(arrays=[{"name": "a", "type": "<i1", "shape": [2, 3], **changes}])


def test_what_is_written_is_read() -> None:
    found = read(DATA)
    assert (found.kind, found.version, found.fingerprint) == ("chain", 3, "f" * 32)
    assert found.facts == LEARNED.facts and found.arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(found.arrays[name], array)
    assert found.to_bytes() == DATA


def test_the_bytes_of_version_1_do_not_change() -> None:
    one = Learned("k", 1, "f", {}, {"a": np.array([1, -1], ">i2")}).to_bytes()
    header = (
        b'{"kind": "k", "version": 1, "fingerprint": "f", "facts": {}, '
        b'"arrays": [{"name": "a", "type": "<i2", "shape": [2]}]}'
    )
    body = b"NXLEARN\0\x01\0\0\0" + struct.pack("<I", len(header)) + header + b"\x01\0\xff\xff"
    assert one == signed(body)


def test_types_that_no_file_holds_are_refused() -> None:
    with pytest.raises(TypeError, match="float64"):
        Learned("k", 1, "f", {}, {"a": np.zeros(1)}).to_bytes()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "length"),
        (DATA[:20], "length"),
        (DATA[:60], "checksum"),
        (DATA[:-1], "checksum"),
        (DATA[:60] + b"\0" + DATA[61:], "checksum"),
        (b"NXTRACE\0" + DATA[8:], "start"),
        (signed(DATA[:8] + b"\x02" + DATA[9:-8]), "version is 2"),
        (signed(DATA[:12] + b"\xff\xff\xff\x7f" + DATA[16:-8]), "header ends at"),
        (signed(DATA[:16] + b"x" + DATA[17:-8]), "not JSON"),
        (signed(DATA[:-8] + b"\0"), "says less"),
        (with_header(kind="lstm"), "kind is 'lstm', not 'chain'"),
        (with_header(version=4), "version is 4, not 3"),
        (with_header(version=3.0), "version is 3.0"),
        (with_header(fingerprint=1), "fingerprint"),
        (with_header(facts=[]), "facts"),
        (with_header(more=1), "fields"),
        (with_header(arrays={}), "arrays"),
        (with_header(arrays=[1]), "other fields"),
        (with_header(arrays=[{"name": "a", "type": "<i1", "shape": [1]}] * 2), "twice"),
        (with_array(type="<f8"), "type '<f8'"),
        (with_array(type=["<i1"]), "type"),
        (with_array(name=2), "have 2"),
        (with_array(shape=[-1]), "shape"),
        (with_array(shape=[True]), "shape"),
        (with_array(shape=6), "shape"),
        (with_array(shape=[1] * 9), "shape"),
        (with_array(shape=[100, 100]), "beyond the file"),
        (with_array(shape=[1 << 62, 1 << 62]), "shape"),
        (with_array(type="<f2", shape=[2]), "says less"),
        (Learned("chain", 3, "", {}, {"x": np.array([np.nan], np.float16)}).to_bytes(), "finite"),
        (Learned("chain", 3, "", {}, {"x": np.array([-np.inf], np.float32)}).to_bytes(), "finite"),
    ],
)
def test_anything_else_is_refused_with_the_place(data: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        read(data)
    assert str(caught.value).startswith("file: ") and "train" in caught.value.hint


def test_numbers_that_json_cannot_say_are_refused() -> None:
    (size,) = struct.unpack_from("<I", DATA, 12)
    text = DATA[16 : 16 + size].replace(b'"x": 0.5', b'"x": NaN')
    with pytest.raises(FormatError, match="NaN is not a number"):
        read(signed(DATA[:12] + struct.pack("<I", len(text)) + text + DATA[16 + size : -8]))


@given(st.data())
def test_damage_is_always_noticed(data: st.DataObject) -> None:
    changed = bytearray(DATA)
    at = data.draw(st.integers(0, len(DATA) - 1))
    changed[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(FormatError):
        read(bytes(changed))


def test_files_appear_whole_and_are_not_overwritten_unasked(tmp_path: Path) -> None:
    path = tmp_path / "x.learned"
    assert LEARNED.write(path) == len(DATA) == path.stat().st_size
    assert Learned.read(path, "chain", 3).to_bytes() == DATA
    with pytest.raises(UsageError, match="exists already"):
        LEARNED.write(path)
    LEARNED.write(path, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["x.learned"]
    with pytest.raises(ReadFailed, match="nothing"):
        Learned.read(tmp_path / "nothing", "chain", 3)
    with pytest.raises((WriteFailed, UsageError), match="no-folder"):
        LEARNED.write(tmp_path / "no-folder" / "x")
