"""A split model opens from any part, and its one merged header describes it to llama.cpp."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from gguf import GGUFReader

from nexus_ext.errors import FormatError, ReadFailed
from nexus_ext.formats import open_gguf, open_model
from nexus_ext.testing.synthetic import Tensor, Typed, Value, write_gguf, write_llama, write_moe
from nexus_ext.types import Catalog


def write_split(directory: Path, *, parts: int = 3, alignment: int = 32) -> list[Path]:
    return write_llama(
        directory / "m.gguf",
        n_layers=2,
        n_embd=64,
        n_ff=96,
        n_heads=4,
        n_heads_kv=2,
        n_vocab=300,
        split=parts,
        alignment=alignment,
    )


def write_virtual(catalog: Catalog, path: Path) -> None:
    """Write the one file that the merged header describes."""
    with path.open("wb") as out:
        out.write(catalog.header)
        out.truncate(catalog.virtual_nbytes)
        for tensor, offset in zip(catalog.tensors, catalog.virtual_offsets, strict=True):
            with open(catalog.files[tensor.file].path, "rb") as source:
                source.seek(tensor.offset)
                out.seek(offset)
                out.write(source.read(tensor.nbytes))


def test_every_part_opens_the_same_model(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    catalogs = [open_gguf(path) for path in paths]
    assert catalogs[0] == catalogs[1] == catalogs[2]
    assert [file.path for file in catalogs[0].files] == [str(path) for path in paths]
    assert {tensor.file for tensor in catalogs[0].tensors} == {0, 1, 2}
    for number, path in enumerate(paths):
        mine = [t for t in catalogs[0].tensors if t.file == number]
        expected = [(t.name, t.data_offset, t.n_bytes) for t in GGUFReader(path).tensors]
        assert [(t.name, t.offset, t.nbytes) for t in mine] == expected


@pytest.mark.parametrize("alignment", [32, 256, 4096])
def test_the_merged_header_is_that_of_the_same_model_in_one_file(
    alignment: int, tmp_path: Path
) -> None:
    catalog = open_gguf(write_split(tmp_path, alignment=alignment)[0])
    whole = tmp_path / "whole.gguf"
    write_virtual(catalog, whole)
    again = open_gguf(whole)
    assert again.header == catalog.header
    assert again.virtual_offsets == catalog.virtual_offsets
    assert again.virtual_nbytes == catalog.virtual_nbytes
    assert again.shape == catalog.shape
    assert not [key for key in again.metadata if key.startswith("split.")]
    kept = {key: v for key, v in catalog.metadata.items() if not key.startswith("split.")}
    assert dict(again.metadata) == kept
    assert [(t.name, t.shape, t.type_name) for t in again.tensors] == [
        (t.name, t.shape, t.type_name) for t in catalog.tensors
    ]


def test_parts_with_alignments_of_their_own_are_merged_under_that_of_the_first(
    tmp_path: Path,
) -> None:
    common: dict[str, Value] = {"split.count": Typed(2, 2), "split.tensors.count": Typed(5, 4)}
    for number, alignment in enumerate((32, 512)):
        pairs: dict[str, Value] = {
            "general.architecture": "test",
            "split.no": Typed(2, number),
            **common,
        }
        tensors = [Tensor(f"t{number}.{index}", (7, 3)) for index in range(2)]
        path = tmp_path / f"m-{number + 1:05d}-of-00002.gguf"
        write_gguf(path, pairs, tensors, alignment=alignment)
    catalog = open_gguf(path)
    assert all(offset % 32 == 0 for offset in catalog.virtual_offsets)
    write_virtual(catalog, tmp_path / "whole.gguf")
    whole = open_gguf(tmp_path / "whole.gguf")
    assert whole.virtual_offsets == catalog.virtual_offsets


def test_a_first_part_without_tensors_is_allowed(tmp_path: Path) -> None:
    common: dict[str, Value] = {"split.count": Typed(2, 2), "split.tensors.count": Typed(5, 1)}
    for number, tensors in enumerate(([], [Tensor("t", (8,))])):
        pairs: dict[str, Value] = {
            "general.architecture": "test",
            "split.no": Typed(2, number),
            **common,
        }
        write_gguf(tmp_path / f"m-{number + 1:05d}-of-00002.gguf", pairs, tensors)
    catalog = open_gguf(tmp_path / "m-00001-of-00002.gguf")
    assert [tensor.file for tensor in catalog.tensors] == [1]


def test_a_single_file_that_counts_itself_as_one_part_is_a_whole_model(tmp_path: Path) -> None:
    pairs: dict[str, Value] = {"general.architecture": "test", "split.count": Typed(2, 1)}
    (path,) = write_gguf(tmp_path / "any-name.gguf", pairs, [Tensor("t", (8,))])
    assert len(open_gguf(path).files) == 1


def test_missing_renamed_and_foreign_parts_are_told_apart(tmp_path: Path) -> None:
    first, second, third = write_split(tmp_path)
    third.rename(tmp_path / "away")
    with pytest.raises(FormatError, match=r"1 of the 3 parts .* missing.*m-00003-of-00003\.gguf"):
        open_gguf(first)
    shutil.copy(second, third)
    with pytest.raises(FormatError, match=r"m-00003.*says that it is part 1 of 3"):
        open_gguf(first)
    (tmp_path / "away").replace(third)
    shutil.copy(first, tmp_path / "model.gguf")
    with pytest.raises(FormatError, match=r"its name does not end in '-<number>-of-00003\.gguf'"):
        open_gguf(tmp_path / "model.gguf")
    other = write_moe(tmp_path / "other.gguf", split=3)
    shutil.copy(other[1], second)
    with pytest.raises(FormatError, match=r"already in|'split\.tensors\.count' is"):
        open_gguf(first)


@pytest.mark.parametrize("value", ["two", Typed(5, -3), 70000, 2.0])
def test_a_senseless_split_count_is_refused(value: Value, tmp_path: Path) -> None:
    pairs: dict[str, Value] = {"general.architecture": "test", "split.count": value}
    (path,) = write_gguf(tmp_path / "m.gguf", pairs, [Tensor("t", (8,))])
    with pytest.raises(FormatError, match=r"split\.count"):
        open_gguf(path)


def test_a_file_that_is_not_there_or_no_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ReadFailed, match=r"nowhere\.gguf: cannot be read") as caught:
        open_gguf(tmp_path / "nowhere.gguf")
    assert caught.value.errno == 2
    with pytest.raises(FormatError, match="is a folder"):
        open_gguf(tmp_path)
    os.mkfifo(tmp_path / "pipe")  # which open() would wait at, since nobody writes
    with pytest.raises(FormatError, match="not a regular file"):
        open_model(tmp_path / "pipe")
