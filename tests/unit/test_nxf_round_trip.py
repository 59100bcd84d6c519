"""GGUF to NXF and back gives the same bytes, whatever the GGUF holds."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nexus_ext.codecs import Codecs
from nexus_ext.errors import FormatError, UsageError
from nexus_ext.formats.nxf_convert import Report, to_gguf, to_nxf
from nexus_ext.formats.nxf_layout import Order, Rules
from nexus_ext.formats.nxf_reader import NxfReader
from nexus_ext.formats.sources import NxfSource, open_source
from nexus_ext.testing.synthetic import MoeDims, Tensor, write_gguf, write_llama, write_moe
from nexus_ext.testing.synthetic.blocks import WEIGHT_TYPES, block_elements
from tests.models_folder import model_folders

MODELS = sorted({p.name: p for f in model_folders() for p in f.glob("*.gguf")}.values())


def there(gguf: Path, nxf: Path, codec: str = "raw", order: Order | None = None) -> Report:
    source = open_source(gguf)
    try:
        return to_nxf(source, nxf, rules=Rules(codec), order=order, overwrite=True)
    finally:
        source.close()


def back(nxf: Path, target: Path) -> Report:
    source = NxfSource(str(nxf))
    try:
        return to_gguf(source, target, overwrite=True)
    finally:
        source.close()


def assert_same(originals: list[Path], tmp_path: Path, codec: str = "raw") -> None:
    out = tmp_path / "back"
    out.mkdir(exist_ok=True)
    written = there(originals[0], tmp_path / "m.nxf", codec)
    returned = back(tmp_path / "m.nxf", out)
    digests = tuple(hashlib.sha256(path.read_bytes()).hexdigest() for path in originals)
    assert written.sha256 == returned.sha256 == digests
    for path in originals:
        assert (out / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("codec", ["raw", "ans"])
@pytest.mark.parametrize("model", MODELS, ids=lambda path: path.name)
def test_every_model_comes_back(model: Path, codec: str, tmp_path: Path) -> None:
    assert_same([model], tmp_path, codec)


def test_split_files_come_back_under_the_names_that_llama_cpp_looks_for(tmp_path: Path) -> None:
    parts = write_moe(tmp_path / "m.gguf", split=3)
    assert_same(parts, tmp_path)
    report = back(tmp_path / "m.nxf", tmp_path / "other-00002-of-00003.gguf")
    names = [Path(path).name for path in report.paths]
    assert names == [f"other-0000{i}-of-00003.gguf" for i in (1, 2, 3)]


@pytest.mark.parametrize("alignment", [8, 64, 4096, 65536])
def test_every_alignment_comes_back(alignment: int, tmp_path: Path) -> None:
    shape = {"n_layers": 1, "n_embd": 64, "n_ff": 96, "n_heads": 2, "n_heads_kv": 1, "n_vocab": 300}
    assert_same(write_llama(tmp_path / "m.gguf", alignment=alignment, **shape), tmp_path)


def test_all_types_come_back(tmp_path: Path) -> None:
    tensors = [
        Tensor(f"t.{name}.weight", (block_elements(name) * 2, 9), name) for name in WEIGHT_TYPES
    ]
    paths = write_gguf(tmp_path / "m.gguf", {"general.architecture": "llama"}, tensors)
    assert_same(paths, tmp_path)
    assert_same(paths, tmp_path, "ans")


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def odd_gguf() -> bytes:
    """Return texts that are no UTF-8, odd arrays, all number types, padding that is not zero."""
    numbers = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
    pairs = [
        string(b"general.architecture") + struct.pack("<I", 8) + string(b"llama"),
        string(b"text") + struct.pack("<I", 8) + string(b"\xff\xfe\x00 not UTF-8"),
        string(b"none") + struct.pack("<IIQ", 9, 8, 0),
        string(b"huge") + struct.pack("<IIQ", 9, 4, 70000) + bytes(range(250)) * 1120,
        *(
            string(b"n%d" % kind) + struct.pack(f"<I{code}", kind, 1)
            for kind, code in numbers.items()
        ),
        string(b"n12") + struct.pack("<Id", 12, 1.5),
    ]
    infos = b"".join(
        string(name) + struct.pack("<IQIQ", 1, 3, 0, offset)
        for name, offset in ((b"a", 0), (b"b", 32))
    )
    head = b"GGUF" + struct.pack("<IQQ", 3, 2, len(pairs)) + b"".join(pairs) + infos
    head += b"\x07" * (-len(head) % 32)
    return head + b"A" * 12 + b"\x00\x01" + bytes(18) + b"B" * 12 + b"pad" + bytes(60) + b"end"


def test_padding_and_an_end_that_hold_something_come_back(tmp_path: Path) -> None:
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes(odd_gguf())
    assert_same([gguf], tmp_path)


def test_a_file_without_tensors_comes_back(tmp_path: Path) -> None:
    paths = write_gguf(tmp_path / "m.gguf", {"general.architecture": "llama"}, [])
    paths[0].write_bytes(paths[0].read_bytes() + b"something behind")
    assert_same(paths, tmp_path)


def test_big_endian_is_refused(tmp_path: Path) -> None:
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes(b"GGUF" + struct.pack(">IQQ", 3, 0, 0))
    with pytest.raises(FormatError, match="big endian"):
        there(gguf, tmp_path / "m.nxf")


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=6),
    tail=st.binary(max_size=40),
    alignment=st.sampled_from([8, 32, 256]),
)
def test_every_small_file_comes_back(
    tmp_path: Path, sizes: list[int], tail: bytes, alignment: int
) -> None:
    tensors = [Tensor(f"t{i}", (size,)) for i, size in enumerate(sizes)]
    pairs = {"general.architecture": "llama"}
    paths = write_gguf(tmp_path / "m.gguf", pairs, tensors, alignment=alignment)
    paths[0].write_bytes(paths[0].read_bytes() + tail)
    assert_same(paths, tmp_path)


def test_experts_are_records_in_any_order(tmp_path: Path) -> None:
    dims = MoeDims(n_layers=2, n_experts=4)
    (gguf,) = write_moe(tmp_path / "m.gguf", dims=dims)
    there(gguf, tmp_path / "a.nxf")
    there(gguf, tmp_path / "b.nxf", order=lambda layer, count: list(range(count))[::-1])
    assert back(tmp_path / "b.nxf", tmp_path / "b.gguf").sha256
    assert (tmp_path / "b.gguf").read_bytes() == gguf.read_bytes()
    with NxfReader(tmp_path / "a.nxf", mode="direct") as a, NxfReader(tmp_path / "b.nxf") as b:
        groups = a.file.nxf.groups
        assert [a.file.nxf.tensors[i].name for i in groups[0]] == [
            f"blk.0.ffn_{part}_exps.weight" for part in ("gate", "up", "down")
        ]
        first = a.file.nxf.tensors[groups[0][0]]
        starts = [
            [int(r.file.table["offset"][first.first_chunk + e]) for e in range(4)] for r in (a, b)
        ]
        assert starts[0] == sorted(starts[0]) == starts[1][::-1]
        for tensor in a.file.nxf.tensors:
            for expert in range(tensor.n_matrices):
                assert a.expert(tensor.name, expert) == b.expert(tensor.name, expert)


def test_parts_of_records_that_are_stored_as_they_are_have_one_place_in_all(tmp_path: Path) -> None:
    (gguf,) = write_moe(tmp_path / "m.gguf", dims=MoeDims(n_layers=1, n_experts=4))
    there(gguf, tmp_path / "m.nxf")
    with NxfReader(tmp_path / "m.nxf", mode="mmap") as reader:
        (group,) = reader.file.nxf.groups
        columns = []
        for number in group:
            tensor = reader.file.nxf.tensors[number]
            rows = reader.file.table[tensor.first_chunk : tensor.first_chunk + tensor.n_chunks]
            columns.append(rows["offset"].reshape(4, -1)[:, 0].astype(int).tolist())
        strides = [[column[0] - columns[0][0] for column in columns]]
        strides += [[c[e] - columns[0][e] for c in columns] for e in range(4)]
        assert all(s == strides[0] for s in strides)
        assert all(place % 4096 == 0 for column in columns for place in column)
        assert len({columns[0][e + 1] - columns[0][e] for e in range(3)}) == 1


def test_shards_hold_what_one_file_holds(tmp_path: Path) -> None:
    (gguf,) = write_moe(tmp_path / "m.gguf")
    source = open_source(gguf)
    report = to_nxf(source, tmp_path / "m.nxf", shard_nbytes=100_000)
    source.close()
    assert len(report.paths) > 3
    back(tmp_path / "m.nxf", tmp_path / "b.gguf")
    assert (tmp_path / "b.gguf").read_bytes() == gguf.read_bytes()


def test_zstd_gives_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("zstandard")
    (gguf,) = write_llama(
        *(tmp_path / "m.gguf",),
        **{"n_layers": 1, "n_embd": 256, "n_ff": 512, "n_heads": 2, "n_heads_kv": 1},
        n_vocab=300,
        quant="F16",
    )
    assert_same([gguf], tmp_path, "zstd")
    report = there(gguf, tmp_path / "m.nxf", "zstd")
    assert any(t.n_raw == 0 for t in report.tensors)


def test_a_codec_that_is_not_there_is_named(tmp_path: Path) -> None:
    (gguf,) = write_moe(tmp_path / "m.gguf", dims=MoeDims(n_layers=1))
    with pytest.raises(UsageError, match="no codec 'lz77'; known are raw, ans, zstd"):
        there(gguf, tmp_path / "m.nxf", "lz77")
    assert not list(tmp_path.glob("*.nxf*"))
    assert Codecs().names() == ("raw", "ans", "zstd")
