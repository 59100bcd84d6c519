"""safetensors: headers are checked before anything is sized by them; what we write others read."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from nexus_ext.errors import FormatError, ReadFailed
from nexus_ext.formats.floats import convert_floats, from_float32, to_float32
from nexus_ext.formats.safetensors import (
    DTYPE_NBYTES,
    TensorReader,
    encode_safetensors_header,
    read_safetensors,
)


def write(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: str = "F32", shape: Any = (2,), place: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(place)}


def test_reads_what_the_reference_writes(tmp_path: Path) -> None:
    arrays = {
        "a": np.arange(12, dtype=np.float32).reshape(3, 4),
        "b": np.array(7, dtype=np.float16),
        "c": np.zeros((0, 5), dtype=np.int64),
        "d": np.arange(6, dtype=np.uint8),
    }
    save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "np"})
    header = read_safetensors(tmp_path / "x.safetensors")
    assert header.metadata == {"format": "np"} and header.tensors.keys() == arrays.keys()
    reader = TensorReader()
    for name, array in arrays.items():
        tensor = header.tensors[name]
        assert tensor.shape == array.shape and tensor.nbytes == array.nbytes
        assert bytes(reader.read(tensor, 0, tensor.nbytes)) == array.tobytes()
    assert bytes(reader.read(header.tensors["a"], 8, 4)) == np.float32(2).tobytes()
    with pytest.raises(ValueError, match="outside"):
        reader.read(header.tensors["a"], 44, 8)
    reader.close()


def test_the_reference_reads_what_we_write(tmp_path: Path) -> None:
    arrays = {"x": np.arange(5, dtype=np.float32), "y/ü": np.ones((2, 2), dtype=np.float16)}
    header = encode_safetensors_header(
        [("x", "F32", (5,)), ("y/ü", "F16", (2, 2))], {"source": "m.gguf"}
    )
    assert len(header) % 8 == 0
    path = tmp_path / "x.safetensors"
    path.write_bytes(header + b"".join(array.tobytes() for array in arrays.values()))
    loaded = load_file(path)
    assert all(np.array_equal(loaded[name], array) for name, array in arrays.items())
    assert read_safetensors(path).metadata == {"source": "m.gguf"}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry()}, b"\0" * 7, "the tensors end at byte"),
        ({"a": entry()}, b"\0" * 9, "the tensors end at byte"),
        ({"a": entry(), "b": entry(place=(4, 12))}, b"\0" * 12, "overlaps"),
        ({"a": entry(), "b": entry(place=(9, 17))}, b"\0" * 17, "leaves a hole"),
        ({"a": entry(place=(8, 0))}, b"\0" * 8, "span -8 bytes"),
        ({"a": entry(place=(0, 4))}, b"\0" * 4, "takes 8"),
        ({"a": entry(shape=(1 << 62, 1 << 62))}, b"\0" * 8, "takes"),
        ({"a": entry(shape=(-2,))}, b"\0" * 8, "list of up to"),
        ({"a": entry(shape=(True,))}, b"\0" * 8, "list of up to"),
        ({"a": entry(shape=(2.0,))}, b"\0" * 8, "list of up to"),
        ({"a": entry(shape=(1,) * 9, place=(0, 4))}, b"\0" * 4, "list of up to"),
        ({"a": entry(place=(0, 8, 8))}, b"\0" * 8, "pair of offsets"),
        ({"a": entry(dtype="Q4")}, b"\0" * 8, "the dtype 'Q4' is not known"),
        ({"a": {"dtype": "F32"}}, b"", "is not an object of"),
        ({"a": 3}, b"", "is not an object of"),
        ({"__metadata__": {"a": 1}}, b"", "is not an object of strings"),
        ([], b"", "not an object"),
        (b"{", b"", "no valid JSON"),
        (b'{"a":1,"a":2}', b"", "'a' is there twice"),
        (b'{"\xff":1}', b"", "no valid JSON"),
        (b"[" * 100_000, b"", "nested too deeply|no valid JSON"),
    ],
)
def test_refuses(tmp_path: Path, header: object, data: bytes, message: str) -> None:
    path = write(tmp_path / "x.safetensors", header, data)
    with pytest.raises(FormatError, match=message) as info:
        read_safetensors(path)
    assert str(path) in str(info.value)


@pytest.mark.parametrize("nbytes", [0, 7, 8])
def test_refuses_what_is_too_short_for_its_header(tmp_path: Path, nbytes: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 50)[:nbytes])
    with pytest.raises(FormatError, match="the file ends after"):
        read_safetensors(path)


def test_refuses_an_absurd_header_before_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 62))
    with pytest.raises(FormatError, match="the limit is 100000000"):
        read_safetensors(path)


def test_a_file_that_is_cut_off_after_its_header_was_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": np.arange(64, dtype=np.float32)}, path)
    tensor = read_safetensors(path).tensors["a"]
    with open(path, "r+b") as file:
        file.truncate(tensor.offset + 16)
    reader = TensorReader()
    with pytest.raises(ReadFailed, match="inside of 'a'") as info:
        reader.read(tensor, 0, tensor.nbytes)
    assert info.value.offset == tensor.offset + 16
    reader.close()
    path.unlink()
    with pytest.raises(ReadFailed, match="cannot be read"):
        reader.read(tensor, 0, 1)


def test_names_that_cannot_be_written_are_refused() -> None:
    with pytest.raises(ValueError, match="used twice"):
        encode_safetensors_header([("a", "F32", ()), ("a", "F32", ())], {})
    with pytest.raises(ValueError, match="reserved"):
        encode_safetensors_header([("__metadata__", "F32", ())], {})


@settings(max_examples=60)
@given(st.binary(max_size=300), st.integers(0, 400))
def test_any_bytes_are_read_or_refused(tmp_path_factory: Any, noise: bytes, length: int) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    path.write_bytes(struct.pack("<Q", length) + noise)
    try:
        header = read_safetensors(path)
    except FormatError:
        return
    assert sum(tensor.nbytes for tensor in header.tensors.values()) <= len(noise)


def test_every_dtype_of_the_table_has_the_size_that_its_name_says() -> None:
    for name, nbytes in DTYPE_NBYTES.items():
        bits = "".join(c for c in name.partition("_")[0] if c.isdigit())
        assert nbytes == (int(bits) // 8 if bits else 1)


def test_bfloat16_rounds_to_nearest_even_and_keeps_nan() -> None:
    values = np.array([1.0, 1.00390625, 1.01171875, -0.0, np.inf, 3.4e38, np.nan], np.float32)
    bits = from_float32(values, "BF16")
    assert [hex(b) for b in bits[:5]] == ["0x3f80", "0x3f80", "0x3f82", "0x8000", "0x7f80"]
    assert np.isnan(to_float32(bits, "BF16")[-1])
    every = np.arange(1 << 16, dtype=np.uint16)
    back = from_float32(to_float32(every, "BF16"), "BF16")
    assert np.array_equal(back & 0x7FBF, every & 0x7FBF)  # but for the quiet bit of a NaN


def test_conversions_that_lose_the_value_are_refused() -> None:
    large = np.array([1.0, 1e6], np.float32)
    with pytest.raises(FormatError, match=r"'w' holds the value 1e\+06, which F16 cannot"):
        convert_floats(large, "F32", "F16", "w")
    with pytest.raises(FormatError, match="which F32 cannot"):
        convert_floats(np.array([1e300]), "F64", "F32", "w")
    infinite = np.array([np.inf, np.nan, 2.0], np.float32)
    kept = convert_floats(infinite, "F32", "F16", "w")
    assert np.array_equal(kept, infinite.astype(np.float16), equal_nan=True)
    assert convert_floats(large, "F32", "BF16", "w").dtype == np.uint16
