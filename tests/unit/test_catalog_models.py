"""The catalog says of trained models and of every ggml type what the gguf package says."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader

from nexus_ext.formats import open_gguf
from nexus_ext.formats.ggml_types import ggml_types
from nexus_ext.formats.gguf_header import ArraySize
from nexus_ext.testing.synthetic import Tensor, Value, write_gguf, write_llama, write_moe
from nexus_ext.types import Catalog, Role

_REPOSITORY = Path(__file__).resolve().parents[2]
MODELS = Path(os.environ.get("NEXUS_TEST_MODELS", _REPOSITORY.parent / "shared" / "models"))
MODEL_FILES = sorted(MODELS.glob("*.gguf"))
needs_models = pytest.mark.skipif(
    not MODEL_FILES, reason=f"no models in {MODELS}; set NEXUS_TEST_MODELS"
)

Facts = list[tuple[str, tuple[int, ...], str, int, int]]


def facts_of_reader(path: Path) -> Facts:
    return [
        (
            tensor.name,
            tuple(int(extent) for extent in tensor.shape),
            tensor.tensor_type.name,
            int(tensor.data_offset),
            int(tensor.n_bytes),
        )
        for tensor in GGUFReader(path).tensors
    ]


def facts_of_catalog(catalog: Catalog) -> Facts:
    return [(t.name, t.shape, t.type_name, t.offset, t.nbytes) for t in catalog.tensors]


@needs_models
@pytest.mark.parametrize("path", MODEL_FILES, ids=lambda path: path.stem)
def test_catalog_equals_the_reader_of_the_gguf_package(path: Path) -> None:
    catalog = open_gguf(path)
    reader = GGUFReader(path)
    assert facts_of_catalog(catalog) == facts_of_reader(path)
    assert catalog.files[0].nbytes == path.stat().st_size
    assert len(catalog.header) == reader.data_offset
    assert path.read_bytes().startswith(catalog.header)
    keys = {key for key in reader.fields if not key.startswith("GGUF.")}
    assert set(catalog.metadata) == keys
    for key, value in catalog.metadata.items():
        expected = reader.fields[key].contents()
        if isinstance(value, ArraySize):
            assert value.length == len(expected)
        else:
            assert (list(value) if isinstance(value, tuple) else value) == expected


@needs_models
@pytest.mark.parametrize("path", MODEL_FILES, ids=lambda path: path.stem)
def test_every_matrix_of_a_trained_model_has_a_role(path: Path) -> None:
    catalog = open_gguf(path)
    unknown = [t.name for t in catalog.tensors if t.role is Role.OTHER]
    # The input projection of a draft head is the one matrix without a role among them.
    assert unknown == (["fc.weight"] if "eagle3" in path.name else [])
    assert catalog.shape.n_vocab in (512, 4096)
    assert catalog.shape.n_embd == {"stories260K": 64}.get(path.stem.split("-")[0], 256)


# The package still gives Q8_1 the size that it had before ggml made its scales smaller.
@pytest.mark.parametrize(
    "kind",
    sorted(set(GGML_QUANT_SIZES) - {GGMLQuantizationType.Q8_1}),
    ids=lambda kind: kind.name,
)
def test_every_ggml_type_has_the_size_that_the_gguf_package_gives(
    kind: GGMLQuantizationType, tmp_path: Path
) -> None:
    row = 3 * 256
    tensors = [
        Tensor("token_embd.weight", (row, 5), kind.name),
        Tensor("blk.0.ffn_up_exps.weight", (row, 7, 3), kind.name),
        Tensor("output_norm.weight", (row,)),
    ]
    pairs: dict[str, Value] = {"general.architecture": "test", "test.block_count": 1}
    (path,) = write_gguf(tmp_path / "m.gguf", pairs, tensors, sparse=True)
    assert facts_of_catalog(open_gguf(path)) == facts_of_reader(path)


def test_the_types_of_ggml_itself_have_the_same_sizes() -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    library = llama_cpp.llama_cpp._lib
    block_elements = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int)(("ggml_blck_size", library))
    block_nbytes = ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.c_int)(("ggml_type_size", library))
    for number, kind in ggml_types().items():
        found = (block_elements(number), block_nbytes(number))
        assert found == (kind.block_elements, kind.block_nbytes), kind


@pytest.mark.parametrize("alignment", [8, 16, 32, 64, 4096, 65536])
@pytest.mark.parametrize("version", [2, 3])
def test_any_alignment_and_both_versions_are_read(
    alignment: int, version: int, tmp_path: Path
) -> None:
    tensors = [Tensor("a", (3,)), Tensor("b", (5, 7)), Tensor("c", (1,))]
    (path,) = write_gguf(
        tmp_path / "m.gguf",
        {"general.architecture": "test"},
        tensors,
        alignment=alignment,
        version=version,
    )
    catalog = open_gguf(path)
    assert facts_of_catalog(catalog) == facts_of_reader(path)
    assert all(tensor.offset % alignment == 0 for tensor in catalog.tensors)
    assert catalog.virtual_offsets == tuple(tensor.offset for tensor in catalog.tensors)


def test_a_long_header_is_read_whole_and_its_vocabulary_kept_as_a_size(tmp_path: Path) -> None:
    """150k tokens and more than 2,000 tensors: the size of the largest headers in use."""
    (path,) = write_llama(
        tmp_path / "m.gguf",
        n_layers=222,
        n_embd=256,
        n_ff=256,
        n_heads=8,
        n_heads_kv=4,
        n_vocab=150_000,
        sparse=True,
    )
    catalog = open_gguf(path)
    assert len(catalog.tensors) == 222 * 9 + 3
    assert catalog.shape.n_vocab == 150_000
    assert catalog.shape.n_layers == 222
    assert catalog.metadata["tokenizer.ggml.tokens"] == ArraySize("string", 150_000)
    assert catalog.metadata["tokenizer.ggml.scores"] == ArraySize("float32", 150_000)


def test_a_tied_embedding_is_marked_and_an_untied_one_is_not(tmp_path: Path) -> None:
    for tied in (True, False):
        (path,) = write_llama(
            tmp_path / "m.gguf",
            n_layers=1,
            n_embd=64,
            n_ff=64,
            n_heads=2,
            n_heads_kv=1,
            n_vocab=300,
            tied=tied,
        )
        marked = [t.name for t in open_gguf(path).tensors if t.tied_output]
        assert marked == (["token_embd.weight"] if tied else [])


def test_the_fingerprint_names_header_and_size_of_the_file(tmp_path: Path) -> None:
    (path,) = write_moe(tmp_path / "m.gguf")
    before = open_gguf(path).fingerprint
    assert before == open_gguf(path).fingerprint
    assert len(before) == 32
    with path.open("ab") as file:
        file.write(b"more")
    assert open_gguf(path).fingerprint != before


def test_the_facts_of_a_mixture_of_experts(tmp_path: Path) -> None:
    (path,) = write_moe(tmp_path / "m.gguf", arch="qwen2moe")
    catalog = open_gguf(path)
    assert (catalog.shape.n_experts, catalog.shape.n_experts_used) == (8, 2)
    roles = {tensor.name: tensor.role for tensor in catalog.tensors}
    assert roles["blk.1.ffn_up_exps.weight"] is Role.EXPERT
    assert roles["blk.1.ffn_up_shexp.weight"] is Role.SHARED_EXPERT
    assert roles["blk.1.ffn_gate_inp.weight"] is Role.ROUTER
    assert roles["blk.1.ffn_gate_inp_shexp.weight"] is Role.SMALL
    assert roles["blk.1.attn_q.bias"] is Role.SMALL
    experts = next(t for t in catalog.tensors if t.role is Role.EXPERT)
    assert experts.n_experts == 8
    assert experts.row_nbytes * experts.n_rows == experts.nbytes
