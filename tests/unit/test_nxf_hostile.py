"""Damaged and hostile NXF files: a FormatError that names what is wrong, and little memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nexus_ext.errors import Damaged, FormatError
from nexus_ext.formats import open_model
from nexus_ext.formats.ggml_types import ggml_types
from nexus_ext.formats.nxf_convert import to_nxf
from nexus_ext.formats.nxf_file import read_nxf
from nexus_ext.formats.nxf_layout import Rules
from nexus_ext.formats.nxf_reader import NxfReader
from nexus_ext.formats.nxf_verify import check_file
from nexus_ext.formats.sources import NxfSource, open_source
from nexus_ext.testing.synthetic import MoeDims, write_moe
from tests.attacks.nxf import ATTACKS, valid
from tests.synth.nxf import Draft

ALLOCATION_LIMIT_BYTES = 8 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nxf")


@pytest.fixture(scope="module")
def whole(folder: Path) -> bytes:
    """A small model of experts, coded, as the product writes it."""
    (gguf,) = write_moe(folder / "w.gguf", dims=MoeDims(n_layers=1, n_experts=2), quant="BF16")
    source = open_source(gguf)
    to_nxf(source, folder / "w.nxf", rules=Rules("ans", (("ffn", "raw"),)))
    source.close()
    return (folder / "w.nxf").read_bytes()


def written(draft: Draft, folder: Path) -> Path:
    path = folder / "m.nxf"
    path.write_bytes(draft.encode())
    return path


def test_the_file_that_the_attacks_change_is_good(tmp_path: Path) -> None:
    path = written(valid(tmp_path), tmp_path)
    assert open_model(path).container == "nxf"
    assert check_file(path).findings == ()


@pytest.mark.parametrize("name", ATTACKS)
def test_hostile_files_are_refused(name: str, tmp_path: Path) -> None:
    change, message = ATTACKS[name]
    draft = valid(tmp_path)
    change(draft)
    path = written(draft, tmp_path)
    ggml_types()  # the table is loaded once and is not the file's doing
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=message):
            open_model(path)
        assert tracemalloc.get_traced_memory()[1] < ALLOCATION_LIMIT_BYTES
    finally:
        tracemalloc.stop()


FIXTURES = [HealthCheck.function_scoped_fixture]


@settings(max_examples=150, deadline=None, suppress_health_check=FIXTURES)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found_and_named(
    whole: bytes, folder: Path, place: float, bit: int
) -> None:
    at = int(place * len(whole))
    assert_found(whole, folder, at, bit)


@pytest.mark.parametrize("at", [0, 8, 12, 16, 24, 32, 40, 48, 56, 63, 64, 500, -1])
def test_flipped_bits_of_the_preamble_are_found(whole: bytes, folder: Path, at: int) -> None:
    for bit in range(8):
        assert_found(whole, folder, at % len(whole), bit)


def assert_found(whole: bytes, folder: Path, at: int, bit: int) -> None:
    path = folder / "flipped.nxf"
    damaged = bytearray(whole)
    damaged[at] ^= 1 << bit
    path.write_bytes(damaged)
    try:
        file = read_nxf(str(path))
    except FormatError as error:
        assert str(path) in str(error)
        assert at < read_nxf(str(folder / "w.nxf")).header_nbytes
        return
    (finding,) = check_file(path).findings
    table, nxf = file.table, file.nxf
    inside = (table["offset"] <= at) & (at - table["offset"] < table["stored"])
    if inside.any():
        index = int(inside.argmax())
        item = next(i for i in reversed(nxf.items) if i.first_chunk <= index)
        assert (finding.item, finding.chunk) == (item.name, index - item.first_chunk)
        assert finding.offset == int(table["offset"][index])
        assert f"tensor '{item.name}', chunk {finding.chunk} of" in finding.what
        assert f"at byte {finding.offset}" in finding.what
        with NxfReader(file) as reader, pytest.raises(Damaged):
            reader.chunk(index)
    else:
        assert (finding.item, finding.chunk, finding.offset) == ("", -1, at)


@settings(max_examples=60, deadline=None, suppress_health_check=FIXTURES)
@given(keep=st.floats(0, 1, exclude_max=True))
def test_a_file_that_was_cut_anywhere_is_refused(whole: bytes, folder: Path, keep: float) -> None:
    path = folder / "cut.nxf"
    path.write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(FormatError):
        read_nxf(str(path))


def test_a_file_with_something_at_its_end_is_refused(whole: bytes, folder: Path) -> None:
    path = folder / "longer.nxf"
    path.write_bytes(whole + b"\0")
    with pytest.raises(FormatError, match="are expected"):
        read_nxf(str(path))


def test_shards_do_not_stand_for_models_or_for_each_other(tmp_path: Path) -> None:
    (gguf,) = write_moe(tmp_path / "m.gguf", dims=MoeDims(n_layers=2))
    for name, codec in (("a", "raw"), ("b", "ans")):
        source = open_source(gguf)
        to_nxf(source, tmp_path / f"{name}.nxf", rules=Rules(codec), shard_nbytes=50_000)
        source.close()
    shards = sorted(tmp_path.glob("a.0*"))
    with pytest.raises(FormatError, match="is shard 1 of a model"):
        open_model(shards[0])
    one, other = shards[0].read_bytes(), shards[1].read_bytes()
    shards[0].write_bytes(other)
    with pytest.raises(FormatError, match="is shard 2, the model has it as shard 1"):
        open_model(tmp_path / "a.nxf")
    shards[0].write_bytes(one[:-1])
    with pytest.raises(FormatError, match="are expected"):
        open_model(tmp_path / "a.nxf")
    shards[0].write_bytes(one)
    changed = bytearray(one)
    changed[-1] ^= 1
    shards[0].write_bytes(changed)
    (finding,) = check_file(tmp_path / "a.nxf").findings
    assert finding.path == str(shards[0])
    # A main file in the place of a shard: no way to go round in circles.
    shards[0].write_bytes((tmp_path / "b.nxf").read_bytes())
    with pytest.raises(FormatError, match="is no shard: it has a model's header"):
        open_model(tmp_path / "a.nxf")
    shards[0].unlink()
    with pytest.raises(FormatError, match="is missing"):
        open_model(tmp_path / "a.nxf")


def test_a_chunk_whose_hash_is_right_but_does_not_decode_is_named(tmp_path: Path) -> None:
    draft = valid(tmp_path)
    draft.descriptor["codecs"] = ["raw", "ans"]
    draft.entries[1][5] = 1
    path = written(draft, tmp_path)
    (finding,) = check_file(path).findings
    assert (finding.item, finding.chunk) == ("a", 1)
    assert "are no encoding of 1024" in finding.what
    source = NxfSource(str(path))
    with pytest.raises(Damaged, match="tensor 'a', chunk 1 of 3 is damaged"):
        source.read(0, 0, 2048, bytearray())
    source.close()


def test_chunks_of_a_codec_that_is_not_installed_are_hashed_all_the_same(tmp_path: Path) -> None:
    draft = valid(tmp_path)
    draft.descriptor["codecs"] = ["raw", "x-rot13"]
    draft.entries[1][5] = 1
    report = check_file(written(draft, tmp_path))
    assert (report.findings, report.not_decoded) == ((), ("x-rot13",))
