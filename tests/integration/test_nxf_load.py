"""An NXF runs as the GGUF that it was made of does: the same bits, streamed and resident."""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Iterator
from ctypes.util import find_library
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nexus_ext import Llama
from nexus_ext.errors import FormatError, ModelChanged, ReadFailed, UsageError
from nexus_ext.formats import open_model
from nexus_ext.formats.nxf_convert import to_nxf
from nexus_ext.formats.nxf_layout import Order, Rules
from nexus_ext.formats.sources import open_source
from nexus_ext.placement import PlanRequest, memory
from nexus_ext.runtime.batch import Row
from nexus_ext.runtime.manifest import VERIFY_VARIABLE
from nexus_ext.runtime.planning import plan_model
from nexus_ext.testing.synthetic import MoeDims, write_llama, write_moe
from nexus_ext.types import Chunk
from tests.cli_support import call
from tests.integration.alone import Alone
from tests.integration.streaming import Bits, logits, paged, prompt, stock
from tests.integration.test_batch import Opened, prefill
from tests.integration.test_experts import cached
from tests.models_folder import find_model

SMALL: dict[str, Any] = {"n_ctx": 256, "n_batch": 256, "n_ubatch": 64}
TINY_LENGTHS = (1, 40)
# The package converts, the system's library decodes while weights are streamed.
ZSTD = pytest.param(
    "zstd",
    marks=pytest.mark.skipif(
        importlib.util.find_spec("zstandard") is None or find_library("zstd") is None,
        reason="needs the package zstandard and the system's libzstd",
    ),
)
CODECS = ("raw", "ans", ZSTD)


def convert(
    gguf: Path, nxf: Path, codec: str, *, order: Order | None = None, shard: int | None = None
) -> None:
    source = open_source(gguf)
    try:
        to_nxf(source, nxf, rules=Rules(codec), order=order, shard_nbytes=shard)
    finally:
        source.close()


def shuffled(layer: int, n_experts: int) -> list[int]:
    return random.Random(layer).sample(range(n_experts), n_experts)


def assert_same(
    nxf: Path,
    gguf: Path,
    shares: tuple[float, ...] = (0.2, 0.6, 3),
    lengths: tuple[int, ...] = (1, 130),
) -> None:
    with stock(gguf, **SMALL) as llm:
        n_vocab = llm.n_vocab()
        bits = {n: logits(llm, prompt(n, n_vocab)) for n in lengths}
    nbytes = open_model(gguf).nbytes
    used = []
    for share in shares:
        with paged(nxf, int(nbytes * share), **SMALL) as llm:
            for n in lengths:
                assert np.array_equal(logits(llm, prompt(n, n_vocab)), bits[n]), (share, n)
            assert llm.nexus.active
            used.append(llm.nexus.stats().bytes_used)
    assert used[0] > 0, "nothing was streamed, so nothing was shown"
    assert used[-1] == 0, "something was streamed although everything fits"


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("name", ["stories260K-f32.gguf", "bitllama-3M-q4_k_m.gguf"])
def test_dense_models(name: str, codec: str, tmp_path: Path) -> None:
    gguf, nxf = find_model(name), tmp_path / "model.nxf"
    convert(gguf, nxf, codec)
    assert_same(nxf, gguf)


@pytest.mark.parametrize("n_vocab", [602, 604])
def test_slabs_that_are_not_whole_chunks(n_vocab: int, tmp_path: Path) -> None:
    """Matrices of several chunks, in budgets whose ring has no room for three of them."""
    gguf, nxf = tmp_path / "model.gguf", tmp_path / "model.nxf"
    write_llama(
        gguf, n_layers=1, n_embd=1024, n_ff=1024, n_heads=4, n_heads_kv=2, n_vocab=n_vocab,
        quant="BF16",
    )  # fmt: skip
    convert(gguf, nxf, "ans")
    assert_same(nxf, gguf, (0.05, 3), (2,))


def test_shards_and_hashes_of_what_is_stored_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf, nxf = find_model("bitllama-3M-q4_k_m.gguf"), tmp_path / "model.nxf"
    convert(gguf, nxf, "raw", shard=300_000)
    assert len(open_model(nxf).files) > 3
    nbytes = open_model(gguf).nbytes
    for verify in ("never", "always", "first"):
        monkeypatch.setenv(VERIFY_VARIABLE, verify)
        assert_same(nxf, gguf, (0.4, 3))
        with paged(nxf, "700K", **SMALL) as llm:
            for _ in range(3):
                logits(llm, prompt(4, llm.n_vocab()))
            compared = core(llm).stats().raw_bytes
            assert (compared > 0) == (verify != "never"), verify
            # Rows and edges of slabs are read with the whole chunk, which may be compared again.
            assert (compared > 2 * nbytes) == (verify == "always"), (verify, compared, nbytes)


def core(llm: Llama) -> Any:
    assert llm.nexus.model is not None
    return llm.nexus.model


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[int, Bits], int]]:
    gguf = tmp_path_factory.mktemp("moe") / "moe.gguf"
    write_moe(gguf, arch="qwen3moe", dims=MoeDims(n_embd=256, n_ff=256, n_vocab=400), quant="F16")
    with stock(gguf, n_ctx=128, n_batch=128, n_ubatch=64, n_threads=1) as llm:
        n_vocab = llm.n_vocab()
        yield gguf, {n: logits(llm, prompt(n, n_vocab), 10) for n in TINY_LENGTHS}, n_vocab


@pytest.mark.parametrize("slots", [0, 3])
@pytest.mark.parametrize("order", [None, shuffled])
@pytest.mark.parametrize("codec", CODECS)
def test_experts(
    codec: str,
    order: Order | None,
    slots: int,
    moe: tuple[Path, dict[int, Bits], int],
    tmp_path: Path,
) -> None:
    """Records in any order; with a cache, and with prefill in waves without one."""
    gguf, bits, n_vocab = moe
    nxf = tmp_path / "moe.nxf"
    convert(gguf, nxf, codec, order=order)
    with cached(nxf, slots) as llm:
        for n in TINY_LENGTHS:
            assert np.array_equal(logits(llm, prompt(n, n_vocab), 10), bits[n]), n
        assert core(llm).stats().bytes_used > 0 or core(llm).stats().expert_misses > 0


@pytest.mark.parametrize(
    "case",
    [
        {"arch": "gpt-oss", "quant": "Q8_0", "expert_quant": "MXFP4"},
        {"arch": "deepseek2", "fused": True},
        {"arch": "llama", "quant": "Q4_0"},
    ],
)
def test_experts_of_other_architectures(case: dict[str, Any], tmp_path: Path) -> None:
    gguf, nxf = tmp_path / "moe.gguf", tmp_path / "moe.nxf"
    write_moe(gguf, **case)
    convert(gguf, nxf, "raw", order=shuffled)
    with stock(gguf, n_ctx=128, n_batch=128, n_ubatch=64, n_threads=1) as llm:
        n_vocab = llm.n_vocab()
        bits = logits(llm, prompt(40, n_vocab), 10)
    with cached(nxf, 3) as llm:
        assert np.array_equal(logits(llm, prompt(40, n_vocab), 10), bits)


def test_an_nxf_and_a_gguf_at_the_same_time(
    moe: tuple[Path, dict[int, Bits], int], tmp_path: Path
) -> None:
    gguf, bits, n_vocab = moe
    nxf = tmp_path / "moe.nxf"
    convert(gguf, nxf, "ans")
    with cached(nxf, 3) as one, cached(gguf, 3) as other:
        for n in TINY_LENGTHS:
            for llm in (one, other):
                assert np.array_equal(logits(llm, prompt(n, n_vocab), 10), bits[n]), n


@pytest.mark.parametrize("codec", ["raw", "ans"])
def test_weights_of_an_nxf_come_and_go(
    codec: str, moe: tuple[Path, dict[int, Bits], int], tmp_path: Path
) -> None:
    """As the multiplexer moves them: dense weights and slots of experts, between tokens."""
    gguf, _, n_vocab = moe
    nxf = tmp_path / "moe.nxf"
    convert(gguf, nxf, codec, order=shuffled)
    alone = Alone(gguf)
    expected = alone.greedy(prompt(40, n_vocab), 6)
    alone.close()
    opened = Opened(nxf)
    n_units = len(opened.plan.units)
    row = prefill(opened.context, 0, prompt(40, n_vocab), 64)
    for step, wanted in enumerate(expected):
        assert np.array_equal(row, wanted), step
        opened.model.set_resident((n_units, 0, n_units // 2)[step % 3])
        opened.context.compute([Row(int(row.argmax()), 40 + step, 0, True)])
        row = opened.context.logits(0).copy()
    opened.close()


# -- faults ---------------------------------------------------------------------------------------


@pytest.fixture
def encoded(tmp_path: Path) -> Path:
    nxf = tmp_path / "model.nxf"
    gguf = tmp_path / "model.gguf"
    write_llama(
        gguf, n_layers=3, n_embd=512, n_ff=1024, n_heads=4, n_heads_kv=2, n_vocab=600, quant="BF16"
    )
    convert(gguf, nxf, "ans")
    return nxf


def chunk_of(nxf: Path, tensor: str, index: int = 0) -> Chunk:
    chunks = open_model(nxf).chunks
    assert chunks is not None
    return chunks.chunks_of(tensor).chunks[index]


STREAMED = "blk.1.ffn_up.weight"


def streaming(nxf: Path) -> Any:
    return paged(nxf, "1G", pins=[(STREAMED.replace(".", r"\."), "nvme")], **SMALL)


def test_a_read_that_fails_is_named_and_the_next_call_works(encoded: Path) -> None:
    with streaming(encoded) as llm:
        tokens = prompt(40, llm.n_vocab())
        bits = logits(llm, tokens)
        core(llm).inject("eio", count=2)
        assert np.array_equal(logits(llm, tokens), bits), "tried again"
        core(llm).inject("short", count=5)
        assert np.array_equal(logits(llm, tokens), bits)
        core(llm).inject("eio")
        with pytest.raises(ReadFailed, match=STREAMED) as failure:
            logits(llm, tokens)
        assert failure.value.path == str(encoded) and failure.value.errno == 5
        assert "chunk 0" in str(failure.value)
        core(llm).clear_faults()
        assert np.array_equal(logits(llm, tokens), bits)


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 4]))


def test_a_flipped_bit_in_a_streamed_chunk_names_tensor_chunk_and_offset(encoded: Path) -> None:
    chunk = chunk_of(encoded, STREAMED)
    assert chunk.codec == "ans"
    flip(encoded, chunk.offset + chunk.stored_nbytes // 2)
    with streaming(encoded) as llm:
        for _ in range(2):  # the next call says it again
            with pytest.raises(FormatError) as failure:
                logits(llm, prompt(4, llm.n_vocab()))
            for part in (STREAMED, "chunk 0", str(chunk.offset), str(encoded)):
                assert part in str(failure.value)


def test_a_flipped_bit_in_a_resident_chunk_fails_the_load(encoded: Path) -> None:
    chunk = chunk_of(encoded, "blk.0.ffn_down.weight")
    flip(encoded, chunk.offset + 100)
    with pytest.raises(FormatError, match=r"chunk 0 of tensor blk\.0\.ffn_down\.weight"):
        streaming(encoded).__enter__()


@pytest.fixture
def as_it_is(tmp_path: Path) -> Path:
    gguf, nxf = tmp_path / "model.gguf", tmp_path / "model.nxf"
    write_llama(gguf, n_layers=2, n_embd=256, n_ff=512, n_heads=4, n_heads_kv=2, n_vocab=600)
    convert(gguf, nxf, "raw")
    return nxf


@pytest.mark.parametrize("tensor", [STREAMED, "blk.0.ffn_down.weight"])
def test_a_bit_flipped_in_what_is_stored_as_it_is_is_found(tensor: str, as_it_is: Path) -> None:
    chunk = chunk_of(as_it_is, tensor)
    assert chunk.codec == "raw"
    flip(as_it_is, chunk.offset + 5)
    with (
        pytest.raises(FormatError) as failure,
        streaming(as_it_is) as llm,
    ):  # resident ones: at once
        assert tensor == STREAMED, "what is resident is read and checked at once"
        logits(llm, prompt(4, llm.n_vocab()))
    for part in (tensor, "chunk 0", str(chunk.offset), str(as_it_is)):
        assert part in str(failure.value)


def test_a_bit_flipped_in_an_expert_that_is_stored_as_it_is_is_found(tmp_path: Path) -> None:
    gguf, nxf = tmp_path / "moe.gguf", tmp_path / "moe.nxf"
    write_moe(gguf, arch="llama", quant="F16")
    convert(gguf, nxf, "raw", order=shuffled)
    name = "blk.1.ffn_up_exps.weight"
    chunks = open_model(nxf).chunks
    assert chunks is not None
    for chunk in chunks.chunks_of(name).chunks:  # of every expert: whichever is chosen
        flip(nxf, chunk.offset + chunk.stored_nbytes - 1)
    with cached(nxf, 3) as llm, pytest.raises(FormatError, match=name.replace(".", r"\.")):
        logits(llm, prompt(4, llm.n_vocab()))


def test_what_was_checked_once_is_checked_again_only_when_asked_for(
    as_it_is: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk = chunk_of(as_it_is, STREAMED)
    for verify, noticed in (("first", False), ("always", True), ("never", False)):
        monkeypatch.setenv(VERIFY_VARIABLE, verify)
        with streaming(as_it_is) as llm:
            tokens = prompt(4, llm.n_vocab())
            logits(llm, tokens)
            times = as_it_is.stat()
            flip(as_it_is, chunk.offset + 5)
            # The disk that changes a bit does not change the time.
            os.utime(as_it_is, ns=(times.st_atime_ns, times.st_mtime_ns))
            if noticed:
                with pytest.raises(FormatError, match=STREAMED):
                    logits(llm, tokens)
            else:
                logits(llm, tokens)
        flip(as_it_is, chunk.offset + 5)
    monkeypatch.setenv(VERIFY_VARIABLE, "sometimes")
    with pytest.raises(UsageError, match="'sometimes'"):
        streaming(as_it_is).__enter__()


def test_a_file_cut_off_while_it_is_in_use_is_noticed(encoded: Path) -> None:
    with streaming(encoded) as llm:
        tokens = prompt(4, llm.n_vocab())
        logits(llm, tokens)
        with encoded.open("r+b") as file:
            file.truncate(encoded.stat().st_size - 4096)
        with pytest.raises(ModelChanged):
            logits(llm, tokens)


# -- accounting -----------------------------------------------------------------------------------


def test_a_plan_counts_what_is_stored_and_the_room_to_decode_it(encoded: Path) -> None:
    request = PlanRequest(weights_bytes=3 << 20, gpu_bytes=0)
    nxf = plan_model(encoded, request)
    gguf = plan_model(encoded.with_suffix(".gguf"), request)
    assert nxf.plan.tiers == gguf.plan.tiers
    ratio = nxf.plan.streamed_bytes_per_token / gguf.plan.streamed_bytes_per_token
    assert 0.5 < ratio < 0.9
    room = memory.bounce_bytes(nxf.catalog)
    more = nxf.plan.breakdown["runtime"] - gguf.plan.breakdown["runtime"]
    assert 0 < room <= more < 1.01 * room  # and the page tables of that
    assert memory.bounce_bytes(gguf.catalog) == 0


def test_statistics_tell_stored_bytes_from_decoded_ones(encoded: Path) -> None:
    with streaming(encoded) as llm:
        llm.nexus.reset_stats()
        logits(llm, prompt(1, llm.n_vocab()), n_decode=3)
        chunk, stats = chunk_of(encoded, STREAMED), llm.nexus.stats()
        assert stats.stored_bytes < stats.raw_bytes
        assert stats.raw_bytes % chunk.raw_nbytes == 0 and stats.raw_bytes >= 4 * chunk.raw_nbytes
        assert stats.bytes_read < stats.bytes_used, "fewer bytes came from the disk than were used"
        assert stats.decode_s > 0
        assert core(llm).stats().bounce_bytes <= memory.bounce_bytes(llm.nexus.catalog)


# -- commands -------------------------------------------------------------------------------------


def test_commands_take_an_nxf(encoded: Path) -> None:
    assert call("inspect", encoded, "--json", "--tensors").json["tensors"]
    plan = call("plan", encoded, "--weights", "3M", "--json").json
    assert plan["everything_fits"] is False
    arguments = ("--weights", "3M", "--prompt-tokens", "8", "-n", "3", "--json")
    found = call("verify", encoded, *arguments).json
    assert found["identical"] is True and found["streamed_nbytes"] > 0
    done = call("exec", "--model", encoded, "--", "true")
    assert done.status == 2 and "no argument of true is" in done.err
