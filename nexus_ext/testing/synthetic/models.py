"""Which tensors and keys a model of a given architecture has.

Shapes and names are those that llama.cpp loads. Knows dense llama and the kinds of mixtures of
experts that differ in what a loader must handle.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nexus_ext.testing.synthetic.blocks import WEIGHT_STD, storable_type
from nexus_ext.testing.synthetic.container import Tensor, Value, write_gguf
from nexus_ext.testing.synthetic.vocab import tokenizer_pairs

MOE_ARCHITECTURES = (
    "qwen3moe",
    "qwen2moe",
    "llama",
    "gpt-oss",
    "deepseek2",
    "olmoe",
    "granitemoe",
    "qwen3next",
    "qwen35moe",
)
FUSED_ARCHITECTURES = ("deepseek2", "qwen3next", "qwen35moe")  # load ffn_gate_up_exps
MAX_LAYERS = 512  # that llama.cpp loads
HYBRID_ARCHITECTURES = ("qwen3next", "qwen35moe")  # every second layer is a Gated DeltaNet


@dataclass(frozen=True, slots=True)
class LlamaDims:
    """Size of a dense llama."""

    n_layers: int
    n_embd: int
    n_ff: int
    n_heads: int
    n_heads_kv: int
    n_vocab: int = 32000


@dataclass(frozen=True, slots=True)
class MoeDims:
    """Size of a mixture of experts; n_ff is that of one expert (and of dense layers)."""

    n_layers: int = 3
    n_embd: int = 128
    n_ff: int = 64
    n_heads: int = 4
    n_heads_kv: int = 2
    n_vocab: int = 320
    n_experts: int = 8
    n_used: int = 2


# Widths of models that people run; "-6gb" and the like are made for 4 bits.
LLAMA_PRESETS = {
    "llama-tiny": LlamaDims(4, 256, 768, 8, 4, 512),
    "llama-1b": LlamaDims(16, 2048, 8192, 32, 8, 128256),
    "llama-3b": LlamaDims(28, 3072, 8192, 24, 8, 128256),
    "llama-8b": LlamaDims(32, 4096, 14336, 32, 8, 128256),
    "llama-6gb": LlamaDims(48, 4096, 14336, 32, 8, 32000),
    "llama-13b": LlamaDims(40, 5120, 13824, 40, 40, 32000),
    "bitnet-2b": LlamaDims(30, 2560, 6912, 20, 5, 128256),  # shapes of BitNet-b1.58-2B-4T
    "llama-70b": LlamaDims(80, 8192, 28672, 64, 8, 128256),
}


class _Builder:
    """Collects tensors, each matrix in the type that its rows allow."""

    def __init__(self, quant: str) -> None:
        self.quant = quant
        self.tensors: list[Tensor] = []

    def matrix(self, name: str, *shape: int, type_name: str | None = None) -> None:
        kind = storable_type(type_name or self.quant, shape[0])
        self.tensors.append(Tensor(name + ".weight", shape, kind))

    def vector(self, name: str, *shape: int, fill: str = "ones", std: float = WEIGHT_STD) -> None:
        self.tensors.append(Tensor(name, shape, "F32", fill, std))

    def attention(self, block: str, n_embd: int, n_q: int, n_kv: int, n_gate: int = 0) -> None:
        self.matrix(f"{block}.attn_q", n_embd, n_q + n_gate)
        self.matrix(f"{block}.attn_k", n_embd, n_kv)
        self.matrix(f"{block}.attn_v", n_embd, n_kv)
        self.matrix(f"{block}.attn_output", n_q, n_embd)

    def feed_forward(self, block: str, n_embd: int, n_ff: int, suffix: str = "") -> None:
        self.matrix(f"{block}.ffn_gate{suffix}", n_embd, n_ff)
        self.matrix(f"{block}.ffn_up{suffix}", n_embd, n_ff)
        self.matrix(f"{block}.ffn_down{suffix}", n_ff, n_embd)

    def experts(self, block: str, dims: MoeDims, quant: str | None, *, fused: bool = False) -> None:
        n_embd, n_ff, n_experts = dims.n_embd, dims.n_ff, dims.n_experts
        self.matrix(f"{block}.ffn_gate_inp", n_embd, n_experts, type_name="F32")
        parts = (
            {"gate_up": (n_embd, 2 * n_ff)}
            if fused
            else {"gate": (n_embd, n_ff), "up": (n_embd, n_ff)}
        )
        for part, shape in {**parts, "down": (n_ff, n_embd)}.items():
            self.matrix(f"{block}.ffn_{part}_exps", *shape, n_experts, type_name=quant)


def write_llama(
    path: str | os.PathLike[str],
    *,
    n_layers: int,
    n_embd: int,
    n_ff: int,
    n_heads: int,
    n_heads_kv: int,
    n_vocab: int,
    quant: str = "Q4_0",
    output_quant: str | None = None,
    tied: bool = False,
    split: int | None = None,
    alignment: int = 32,
    seed: int = 0,
    n_ctx: int = 4096,
    sparse: bool = False,
) -> list[Path]:
    """Write a dense llama and return its files.

    `tied` leaves out the output head (the token embedding serves as one). For `split`, `sparse`
    and the names of files see `write_gguf`.
    """
    dims = LlamaDims(n_layers, n_embd, n_ff, n_heads, n_heads_kv, n_vocab)
    pairs = {**_common_pairs("llama", dims, n_ctx), **tokenizer_pairs(n_vocab)}
    tensors = _llama_tensors(dims, quant.upper(), output_quant, tied)
    return write_gguf(
        path, pairs, tensors, alignment=alignment, split=split, seed=seed, sparse=sparse
    )


def write_preset(
    path: str | os.PathLike[str],
    name: str,
    *,
    quant: str = "Q4_K",
    tied: bool = False,
    split: int | None = None,
    seed: int = 0,
    sparse: bool = False,
) -> list[Path]:
    """Write one of LLAMA_PRESETS and return its files."""
    return _write_dims(path, LLAMA_PRESETS[name], quant, tied, split, seed, sparse)


def _write_dims(
    path: str | os.PathLike[str],
    dims: LlamaDims,
    quant: str,
    tied: bool,
    split: int | None,
    seed: int,
    sparse: bool,
) -> list[Path]:
    return write_llama(
        path,
        n_layers=dims.n_layers,
        n_embd=dims.n_embd,
        n_ff=dims.n_ff,
        n_heads=dims.n_heads,
        n_heads_kv=dims.n_heads_kv,
        n_vocab=dims.n_vocab,
        quant=quant,
        tied=tied,
        split=split,
        seed=seed,
        sparse=sparse,
    )


def llama_dims_for_size(nbytes: int, quant: str = "Q4_0") -> LlamaDims:
    """Return the llama of the largest usual width whose file of `nbytes` has 16 layers or more."""
    best: tuple[int, LlamaDims] | None = None
    for dims in LLAMA_PRESETS.values():
        dims = replace(dims, n_layers=1, n_vocab=min(dims.n_vocab, 32000))
        sizes = {True: 0, False: 0}
        for tensor in _llama_tensors(dims, quant.upper(), None, False):
            sizes[tensor.name.startswith("blk.")] += tensor.nbytes
        n_layers = round((nbytes - sizes[False]) / sizes[True])
        if (16 if best else 1) <= n_layers <= MAX_LAYERS and (
            best is None or dims.n_embd > best[0]
        ):
            best = (dims.n_embd, replace(dims, n_layers=n_layers))
    if best is None:
        raise ValueError(
            f"no llama of a usual width has {nbytes} bytes in 1 to {MAX_LAYERS} layers"
        )
    return best[1]


def write_moe(
    path: str | os.PathLike[str],
    *,
    arch: str = "qwen3moe",
    dims: MoeDims | None = None,
    quant: str = "Q4_0",
    expert_quant: str | None = None,
    fused: bool = False,
    skew: float | None = None,
    split: int | None = None,
    alignment: int = 32,
    seed: int = 0,
    n_ctx: int = 512,
    sparse: bool = False,
) -> list[Path]:
    """Write a mixture of experts of one of MOE_ARCHITECTURES and return its files.

    qwen3moe, olmoe and llama (Mixtral) have plain experts, qwen2moe, granitemoe, qwen3next,
    qwen35moe and deepseek2 shared ones beside them, gpt-oss biases of experts; deepseek2 has latent
    attention and a dense first layer, qwen3next and qwen35moe linear attention in every second.
    `fused` puts gate and up projection of FUSED_ARCHITECTURES in one tensor; `expert_quant` is the
    type of the experts where it is not `quant`.

    `skew` makes some experts popular: the standard deviation of the bias that gpt-oss adds to the
    logits of the router, which vary by about 1 from token to token. 0: all are as likely. None: a
    small one, and biases everywhere.
    """
    if arch not in MOE_ARCHITECTURES:
        raise ValueError(f"arch is {arch!r}, known are {', '.join(MOE_ARCHITECTURES)}")
    if fused and arch not in FUSED_ARCHITECTURES:
        raise ValueError(f"llama.cpp loads no fused gate and up projection for {arch}")
    if skew is not None and arch != "gpt-oss":
        raise ValueError(f"the router of {arch} has no bias that could skew it; gpt-oss has")
    dims = dims or MoeDims()
    if arch == "olmoe":  # its norms of queries and keys have one shape
        dims = replace(dims, n_heads_kv=dims.n_heads)
    builder = _Builder(quant.upper())
    pairs = _common_pairs(arch, dims, n_ctx)
    pairs[f"{arch}.expert_count"] = dims.n_experts
    pairs[f"{arch}.expert_used_count"] = dims.n_used
    builder.matrix("token_embd", dims.n_embd, dims.n_vocab)
    for layer in range(dims.n_layers):
        block = f"blk.{layer}"
        _moe_layer(builder, pairs, arch, block, layer, dims, expert_quant, fused, skew is not None)
        if arch == "gpt-oss":
            std = WEIGHT_STD if skew is None else skew
            builder.vector(f"{block}.ffn_gate_inp.bias", dims.n_experts, fill="random", std=std)
    builder.vector("output_norm.weight", dims.n_embd)
    builder.matrix("output", dims.n_embd, dims.n_vocab)
    return write_gguf(
        path,
        {**pairs, **tokenizer_pairs(dims.n_vocab)},
        builder.tensors,
        alignment=alignment,
        split=split,
        seed=seed,
        sparse=sparse,
    )


def _common_pairs(arch: str, dims: LlamaDims | MoeDims, n_ctx: int) -> dict[str, Value]:
    return {
        "general.architecture": arch,
        "general.name": f"synthetic {arch}",
        "general.quantization_version": 2,
        f"{arch}.context_length": n_ctx,
        f"{arch}.embedding_length": dims.n_embd,
        f"{arch}.block_count": dims.n_layers,
        f"{arch}.feed_forward_length": dims.n_ff,
        f"{arch}.attention.head_count": dims.n_heads,
        f"{arch}.attention.head_count_kv": dims.n_heads_kv,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{arch}.rope.dimension_count": dims.n_embd // dims.n_heads,
        f"{arch}.rope.freq_base": 10000.0,
        f"{arch}.vocab_size": dims.n_vocab,
    }


def _llama_tensors(
    dims: LlamaDims, quant: str, output_quant: str | None, tied: bool
) -> Sequence[Tensor]:
    builder = _Builder(quant)
    head = dims.n_embd // dims.n_heads
    builder.matrix("token_embd", dims.n_embd, dims.n_vocab)
    for layer in range(dims.n_layers):
        block = f"blk.{layer}"
        builder.vector(f"{block}.attn_norm.weight", dims.n_embd)
        builder.attention(block, dims.n_embd, dims.n_embd, head * dims.n_heads_kv)
        builder.vector(f"{block}.ffn_norm.weight", dims.n_embd)
        builder.feed_forward(block, dims.n_embd, dims.n_ff)
    builder.vector("output_norm.weight", dims.n_embd)
    if not tied:
        builder.matrix("output", dims.n_embd, dims.n_vocab, type_name=output_quant)
    return builder.tensors


def _moe_layer(
    builder: _Builder,
    pairs: dict[str, Value],
    arch: str,
    block: str,
    layer: int,
    dims: MoeDims,
    expert_quant: str | None,
    fused: bool,
    skewed: bool,
) -> None:
    n_embd, n_ff = dims.n_embd, dims.n_ff
    head = n_embd // dims.n_heads
    # Untrained attention adds one mean to all tokens: little of it where routing is to differ.
    builder.vector(f"{block}.attn_norm.weight", n_embd, fill="hundredths" if skewed else "ones")
    if arch == "deepseek2":
        _latent_attention(builder, pairs, block, dims)
    elif arch in HYBRID_ARCHITECTURES and layer % 2 == 0:
        _delta_net(builder, pairs, arch, block, dims)
    else:
        gate = n_embd if arch in HYBRID_ARCHITECTURES else 0  # in one matrix with the queries
        builder.attention(block, n_embd, n_embd, head * dims.n_heads_kv, n_gate=gate)
    post = arch == "gpt-oss" or arch in HYBRID_ARCHITECTURES
    builder.vector(f"{block}.{'post_attention' if post else 'ffn'}_norm.weight", n_embd)
    if arch == "deepseek2" and layer == 0:
        pairs[f"{arch}.leading_dense_block_count"] = 1
        builder.feed_forward(block, n_embd, n_ff)
        return
    builder.experts(block, dims, expert_quant, fused=fused)
    if arch not in ("llama", "olmoe", "granitemoe"):
        pairs[f"{arch}.expert_feed_forward_length"] = n_ff
    if arch == "qwen3moe" or (arch in HYBRID_ARCHITECTURES and layer % 2):
        pairs[f"{arch}.attention.key_length"] = head
        pairs[f"{arch}.attention.value_length"] = head
        builder.vector(f"{block}.attn_q_norm.weight", head)
        builder.vector(f"{block}.attn_k_norm.weight", head)
    elif arch == "olmoe":
        builder.vector(f"{block}.attn_q_norm.weight", n_embd)
        builder.vector(f"{block}.attn_k_norm.weight", n_embd)
    if arch in HYBRID_ARCHITECTURES:
        pairs[f"{arch}.expert_shared_feed_forward_length"] = n_ff
        builder.vector(f"{block}.ffn_gate_inp_shexp.weight", n_embd)
        builder.feed_forward(block, n_embd, n_ff, "_shexp")
    elif arch == "granitemoe":
        pairs[f"{arch}.logit_scale"] = 2.0
        pairs[f"{arch}.residual_scale"] = 0.5
        pairs[f"{arch}.expert_shared_feed_forward_length"] = n_ff
        builder.feed_forward(block, n_embd, n_ff, "_shexp")
    elif arch == "qwen2moe":
        pairs[f"{arch}.expert_shared_feed_forward_length"] = 2 * n_ff
        for part, extent in (("q", n_embd), ("k", head * dims.n_heads_kv)):
            builder.vector(f"{block}.attn_{part}.bias", extent, fill="zeros")
        builder.vector(f"{block}.attn_v.bias", head * dims.n_heads_kv, fill="zeros")
        builder.vector(f"{block}.ffn_gate_inp_shexp.weight", n_embd)
        builder.feed_forward(block, n_embd, 2 * n_ff, "_shexp")
    elif arch == "deepseek2":
        pairs[f"{arch}.expert_shared_count"] = 1
        builder.feed_forward(block, n_embd, n_ff, "_shexp")
        builder.vector(f"{block}.exp_probs_b.bias", dims.n_experts, fill="zeros")
    elif arch == "gpt-oss":
        pairs[f"{arch}.attention.sliding_window"] = 128
        for name, extents in (
            ("attn_sinks.weight", (dims.n_heads,)),
            ("attn_q.bias", (n_embd,)),
            ("attn_k.bias", (head * dims.n_heads_kv,)),
            ("attn_v.bias", (head * dims.n_heads_kv,)),
            ("attn_output.bias", (n_embd,)),
            ("ffn_gate_exps.bias", (n_ff, dims.n_experts)),
            ("ffn_up_exps.bias", (n_ff, dims.n_experts)),
            ("ffn_down_exps.bias", (n_embd, dims.n_experts)),
        ):
            builder.vector(f"{block}.{name}", *extents, fill="zeros" if skewed else "random")


def _latent_attention(
    builder: _Builder, pairs: dict[str, Value], block: str, dims: MoeDims
) -> None:
    """Attention of DeepSeek V2: keys and values from one latent vector a token, heads absorbed."""
    rank, rope, nope = 64, 32, 32
    pairs.update(
        {
            "deepseek2.attention.head_count_kv": 1,
            "deepseek2.attention.q_lora_rank": rank,
            "deepseek2.attention.kv_lora_rank": rank,
            "deepseek2.attention.key_length": rank + rope,
            "deepseek2.attention.value_length": rank,
            "deepseek2.attention.key_length_mla": nope + rope,
            "deepseek2.attention.value_length_mla": nope,
            "deepseek2.rope.dimension_count": rope,
            "deepseek2.expert_weights_scale": 1.0,
            "deepseek2.expert_gating_func": 2,
        }
    )
    builder.vector(f"{block}.attn_q_a_norm.weight", rank)
    builder.vector(f"{block}.attn_kv_a_norm.weight", rank)
    builder.matrix(f"{block}.attn_q_a", dims.n_embd, rank)
    builder.matrix(f"{block}.attn_q_b", rank, dims.n_heads * (nope + rope))
    builder.matrix(f"{block}.attn_kv_a_mqa", dims.n_embd, rank + rope)
    builder.matrix(f"{block}.attn_k_b", nope, rank, dims.n_heads)
    builder.matrix(f"{block}.attn_v_b", rank, nope, dims.n_heads)
    builder.matrix(f"{block}.attn_output", dims.n_heads * nope, dims.n_embd)


def _delta_net(
    builder: _Builder, pairs: dict[str, Value], arch: str, block: str, dims: MoeDims
) -> None:
    """Linear attention of Qwen3-Next: a recurrent state for each head of values."""
    state, n_k_heads, n_v_heads, kernel = 32, 2, 4, 4
    keys, values = state * n_k_heads, state * n_v_heads
    pairs.update(
        {
            f"{arch}.full_attention_interval": 2,
            f"{arch}.ssm.conv_kernel": kernel,
            f"{arch}.ssm.inner_size": values,
            f"{arch}.ssm.state_size": state,
            f"{arch}.ssm.time_step_rank": n_v_heads,
            f"{arch}.ssm.group_count": n_k_heads,
        }
    )
    builder.matrix(f"{block}.attn_qkv", dims.n_embd, 2 * keys + values)
    builder.matrix(f"{block}.attn_gate", dims.n_embd, values)
    builder.vector(f"{block}.ssm_conv1d.weight", kernel, 2 * keys + values, fill="random")
    builder.vector(f"{block}.ssm_dt.bias", n_v_heads)
    builder.vector(f"{block}.ssm_a", n_v_heads, fill="minus ones")
    if arch == "qwen3next":
        builder.matrix(f"{block}.ssm_ba", dims.n_embd, 2 * n_v_heads)
    else:
        pairs[f"{arch}.rope.dimension_sections"] = [6, 5, 5, 0]
        builder.matrix(f"{block}.ssm_beta", dims.n_embd, n_v_heads)
        builder.matrix(f"{block}.ssm_alpha", dims.n_embd, n_v_heads)
    builder.vector(f"{block}.ssm_norm.weight", state)
    builder.matrix(f"{block}.ssm_out", values, dims.n_embd)
