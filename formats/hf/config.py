"""From config.json to what llama.cpp must be told: architecture, sizes, rotary embedding.

Refuses what llama.cpp's graph of the architecture would silently compute differently; says in
`notes` what differs only in use (a sliding window beyond its length, for instance). Knows nothing
of tensors and tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from nexus_ext.errors import FormatError
from nexus_ext.formats.hf.folder import JsonObject

# What llama.cpp's arrays of hyperparameters have room for.
MAX_LAYERS = 512
MAX_EXPERTS = 1024
_MAX_SIZE = 1 << 24  # of an embedding, a feed-forward network
_MAX_VOCAB = 1 << 21
_MAX_CONTEXT = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class Architecture:
    """What llama.cpp's graph of one architecture is like."""

    name: str  # general.architecture
    # The first halves of queries and keys are paired with the second in PyTorch; llama.cpp's
    # "normal" rotary embedding pairs neighbours, so rows have to change places.
    permuted: bool = False
    rope_factors: bool = False  # reads rope_freqs.weight, which llama3's scaling needs
    qk_norm: bool = False
    sub_norms: bool = False
    biases: frozenset[str] = frozenset()  # parts that may have one
    needs_qkv_bias: bool = False
    own_head_dim: bool = True  # heads may be of another size than n_embd / n_heads
    untied_output: bool = True


_QKV = frozenset({"attn_q", "attn_k", "attn_v"})
_LLAMA = Architecture(
    "llama",
    permuted=True,
    rope_factors=True,
    biases=_QKV | {"attn_output", "ffn_gate", "ffn_up", "ffn_down"},
)
# By config.json's architectures[0].
ARCHITECTURES = {
    "LlamaForCausalLM": _LLAMA,
    "LLaMAForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "MixtralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": Architecture("qwen2", biases=_QKV, needs_qkv_bias=True, own_head_dim=False),
    "Qwen3ForCausalLM": Architecture("qwen3", qk_norm=True, biases=_QKV),
    "Qwen3MoeForCausalLM": Architecture("qwen3moe", qk_norm=True, biases=_QKV),
    "BitNetForCausalLM": Architecture(
        "bitnet", sub_norms=True, own_head_dim=False, untied_output=False
    ),
    "BitnetForCausalLM": Architecture(
        "bitnet", sub_norms=True, own_head_dim=False, untied_output=False
    ),
}


@dataclass(frozen=True, slots=True)
class Ternary:
    """How a model that was trained ternary keeps its weights.

    `packed`: 2 bits each, with a scale that multiplies the result or (`divided`) divides it.
    `online`: as floats, made ternary when they are used.
    """

    packed: bool = False
    divided: bool = False
    online: bool = False


@dataclass(frozen=True, slots=True)
class HfModel:
    """What config.json says."""

    hf_name: str
    arch: Architecture
    n_layers: int
    n_embd: int
    n_ff: int  # of one expert in a mixture of experts
    n_heads: int
    n_heads_kv: int
    head_dim: int
    n_vocab: int
    n_experts: int
    tied: bool
    attention_bias: bool
    mlp_bias: bool
    ternary: Ternary | None
    rope_factors: tuple[float, ...]  # divisors of frequencies, head_dim / 2 of them, or none
    pairs: dict[str, bool | int | float | str]  # metadata, but for tokenizer and general
    notes: tuple[str, ...] = field(default=())


def read_config(config: JsonObject) -> HfModel:
    """Read and check a config.json. FormatError names the key that cannot be used."""
    hf_name, arch = _architecture(config)
    notes: list[str] = []
    sizes = _sizes(config, hf_name, arch)
    _check_activation(config, arch)
    n_experts, moe_pairs, n_ff = _experts(config, hf_name, sizes["n_ff"])
    rope_pairs, factors = _rope(config, arch, sizes["head_dim"], notes)
    n_context = config.integer("max_position_embeddings", 1, _MAX_CONTEXT)
    _note_window(config, hf_name, n_context, notes)
    tied = config.flag("tie_word_embeddings", hf_name == "BitnetForCausalLM")
    if not tied and not arch.untied_output:
        raise FormatError(
            f"{config.path}: 'tie_word_embeddings' is false; llama.cpp's {arch.name} computes the "
            "output with the embedding, so it would answer wrongly"
        )
    prefix = arch.name
    pairs: dict[str, bool | int | float | str] = {
        f"{prefix}.block_count": sizes["n_layers"],
        f"{prefix}.context_length": n_context,
        f"{prefix}.embedding_length": sizes["n_embd"],
        f"{prefix}.feed_forward_length": sizes["n_ff"],
        f"{prefix}.attention.head_count": sizes["n_heads"],
        f"{prefix}.attention.head_count_kv": sizes["n_heads_kv"],
        f"{prefix}.attention.key_length": sizes["head_dim"],
        f"{prefix}.attention.value_length": sizes["head_dim"],
        f"{prefix}.attention.layer_norm_rms_epsilon": config.number("rms_norm_eps", 0, 1, 1e-6),
        f"{prefix}.rope.dimension_count": sizes["head_dim"],
        f"{prefix}.vocab_size": sizes["n_vocab"],
    }
    pairs.update({f"{prefix}.{key}": value for key, value in (moe_pairs | rope_pairs).items()})
    return HfModel(
        hf_name=hf_name,
        arch=arch,
        n_layers=sizes["n_layers"],
        n_embd=sizes["n_embd"],
        n_ff=n_ff,
        n_heads=sizes["n_heads"],
        n_heads_kv=sizes["n_heads_kv"],
        head_dim=sizes["head_dim"],
        n_vocab=sizes["n_vocab"],
        n_experts=n_experts,
        tied=tied,
        attention_bias=config.flag("attention_bias", False),
        mlp_bias=config.flag("mlp_bias", False),
        ternary=_ternary(config, hf_name),
        rope_factors=factors,
        pairs=pairs,
        notes=tuple(notes),
    )


def _architecture(config: JsonObject) -> tuple[str, Architecture]:
    names = config.array("architectures")
    if len(names) != 1 or not isinstance(names[0], str):
        raise config.error("architectures", config.value.get("architectures"), "a list of one name")
    name: str = names[0]
    if name not in ARCHITECTURES:
        raise FormatError(
            f"{config.path}: 'architectures' names {name!r}, which is not converted",
            hint=f"Known are {', '.join(sorted(ARCHITECTURES))}.",
        )
    return name, ARCHITECTURES[name]


def _sizes(config: JsonObject, hf_name: str, arch: Architecture) -> dict[str, int]:
    n_embd = config.integer("hidden_size", 1, _MAX_SIZE)
    n_heads = config.integer("num_attention_heads", 1, _MAX_SIZE)
    n_heads_kv = config.integer("num_key_value_heads", 1, _MAX_SIZE, n_heads)
    if n_heads % n_heads_kv:
        raise config.error("num_key_value_heads", n_heads_kv, f"a divisor of {n_heads} heads")
    if config.value.get("head_dim") is None and n_embd % n_heads:
        raise config.error("num_attention_heads", n_heads, f"a divisor of the {n_embd} embedding")
    default = 128 if hf_name.startswith("Qwen3") else n_embd // n_heads
    head_dim = config.integer("head_dim", 2, _MAX_SIZE, default)
    if head_dim % 2:
        raise config.error("head_dim", head_dim, "even")
    if not arch.own_head_dim and head_dim * n_heads != n_embd:
        raise FormatError(
            f"{config.path}: {n_heads} heads of {head_dim} do not make an embedding of {n_embd}, "
            f"as llama.cpp's {arch.name} has them"
        )
    return {
        "n_layers": config.integer("num_hidden_layers", 1, MAX_LAYERS),
        "n_embd": n_embd,
        "n_ff": config.integer("intermediate_size", 1, _MAX_SIZE),
        "n_heads": n_heads,
        "n_heads_kv": n_heads_kv,
        "head_dim": head_dim,
        "n_vocab": config.integer("vocab_size", 1, _MAX_VOCAB),
    }


def _check_activation(config: JsonObject, arch: Architecture) -> None:
    activation = config.text("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise FormatError(
            f"{config.path}: 'hidden_act' is {activation!r}; llama.cpp's {arch.name} computes "
            "'silu', so it would answer wrongly",
            hint="BitNet b1.58 2B4T (relu2) runs in bitnet.cpp." if arch.name == "bitnet" else "",
        )


def _experts(
    config: JsonObject, hf_name: str, n_ff: int
) -> tuple[int, dict[str, bool | int | float | str], int]:
    """Return the number of experts, their metadata, and the width of one."""
    if hf_name not in ("MixtralForCausalLM", "Qwen3MoeForCausalLM"):
        return 0, {}, n_ff
    key = "num_local_experts" if config.value.get("num_local_experts") else "num_experts"
    n_experts = config.integer(key, 1, MAX_EXPERTS)
    used = config.integer("num_experts_per_tok", 1, n_experts)
    pairs: dict[str, bool | int | float | str] = {"expert_count": n_experts}
    pairs["expert_used_count"] = used
    if hf_name == "MixtralForCausalLM":
        return n_experts, pairs, n_ff
    if config.integer("decoder_sparse_step", 1, MAX_LAYERS, 1) != 1 or config.array(
        "mlp_only_layers"
    ):
        raise FormatError(
            f"{config.path}: 'decoder_sparse_step' or 'mlp_only_layers' make some layers dense, "
            "which llama.cpp's qwen3moe does not have"
        )
    if not config.flag("norm_topk_prob", False):
        raise FormatError(
            f"{config.path}: 'norm_topk_prob' is false; llama.cpp's qwen3moe always normalizes "
            "the weights of experts, so it would answer wrongly"
        )
    width = config.integer("moe_intermediate_size", 1, _MAX_SIZE)
    return n_experts, pairs | {"expert_feed_forward_length": width}, width


def _note_window(config: JsonObject, hf_name: str, n_context: int, notes: list[str]) -> None:
    if config.value.get("sliding_window") is None:
        return
    # Qwen has a switch for it, which is off by default; Mistral and Mixtral have none.
    if hf_name.startswith("Qwen") and not config.flag("use_sliding_window", False):
        return
    if hf_name.startswith(("Llama", "LLaMA", "Bit")):
        return
    window = config.integer("sliding_window", 1, _MAX_CONTEXT)
    if window < n_context:
        notes.append(
            f"attention slides over {window} tokens in the original; llama.cpp attends to all of "
            f"them, which differs in contexts of more than {window}"
        )


def _rope(
    config: JsonObject, arch: Architecture, head_dim: int, notes: list[str]
) -> tuple[dict[str, bool | int | float | str], tuple[float, ...]]:
    # transformers 5 keeps everything in rope_parameters, 4 a scaling beside rope_theta.
    key = "rope_parameters" if config.value.get("rope_parameters") else "rope_scaling"
    rope = config.object_or_empty(key)
    default_base = config.number("rope_theta", 1, 1e12, _default_base(arch))
    base = rope.number("rope_theta", 1, 1e12, default_base)
    pairs: dict[str, bool | int | float | str] = {"rope.freq_base": base}
    partial = config.number("partial_rotary_factor", 0, 1, 1.0)
    if rope.number("partial_rotary_factor", 0, 1, partial) != 1:
        raise config.error("partial_rotary_factor", partial, "1, which llama.cpp assumes")
    kind = rope.text("rope_type", rope.text("type", "default")).lower()
    if kind == "default":
        return pairs, ()
    factor = rope.number("factor", 1, 1e6)
    if kind == "linear":
        return pairs | {"rope.scaling.type": "linear", "rope.scaling.factor": factor}, ()
    if kind == "dynamic":
        notes.append(
            "rope scaling 'dynamic' is not in llama.cpp: the model is right up to "
            f"{config.value.get('max_position_embeddings')} tokens and not scaled beyond"
        )
        return pairs, ()
    if kind == "yarn":
        return pairs | _yarn(config, rope, factor), ()
    if kind == "llama3" and arch.rope_factors:
        return pairs, _llama3_factors(rope, base, factor, head_dim)
    raise FormatError(
        f"{config.path}: rope scaling {kind!r} is not in llama.cpp's {arch.name}",
        hint="Known are default, linear, dynamic, yarn, and llama3 for llama.",
    )


def _default_base(arch: Architecture) -> float:
    return 500000.0 if arch.name == "bitnet" else 10000.0


def _yarn(
    config: JsonObject, rope: JsonObject, factor: float
) -> dict[str, bool | int | float | str]:
    """YaRN (Peng et al. 2023). llama.cpp computes the attention factor 0.1 ln(factor) + 1."""
    usual = 0.1 * math.log(factor) + 1.0
    attention = rope.number("attention_factor", 0, 1e6, usual)
    if rope.value.get("mscale") is not None or rope.value.get("mscale_all_dim") is not None:
        raise FormatError(f"{config.path}: 'mscale' of rope scaling 'yarn' is not converted")
    trained = config.integer("max_position_embeddings", 1, _MAX_CONTEXT)
    original = rope.integer("original_max_position_embeddings", 1, _MAX_CONTEXT, trained)
    pairs: dict[str, bool | int | float | str] = {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": factor,
        "rope.scaling.original_context_length": original,
        "rope.scaling.yarn_beta_fast": rope.number("beta_fast", 0, 1e6, 32.0),
        "rope.scaling.yarn_beta_slow": rope.number("beta_slow", 0, 1e6, 1.0),
    }
    if not math.isclose(attention, usual, rel_tol=1e-6):
        pairs["rope.scaling.attn_factor"] = attention / usual
    return pairs


def _llama3_factors(
    rope: JsonObject, base: float, factor: float, head_dim: int
) -> tuple[float, ...]:
    """Divisors of the frequencies, by wavelength, as Llama 3.1 was trained with them."""
    low = rope.number("low_freq_factor", 1e-6, 1e6)
    high = rope.number("high_freq_factor", 1e-6, 1e6)
    original = rope.integer("original_max_position_embeddings", 1, _MAX_CONTEXT)
    if high <= low:
        raise rope.error("high_freq_factor", high, f"above the 'low_freq_factor' {low:g}")
    factors = []
    for index in range(0, head_dim, 2):
        wavelength = 2 * math.pi * base ** (index / head_dim)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1.0 / ((1.0 - smooth) / factor + smooth))
    return tuple(factors)


def _ternary(config: JsonObject, hf_name: str) -> Ternary | None:
    quantization = config.object_or_empty("quantization_config")
    if not quantization.value:
        # The code that comes with the first BitNet models makes weights ternary as they are used.
        return Ternary(online=True) if hf_name == "BitnetForCausalLM" else None
    method = quantization.text("quant_method", "")
    if method != "bitnet":
        raise FormatError(
            f"{config.path}: the weights are quantized by {method!r}, which is not converted",
            hint="Download the model in BF16 or F16.",
        )
    if quantization.flag("use_rms_norm", False):
        raise FormatError(
            f"{config.path}: 'quantization_config.use_rms_norm' adds norms that llama.cpp lacks"
        )
    linear = quantization.text("linear_class", "bitlinear")
    mode = quantization.text("quantization_mode", "offline")
    if linear not in ("bitlinear", "autobitlinear") or mode not in ("offline", "online"):
        raise FormatError(
            f"{config.path}: 'quantization_config' has the linear class {linear!r} in the mode "
            f"{mode!r}, which is not known"
        )
    if linear == "autobitlinear" and mode == "online":
        return Ternary(online=True)
    return Ternary(packed=True, divided=linear == "bitlinear")
