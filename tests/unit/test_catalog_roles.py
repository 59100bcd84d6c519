"""Tensors are given the role of the operation that llama.cpp uses them with."""

from __future__ import annotations

import pytest

from nexus_ext.formats.roles import role_of, split_name
from nexus_ext.types import Role

MATRIX, STACK, VECTOR = (64, 32), (64, 32, 8), (64,)


@pytest.mark.parametrize(
    ("name", "shape", "role"),
    [
        ("token_embd.weight", MATRIX, Role.TOKEN_EMBEDDING),
        ("position_embd.weight", MATRIX, Role.TOKEN_EMBEDDING),
        ("per_layer_token_embd.weight", MATRIX, Role.TOKEN_EMBEDDING),
        ("output.weight", MATRIX, Role.OUTPUT),
        ("output.bias", VECTOR, Role.SMALL),
        ("output_norm.weight", VECTOR, Role.SMALL),
        ("blk.3.attn_q.weight", MATRIX, Role.ATTENTION),
        ("blk.3.attn_qkv.weight", MATRIX, Role.ATTENTION),
        ("blk.3.attn_kv_a_mqa.weight", MATRIX, Role.ATTENTION),
        ("blk.3.attn_q.bias", VECTOR, Role.SMALL),
        ("blk.3.ssm_in.weight", MATRIX, Role.ATTENTION),
        ("blk.3.time_mix_key.weight", MATRIX, Role.ATTENTION),
        ("blk.3.channel_mix_key.weight", MATRIX, Role.FFN),
        ("blk.3.ffn_down.weight", MATRIX, Role.FFN),
        ("blk.3.ffn_down_shexp.weight", MATRIX, Role.SHARED_EXPERT),
        ("blk.3.ffn_down_exps.weight", STACK, Role.EXPERT),
        ("blk.3.ffn_down_exps.weight", (64, 32, 1), Role.EXPERT),
        ("blk.3.ffn_gate_up_exps.weight", STACK, Role.EXPERT),
        ("blk.3.ffn_up_chexps.weight", STACK, Role.EXPERT),
        ("blk.3.ffn_up_exps.bias", MATRIX, Role.SMALL),
        ("blk.3.ffn_up_exps.scale", VECTOR, Role.SMALL),
        ("blk.3.ffn_gate_inp.weight", MATRIX, Role.ROUTER),
        ("blk.3.ffn_gate_inp_shexp.weight", VECTOR, Role.SMALL),
        ("blk.3.exp_probs_b.bias", VECTOR, Role.SMALL),
        ("blk.3.attn_norm.weight", VECTOR, Role.SMALL),
        ("blk.3.attn_q_norm.weight", MATRIX, Role.SMALL),
        ("blk.3.ssm_conv1d.weight", (4, 64), Role.SMALL),
        ("blk.3.ssm_a", (16, 64), Role.SMALL),
        ("blk.3.shortconv.conv.weight", (3, 64), Role.SMALL),
        ("dec.blk.3.cross_attn_k.weight", MATRIX, Role.ATTENTION),
        ("rope_freqs.weight", VECTOR, Role.SMALL),
    ],
)
def test_known_tensors_have_their_role(name: str, shape: tuple[int, ...], role: Role) -> None:
    assert role_of(name, shape) is role


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("blk.3.unheard_of.weight", MATRIX),
        ("ffn_down.weight", MATRIX),  # a layer's name outside of a layer
        ("blk.3.output.weight", MATRIX),
        ("blk.3.attn_k_b.weight", STACK),  # one matrix a head: cannot be cut by rows
        ("blk.3.ffn_down.weight", STACK),
        ("blk.3.ffn_down_exps.weight", MATRIX),
        ("blk.3.ffn_down_exps.lora_a", STACK),
        ("blk.3.time_mix_w2.weight", STACK),  # reshaped by the graph
        ("token_types.weight", (64, 2)),  # viewed by the graph
        ("enc.blk.3.attn_rel_b.weight", MATRIX),
    ],
)
def test_what_cannot_be_paged_safely_is_other(name: str, shape: tuple[int, ...]) -> None:
    assert role_of(name, shape) is Role.OTHER


def test_layers_are_told_from_names() -> None:
    assert split_name("blk.12.attn_q.weight") == (12, "attn_q")
    assert split_name("enc.blk.0.ffn_up.weight") == (0, "ffn_up")
    assert split_name("blk.7.ssm_a") == (7, "ssm_a")
    assert split_name("token_embd.weight") == (None, "token_embd")
    assert split_name("blk.x.attn_q.weight") == (None, "blk.x.attn_q")
