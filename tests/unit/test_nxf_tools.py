"""check, diff, optimize, convert and inspect, as commands; and in which order records are put."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nexus_ext.formats import open_gguf, open_model
from nexus_ext.formats.nxf_reader import NxfReader
from nexus_ext.routing import RoutingTrace, TracedLayer
from nexus_ext.routing.order import co_activation, record_order, runs_per_token
from nexus_ext.testing.synthetic import MoeDims, write_moe
from tests.cli_support import call

DIMS = MoeDims(n_layers=2, n_experts=8, n_used=2)


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_moe(tmp_path_factory.mktemp("t") / "m.gguf", dims=DIMS, quant="BF16")[0]


def traced(decisions: list[list[int]], layer: int = 0) -> TracedLayer:
    return TracedLayer(layer, 8, 2, 1000, 1000, bytes(np.array(decisions, np.uint8).ravel()))


def trace_of(gguf: Path, decisions: list[list[int]]) -> RoutingTrace:
    """Return a trace of these decisions in every layer."""
    catalog = open_gguf(gguf)
    return RoutingTrace(
        fingerprint=catalog.fingerprint,
        architecture=catalog.shape.architecture,
        passes=(1,) * len(decisions),
        layers=tuple(traced(decisions, layer) for layer in range(2)),
    )


# Experts 6 and 1 always together, 3 and 4 sometimes; the others never.
DECISIONS = [[6, 1]] * 6 + [[3, 4]] * 3


def test_what_is_used_together_lies_together() -> None:
    layer = traced(DECISIONS)
    counts = co_activation(layer)
    assert counts[6, 1] == counts[1, 6] == counts[6, 6] == 6
    assert counts[3, 3] == 3 and counts[0].sum() == 0
    order = record_order(layer)
    assert sorted(order) == list(range(8))
    assert set(order[:2]) == {1, 6} and set(order[2:4]) == {3, 4}
    assert order[4:] == (0, 2, 5, 7)
    assert runs_per_token(layer, order) == 1.0
    assert runs_per_token(layer, tuple(range(8))) == pytest.approx((6 * 2 + 3 * 1) / 9)


def test_a_layer_that_nobody_used_keeps_its_order() -> None:
    layer = traced([])
    assert record_order(layer) == tuple(range(8))
    assert runs_per_token(layer, record_order(layer)) == 0.0


def test_convert_check_diff_and_inspect(gguf: Path, tmp_path: Path) -> None:
    nxf, back = tmp_path / "m.nxf", tmp_path / "b.gguf"
    wishes = ("--codec", "ans", "--rule", "token_embd=raw", "--tensors")
    done = call("convert", gguf, nxf, *wishes, "--json")
    assert done.status == 0
    assert done.json["stored_bytes"] < 0.8 * done.json["weights_bytes"]
    names = {tensor["name"]: tensor for tensor in done.json["tensors"]}
    assert names["output.weight"]["codec"] == "ans"
    assert names["token_embd.weight"]["codec"] == "raw"
    assert call("check", nxf).out.strip().endswith("all good")
    assert call("diff", gguf, nxf).out.strip() == "equal"
    assert call("convert", nxf, back, "--json").json["sha256"] == done.json["sha256"]
    assert back.read_bytes() == gguf.read_bytes()
    shown = call("inspect", nxf, "--json").json
    assert shown["container"] == "nxf"
    assert shown["chunks"]["n_records"] == 16
    assert shown["chunks"]["sources"][0][1] == done.json["sha256"][0]
    assert "records" in call("inspect", nxf).out
    assert call("inspect", gguf, "--json").json["chunks"] is None


def test_check_names_what_is_damaged(gguf: Path, tmp_path: Path) -> None:
    nxf = tmp_path / "m.nxf"
    assert call("convert", gguf, nxf).status == 0
    catalog = open_model(nxf)
    assert catalog.chunks is not None
    chunk = catalog.chunks.chunks_of("output.weight").chunks[0]
    damaged = bytearray(nxf.read_bytes())
    damaged[chunk.offset + 5] ^= 4
    nxf.write_bytes(damaged)
    done = call("check", nxf)
    assert done.status == 1
    assert (
        f"at byte {chunk.offset}" in done.out and "tensor 'output.weight', chunk 0 of" in done.out
    )
    assert "1 damaged" in done.out
    (finding,) = call("check", nxf, "--json").json["findings"]
    assert (finding["item"], finding["chunk"]) == ("output.weight", 0)
    assert call("convert", nxf, tmp_path / "b.gguf").status == 1
    assert not (tmp_path / "b.gguf").exists()


def test_diff_names_tensors_that_differ(gguf: Path, tmp_path: Path) -> None:
    other = tmp_path / "o.gguf"
    tensor = next(t for t in open_gguf(gguf).tensors if t.name == "blk.1.attn_q.weight")
    changed = bytearray(gguf.read_bytes())
    changed[tensor.offset + 77] ^= 1
    other.write_bytes(changed)
    done = call("diff", gguf, other)
    assert done.status == 1
    assert "blk.1.attn_q.weight: differs from its byte 77 on" in done.out
    (smaller,) = write_moe(tmp_path / "s.gguf", dims=replace(DIMS, n_layers=1), quant="BF16")
    done = call("diff", gguf, smaller, "--json")
    assert done.status == 1
    missing = [d for d in done.json["differences"] if d["what"] == f"is only in {gguf}"]
    assert len(missing) == sum(t.layer == 1 for t in open_gguf(gguf).tensors)


def test_optimize_orders_records_and_keeps_what_they_hold(gguf: Path, tmp_path: Path) -> None:
    nxf, fast, trace = tmp_path / "m.nxf", tmp_path / "f.nxf", tmp_path / "t.nxtrace"
    trace.write_bytes(trace_of(gguf, DECISIONS).to_bytes())
    assert call("convert", gguf, nxf, "--codec", "ans").status == 0
    done = call("optimize", nxf, fast, "--trace", trace, "--codec", "keep", "--json")
    assert done.status == 0 and done.json["equal"]
    assert [layer["runs_after"] for layer in done.json["layers"]] == [1.0, 1.0]
    with NxfReader(fast) as reader:
        for group in reader.file.nxf.groups:
            first = reader.file.nxf.tensors[group[0]]
            rows = reader.file.table[first.first_chunk : first.first_chunk + first.n_chunks]
            assert set(np.argsort(rows["offset"])[:2].tolist()) == {1, 6}
    assert call("diff", fast, gguf).status == 0
    kept = [call("inspect", f, "--json").json["chunks"]["chunks_by_codec"] for f in (nxf, fast)]
    assert kept[0] == kept[1]


@pytest.mark.parametrize(("disk", "codec"), [("1M", "ans"), ("1T", "raw")])
def test_optimize_chooses_a_codec_by_what_the_disk_gives(
    disk: str, codec: str, gguf: Path, tmp_path: Path
) -> None:
    done = call("optimize", gguf, tmp_path / "f.nxf", "--disk", disk, "--json")
    assert {c["type_name"]: c["codec"] for c in done.json["codecs"]}["BF16"] == codec
    assert codec in call("inspect", tmp_path / "f.nxf", "--json").json["chunks"]["chunks_by_codec"]


def test_optimize_refuses_what_does_not_belong_together(gguf: Path, tmp_path: Path) -> None:
    trace = tmp_path / "t.nxtrace"
    trace.write_bytes(replace(trace_of(gguf, DECISIONS), fingerprint="of another").to_bytes())
    done = call("optimize", gguf, tmp_path / "f.nxf", "--trace", trace, "--codec", "raw")
    assert done.status == 2 and "is of the model of another" in done.err
    done = call("optimize", gguf, tmp_path / "f.nxf", "--trace", tmp_path / "none")
    assert done.status == 2 and "cannot be read" in done.err
    done = call("optimize", gguf, gguf, "--force")
    assert done.status == 2 and "is the model itself" in done.err
    assert not (tmp_path / "f.nxf").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("m.bin",), "the ending does not say what it shall become"),
        (("m.nxf", "--rule", "ffn"), "is not an expression, '=' and a codec"),
        (("m.nxf", "--rule", "(=ans"), "the regular expression '(' is wrong"),
        (("m.nxf", "--rule", "fnn=ans"), "the rule 'fnn' is found in none"),
        (("m.nxf", "--codec", "lz77"), "there is no codec 'lz77'"),
        (("m.gguf",), "there is no conversion of"),
    ],
)
def test_wrong_wishes_are_explained(
    arguments: tuple[str, ...], message: str, gguf: Path, tmp_path: Path
) -> None:
    done = call("convert", gguf, tmp_path / arguments[0], *arguments[1:])
    assert done.status == 2 and message in done.err
    assert not list(tmp_path.iterdir())


def test_a_gguf_has_no_hashes_to_check(gguf: Path) -> None:
    done = call("check", gguf)
    assert done.status == 2 and "has no hashes to check" in done.err
