"""An NXF opens as the model that it was made of, and says where every chunk is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import xxhash

from nexus_ext.formats import open_gguf, open_model
from nexus_ext.testing.synthetic import MoeDims, write_llama, write_moe
from nexus_ext.types import Role
from tests.synth.nxf import draft_of


def by_hand(gguf: Path, target: Path) -> Path:
    tensors = open_gguf(gguf).tensors
    draft = draft_of(
        gguf,
        [
            (t.name, t.offset, t.nbytes, t.n_experts if t.layer == 0 and t.n_experts else 1)
            for t in tensors
        ],
    )
    target.write_bytes(draft.encode())
    return target


def test_a_model_of_either_container_has_one_catalog(tmp_path: Path) -> None:
    (gguf,) = write_llama(
        tmp_path / "m.gguf", n_layers=2, n_embd=64, n_ff=96, n_heads=2, n_heads_kv=1, n_vocab=300
    )
    found = open_model(by_hand(gguf, tmp_path / "m.nxf"))
    expected = open_model(gguf)
    assert (expected.container, expected.chunks) == ("gguf", None)
    assert found.container == "nxf"
    assert [Path(f.path).name for f in found.files] == ["m.nxf"]
    moved = [replace(t, file=0, offset=0) for t in found.tensors]
    assert moved == [replace(t, file=0, offset=0) for t in expected.tensors]
    for name in ("shape", "metadata", "fingerprint", "header", "virtual_offsets", "virtual_nbytes"):
        assert getattr(found, name) == getattr(expected, name)


def test_chunks_are_where_the_table_says(tmp_path: Path) -> None:
    dims = MoeDims(n_layers=2, n_experts=4)
    (gguf,) = write_moe(tmp_path / "m.gguf", dims=dims)
    nxf = by_hand(gguf, tmp_path / "m.nxf")
    stored, source = nxf.read_bytes(), gguf.read_bytes()
    catalog = open_model(nxf)
    assert catalog.chunks is not None
    for tensor, original in zip(catalog.tensors, open_gguf(gguf).tensors, strict=True):
        chunks = catalog.chunks.chunks_of(tensor.name)
        raw = b""
        for chunk in chunks.chunks:
            piece = stored[chunk.offset : chunk.offset + chunk.stored_nbytes]
            assert xxhash.xxh3_64_intdigest(piece) == chunk.hash
            raw += piece
        assert raw == source[original.offset : original.offset + original.nbytes]
        assert (tensor.offset, tensor.file) == (chunks.chunks[0].offset, 0)
        if tensor.role is Role.EXPERT and tensor.layer == 0:
            assert chunks.n_matrices == dims.n_experts
            assert chunks.span() is None  # other parts of the record lie in between
            assert (
                b"".join(stored[c.offset : c.offset + c.stored_nbytes] for c in chunks.of_matrix(2))
                == (raw[2 * len(raw) // 4 : 3 * len(raw) // 4])
            )
        else:
            assert chunks.n_matrices == 1
            assert chunks.span() == (0, tensor.offset, tensor.nbytes)
