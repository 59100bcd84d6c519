"""Memory beside the weights: never below what llama.cpp reports, and not far above."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nexus_ext.errors import UsageError
from nexus_ext.placement.memory import (
    compute_bytes,
    context_of,
    graph_bytes,
    kv_layer_bytes,
    runtime_bytes,
)
from nexus_ext.placement.plan import PlanRequest
from nexus_ext.types import Catalog
from tests.unit.test_placement_builders import model

MIB = 1 << 20

# Sizes of models: (layers, embedding, feed-forward, heads, key-value heads, head, vocabulary).
DENSE = {
    "7B": (4, 4096, 11008, 32, 32, 128, 32000),
    "8B": (4, 4096, 14336, 32, 8, 128, 128256),
    "1B": (16, 2048, 8192, 32, 8, 64, 128256),
    "70B": (3, 8192, 28672, 64, 8, 128, 128256),
    "4B": (4, 2560, 9728, 32, 8, 128, 151936),
    "tiny": (4, 256, 1024, 4, 2, 64, 1024),
    "small vocabulary": (4, 4096, 14336, 32, 8, 128, 1000),
    "narrow": (4, 2048, 256, 16, 16, 128, 1000),
    "wide heads": (4, 512, 1024, 16, 2, 256, 1000),
}
# And in a mixture: the same (feed-forward of one expert), experts, used experts.
MOE = {
    "30B-A3B": (4, 2048, 768, 32, 4, 128, 151936, 128, 8),
    "235B-A22B": (2, 4096, 1536, 64, 4, 128, 151936, 128, 8),
    "8x7B": (2, 4096, 14336, 32, 8, 128, 32000, 8, 2),
    "A3B, small vocabulary": (4, 2048, 768, 32, 4, 128, 1000, 128, 8),
}
# "compute buffer size" in MiB as llama.cpp (0c1e570) printed it, CPU only, F16 weights:
# model, n_ctx, n_ubatch, flash attention.
REPORTED = [
    ("7B", 512, 512, 0, 105.51),
    ("7B", 512, 512, 1, 97.01),
    ("7B", 4096, 512, 0, 320.01),
    ("7B", 4096, 512, 1, 100.51),
    ("7B", 4096, 32, 1, 6.28),
    ("7B", 16384, 512, 0, 1112.01),
    ("7B", 2048, 8, 0, 2.94),
    ("8B", 512, 512, 0, 266.50),
    ("8B", 4096, 512, 0, 308.01),
    ("8B", 4096, 2048, 1, 1066.01),
    ("8B", 16384, 512, 1, 266.50),
    ("1B", 16384, 512, 0, 1078.01),
    ("1B", 4096, 128, 0, 71.50),
    ("70B", 4096, 512, 0, 604.01),
    ("70B", 16384, 512, 0, 2164.01),
    ("70B", 4096, 512, 1, 282.50),
    ("4B", 16384, 512, 0, 1091.01),
    ("4B", 4096, 512, 1, 306.75),
    ("tiny", 512, 512, 0, 9.01),
    ("tiny", 16384, 512, 0, 163.01),
    ("tiny", 4096, 1, 1, 0.02),
    ("small vocabulary", 512, 512, 1, 116.51),
    ("small vocabulary", 4096, 32, 0, 19.25),
    ("narrow", 512, 512, 1, 24.51),
    ("narrow", 4096, 512, 0, 164.01),
    ("wide heads", 512, 512, 1, 25.51),
    ("wide heads", 4096, 512, 0, 157.01),
    ("30B-A3B", 4096, 512, 1, 304.75),
    ("30B-A3B", 16384, 512, 0, 1086.01),
    ("235B-A22B", 4096, 512, 0, 578.01),
    ("235B-A22B", 4096, 128, 0, 144.50),
    ("8x7B", 512, 512, 0, 205.01),
    ("8x7B", 4096, 512, 1, 204.01),
    ("A3B, small vocabulary", 512, 512, 1, 88.51),
    ("A3B, small vocabulary", 4096, 32, 1, 5.75),
]
# "KV buffer size" in MiB: model, n_ctx, reported.
REPORTED_KV = [("7B", 512, 32.0), ("8B", 4096, 64.0), ("1B", 16384, 512.0), ("30B-A3B", 512, 4.0)]


def named(name: str) -> Catalog:
    if name in DENSE:
        layers, embd, ff, heads, kv, head, vocab = DENSE[name]
        architecture = "qwen3" if name in ("4B", "wide heads") else "llama"
        experts = used = 0
    else:
        layers, embd, ff, heads, kv, head, vocab, experts, used = MOE[name]
        architecture = "llama" if name == "8x7B" else "qwen3moe"
    return model(
        n_layers=layers,
        n_embd=embd,
        n_ff=ff,
        n_heads=heads,
        n_heads_kv=kv,
        head_dim=head,
        n_vocab=vocab,
        n_experts=experts,
        n_used=used,
        architecture=architecture,
    )


@pytest.mark.parametrize(("name", "n_ctx", "n_ubatch", "flash", "reported"), REPORTED)
def test_compute_buffer_is_not_below_what_llama_cpp_reports_and_not_far_above(
    name: str, n_ctx: int, n_ubatch: int, flash: int, reported: float
) -> None:
    catalog = named(name)
    request = PlanRequest(n_ctx=n_ctx, n_batch=n_ubatch, n_ubatch=n_ubatch, flash_attn=bool(flash))
    size = graph_bytes(catalog, context_of(catalog.shape, request, 2)) / MIB
    assert reported <= size <= 1.3 * reported + 8


@pytest.mark.parametrize(("name", "n_ctx", "reported"), REPORTED_KV)
def test_kv_cache_is_what_llama_cpp_reports(name: str, n_ctx: int, reported: float) -> None:
    catalog = named(name)
    context = context_of(catalog.shape, PlanRequest(n_ctx=n_ctx), 2)
    assert sum(kv_layer_bytes(catalog, context)) / MIB == pytest.approx(reported, abs=0.01)


@pytest.mark.parametrize(
    ("kind", "reported"), [("f16", 32.0), ("q8_0", 17.0), ("q4_0", 9.0), ("f32", 64.0)]
)
def test_kv_cache_follows_its_type(kind: str, reported: float) -> None:
    catalog = model(n_layers=4, n_embd=2048, n_heads=32, n_heads_kv=8, head_dim=64)
    request = PlanRequest(n_ctx=4096, kv_type_k=kind, kv_type_v=kind, flash_attn=True)
    context = context_of(catalog.shape, request, 2)
    assert sum(kv_layer_bytes(catalog, context)) / MIB == pytest.approx(reported, abs=0.01)


def test_layers_without_attention_hold_their_recurrent_state_instead() -> None:
    keys = {"conv_kernel": 4, "inner_size": 4096, "state_size": 128, "group_count": 16}
    metadata: dict[str, object] = {f"qwen3next.ssm.{key}": n for key, n in keys.items()}
    catalog = model(n_layers=8, architecture="qwen3next", metadata=metadata)
    catalog = replace(catalog, shape=replace(catalog.shape, n_heads_kv=(0, 0, 0, 2) * 2))
    layers = kv_layer_bytes(catalog, context_of(catalog.shape, PlanRequest(), 2))
    # llama.cpp reports 12.56 MiB for six such layers.
    assert sum(layers[i] for i in (0, 1, 2, 4, 5, 6)) / MIB == pytest.approx(12.56, abs=0.01)
    assert layers[3] == layers[7] > 0
    plain = replace(catalog, metadata={})
    assert kv_layer_bytes(plain, context_of(catalog.shape, PlanRequest(), 2))[0] == 0


def test_latent_attention_has_no_values() -> None:
    full = model(architecture="deepseek2")
    latent = replace(full, metadata={"deepseek2.attention.key_length_mla": 192})
    context = context_of(full.shape, PlanRequest(), 2)
    assert 2 * sum(kv_layer_bytes(latent, context)) == pytest.approx(
        sum(kv_layer_bytes(full, context)), rel=0.01
    )


@pytest.mark.parametrize(
    ("n_ctx", "n_seq_max", "unified", "cells", "cells_seq"),
    [
        (512, 1, False, 512, 512),
        (500, 1, False, 512, 512),
        (4096, 4, False, 4096, 1024),
        (4096, 3, False, 4608, 1536),
        (4096, 4, True, 4096, 4096),
        (0, 1, False, 4096, 4096),
    ],
)
def test_contexts_are_rounded_as_llama_cpp_rounds_them(
    n_ctx: int, n_seq_max: int, unified: bool, cells: int, cells_seq: int
) -> None:
    request = PlanRequest(n_ctx=n_ctx, n_seq_max=n_seq_max, kv_unified=unified)
    context = context_of(model().shape, request, 2)
    assert (context.n_ctx, context.n_ctx_seq) == (cells, cells_seq)


def test_sequences_share_a_compute_buffer_as_llama_cpp_has_it() -> None:
    catalog = model(n_layers=4, n_embd=2048, n_ff=8192, n_heads=32, n_heads_kv=8, n_vocab=1000)
    for unified, reported in ((False, 88.01), (True, 286.01)):
        request = PlanRequest(n_ctx=4096, n_seq_max=4, kv_unified=unified)
        size = graph_bytes(catalog, context_of(catalog.shape, request, 2)) / MIB
        assert reported <= size <= 1.3 * reported


def test_fewer_outputs_need_less_room_for_logits() -> None:
    catalog = named("8B")
    sizes = []
    for n_outputs in (0, 64, 1):
        request = PlanRequest(n_outputs_max=n_outputs, flash_attn=True)
        sizes.append(compute_bytes(catalog, context_of(catalog.shape, request, 2)))
    assert sizes[0] > sizes[1] + 100 * MIB > sizes[2]


def test_all_logits_are_counted_when_all_are_kept() -> None:
    catalog = named("8B")
    one, every = (
        context_of(catalog.shape, PlanRequest(n_ctx=1024, logits_all=flag), 2)
        for flag in (False, True)
    )
    row = 4 * catalog.shape.n_vocab
    assert compute_bytes(catalog, every) - compute_bytes(catalog, one) == 511 * row
    assert runtime_bytes(catalog, every) - runtime_bytes(catalog, one) == 1024 * row


# Resident MiB of a process that had decoded with llama-cpp-python, file pages of the model left
# out: vocabulary, layers, resident. Embedding 64, two heads of 32, one of them with keys and
# values, context 512, batch 32. The package itself was not part of it.
RESIDENT = [
    (1024, 2, 47.5),
    (1024, 80, 58.4),
    (1024, 160, 70.2),
    (32000, 160, 78.8),
    (151936, 2, 90.3),
    (151936, 160, 111.0),
]


@pytest.mark.parametrize(("n_vocab", "n_layers", "resident"), RESIDENT)
def test_process_is_not_below_what_was_measured(
    n_vocab: int, n_layers: int, resident: float
) -> None:
    catalog = model(
        n_layers=n_layers,
        n_embd=64,
        n_ff=128,
        n_heads=2,
        n_heads_kv=1,
        head_dim=32,
        n_vocab=n_vocab,
    )
    context = context_of(catalog.shape, PlanRequest(n_batch=32, n_ubatch=32), 2)
    size = sum(kv_layer_bytes(catalog, context)) + runtime_bytes(catalog, context)
    assert resident <= size / MIB <= 1.3 * resident + 20


def test_kv_types_that_do_not_exist_are_refused() -> None:
    with pytest.raises(UsageError, match="'q3_0'"):
        context_of(model().shape, PlanRequest(kv_type_k="q3_0"), 2)


def test_quantized_values_without_flash_attention_are_refused() -> None:
    with pytest.raises(UsageError, match="flash attention"):
        context_of(model().shape, PlanRequest(kv_type_v="q8_0"), 2)
