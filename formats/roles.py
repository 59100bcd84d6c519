"""What a tensor does in the graph, told from its name and shape.

Names are those of llama.cpp (its table of tensors and of the operation that uses each). A role
that may be paged is given only to tensors that llama.cpp uses as the first operand of MUL_MAT,
MUL_MAT_ID or GET_ROWS, whole and under their own shape; all others (norms, biases, convolutions,
tables that the graph reshapes or views, unknown names) stay resident as SMALL or OTHER.
"""

from __future__ import annotations

import re

from nexus_ext.types import Role

_BLOCK = re.compile(r"(?:(?:enc|dec)\.)?blk\.(\d{1,9})\.(.+)")

# Outside of the repeating layers.
_GLOBAL_ROLES = {
    "token_embd": Role.TOKEN_EMBEDDING,
    "position_embd": Role.TOKEN_EMBEDDING,
    "per_layer_token_embd": Role.TOKEN_EMBEDDING,
    "output": Role.OUTPUT,
    "per_layer_model_proj": Role.FFN,
}

# Inside of them, two-dimensional.
_ATTENTION = """
    attn_q attn_k attn_v attn_qkv attn_output attn_o attn_gate
    attn_q_a attn_q_b attn_kv attn_kv_a_mqa attn_kv_b
    cross_attn_q cross_attn_k cross_attn_v cross_attn_o
    attn_compressor_kv attn_compressor_gate
    indexer.proj indexer.attn_k indexer.attn_q_b indexer.q_proj indexer.k_proj
    vis_attn_qkv vis_attn_output
    ssm_in ssm_out ssm_x ssm_dt ssm_ba ssm_alpha ssm_beta ssm_f_a ssm_f_b ssm_g ssm_g_a ssm_g_b
    shortconv.in_proj shortconv.out_proj
    time_mix_key time_mix_value time_mix_receptance time_mix_gate time_mix_output
    time_mix_a1 time_mix_a2 time_mix_v1 time_mix_v2 time_mix_g1 time_mix_g2
    time_mix_decay_w1 time_mix_decay_w2
"""
_FFN = """
    ffn_gate ffn_up ffn_down ffn_latent_down ffn_latent_up ffn_routed_down ffn_routed_up
    vis_gate vis_up vis_down inp_gate proj laurel_l laurel_r nextn.eh_proj
    channel_mix_key channel_mix_value channel_mix_receptance
"""
_SHARED_EXPERT = "ffn_gate_shexp ffn_up_shexp ffn_down_shexp"
_LAYER_ROLES = {
    **dict.fromkeys(_ATTENTION.split(), Role.ATTENTION),
    **dict.fromkeys(_FFN.split(), Role.FFN),
    **dict.fromkeys(_SHARED_EXPERT.split(), Role.SHARED_EXPERT),
    "ffn_gate_inp": Role.ROUTER,
    "nextn.embed_tokens": Role.TOKEN_EMBEDDING,
    "nextn.shared_head_head": Role.OUTPUT,
}

# Inside of them, three-dimensional: (n_in, n_out, n_experts), used by MUL_MAT_ID.
_EXPERTS = frozenset(
    f"ffn_{part}_{kind}"
    for part in ("gate", "up", "down", "gate_up")
    for kind in ("exps", "chexps")
)

_SMALL_SUFFIXES = (".bias", ".scale", ".input_scale")
_SMALL = re.compile(r"norm|conv1d|shortconv\.conv|rope_f|ssm_[ad]$|sinks|_lerp_|exp_probs")

# Layers that carry one of the first but none of the second keep a recurrent state, not a cache
# of keys and values. (attn_qkv alone does not tell: some recurrent layers have one.)
RECURRENT = frozenset({"ssm_conv1d", "ssm_conv1d_q", "ssm_a", "shortconv.conv", "time_mix_key"})
KEY_VALUE = frozenset({"attn_k", "attn_kv", "attn_kv_a_mqa", "attn_k_b", "attn_kv_b"})


def split_name(name: str) -> tuple[int | None, str]:
    """Return the layer of a tensor (None outside of layers) and its name without ".weight"."""
    match = _BLOCK.fullmatch(name)
    layer, base = (int(match[1]), match[2]) if match else (None, name)
    return layer, base.removesuffix(".weight")


def role_of(name: str, shape: tuple[int, ...]) -> Role:
    """Return the role of the tensor `name` of ggml `shape` (innermost extent first)."""
    layer, base = split_name(name)
    n_matrices = 1
    for extent in shape[2:]:
        n_matrices *= extent
    if len(shape) < 2 or (shape[1] == 1 and n_matrices == 1) or name.endswith(_SMALL_SUFFIXES):
        return Role.SMALL
    if name.endswith(".weight"):
        if layer is not None and base in _EXPERTS and len(shape) == 3:
            return Role.EXPERT
        role = (_GLOBAL_ROLES if layer is None else _LAYER_ROLES).get(base)
        # A stack of matrices under a dense name is multiplied by another path: leave it alone.
        if role is not None and n_matrices == 1:
            return role
    return Role.SMALL if _SMALL.search(base) else Role.OTHER
