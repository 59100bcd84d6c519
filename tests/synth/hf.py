"""Small model folders as the Hugging Face hub has them, written by hand.

An implementation of the layouts apart from the product's: weights in safetensors, a configuration,
and a tokenizer in any of three forms. What `write_hf` returns are the weights in float32 by their
names, for a test to compare with.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

NAMES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3moe": "Qwen3MoeForCausalLM",
    "bitnet": "BitNetForCausalLM",
}
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# GPT-2's letters for bytes: printable ones are themselves, the rest follows from 256 on.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
LETTERS = {b: chr(b) for b in _PRINTABLE} | {
    b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in _PRINTABLE)
}


@dataclass(frozen=True, slots=True)
class HfDims:
    """Size of a model; `head_dim` is apart from the embedding where the architecture allows it."""

    n_layers: int = 2
    n_embd: int = 32
    n_ff: int = 48
    n_heads: int = 4
    n_heads_kv: int = 2
    head_dim: int = 8
    n_vocab: int = 320
    n_experts: int = 4
    n_used: int = 2


def config_of(arch: str, dims: HfDims | None = None, **more: Any) -> dict[str, Any]:
    """Return a config.json; `more` overrides."""
    dims = dims or HfDims()
    config: dict[str, Any] = {
        "architectures": [NAMES[arch]],
        "model_type": arch,
        "hidden_size": dims.n_embd,
        "intermediate_size": dims.n_ff,
        "num_hidden_layers": dims.n_layers,
        "num_attention_heads": dims.n_heads,
        "num_key_value_heads": dims.n_heads_kv,
        "head_dim": dims.head_dim,
        "vocab_size": dims.n_vocab,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": arch == "bitnet",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if arch in ("mixtral", "qwen3moe"):
        config |= {"num_local_experts": dims.n_experts, "num_experts_per_tok": dims.n_used}
    if arch == "qwen3moe":
        config |= {"moe_intermediate_size": dims.n_ff, "norm_topk_prob": True}
    return config | more


def weights_of(
    arch: str, dims: HfDims | None = None, *, seed: int = 0, tied: bool = False, bias: bool = False
) -> dict[str, Floats]:
    """Return random weights by their names on the hub. `bias` is for llama's attention."""
    dims = dims or HfDims()
    rng = np.random.default_rng(seed)
    weights: dict[str, Floats] = {}

    def put(name: str, *shape: int) -> None:
        weights[name] = rng.normal(0, 0.3, shape).astype(np.float32)

    n_q, n_kv = dims.n_heads * dims.head_dim, dims.n_heads_kv * dims.head_dim
    put("model.embed_tokens.weight", dims.n_vocab, dims.n_embd)
    for layer in range(dims.n_layers):
        block = f"model.layers.{layer}"
        put(f"{block}.input_layernorm.weight", dims.n_embd)
        put(f"{block}.post_attention_layernorm.weight", dims.n_embd)
        put(f"{block}.self_attn.q_proj.weight", n_q, dims.n_embd)
        put(f"{block}.self_attn.k_proj.weight", n_kv, dims.n_embd)
        put(f"{block}.self_attn.v_proj.weight", n_kv, dims.n_embd)
        put(f"{block}.self_attn.o_proj.weight", dims.n_embd, n_q)
        if arch == "qwen2" or bias:
            put(f"{block}.self_attn.q_proj.bias", n_q)
            put(f"{block}.self_attn.k_proj.bias", n_kv)
            put(f"{block}.self_attn.v_proj.bias", n_kv)
        if bias:
            put(f"{block}.self_attn.o_proj.bias", dims.n_embd)
        if arch in ("qwen3", "qwen3moe"):
            put(f"{block}.self_attn.q_norm.weight", dims.head_dim)
            put(f"{block}.self_attn.k_norm.weight", dims.head_dim)
        if arch == "bitnet":
            put(f"{block}.self_attn.attn_sub_norm.weight", n_q)
            put(f"{block}.mlp.ffn_sub_norm.weight", dims.n_ff)
        if arch in ("mixtral", "qwen3moe"):
            moe = f"{block}.block_sparse_moe" if arch == "mixtral" else f"{block}.mlp"
            parts = (
                ("w1", "w3", "w2") if arch == "mixtral" else ("gate_proj", "up_proj", "down_proj")
            )
            put(f"{moe}.gate.weight", dims.n_experts, dims.n_embd)
            for expert in range(dims.n_experts):
                put(f"{moe}.experts.{expert}.{parts[0]}.weight", dims.n_ff, dims.n_embd)
                put(f"{moe}.experts.{expert}.{parts[1]}.weight", dims.n_ff, dims.n_embd)
                put(f"{moe}.experts.{expert}.{parts[2]}.weight", dims.n_embd, dims.n_ff)
        else:
            put(f"{block}.mlp.gate_proj.weight", dims.n_ff, dims.n_embd)
            put(f"{block}.mlp.up_proj.weight", dims.n_ff, dims.n_embd)
            put(f"{block}.mlp.down_proj.weight", dims.n_embd, dims.n_ff)
    put("model.norm.weight", dims.n_embd)
    if not tied and arch != "bitnet":
        put("lm_head.weight", dims.n_vocab, dims.n_embd)
    return weights


def write_hf(
    folder: Path,
    arch: str = "llama",
    *,
    dims: HfDims | None = None,
    dtype: str = "F32",
    shards: int = 1,
    tokenizer: str = "spm",
    weights: Mapping[str, npt.NDArray[Any]] | None = None,
    **config: Any,
) -> dict[str, Floats]:
    """Write a folder and return the weights that were stored, rounded to `dtype`.

    `tokenizer` is "spm" (tokenizer.model), "spm-json" (the same as tokenizer.json) or "bpe".
    """
    folder.mkdir(parents=True, exist_ok=True)
    given = weights_of(arch, dims) if weights is None else weights
    write_json(folder / "config.json", config_of(arch, dims, **config))
    items = list(given.items())
    names = (
        ["model.safetensors"]
        if shards == 1
        else [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    )
    placed: dict[str, str] = {}
    for i, name in enumerate(names):
        part = dict(items[len(items) * i // shards : len(items) * (i + 1) // shards])
        write_safetensors(folder / name, part, dtype)
        placed.update(dict.fromkeys(part, name))
    if shards > 1:
        index = {"metadata": {}, "weight_map": placed}
        write_json(folder / "model.safetensors.index.json", index)
    {"spm": write_spm, "spm-json": write_spm_json, "bpe": write_bpe}[tokenizer](folder)
    return {name: rounded(array, dtype) for name, array in items}


def rounded(array: npt.NDArray[Any], dtype: str) -> Floats:
    """Return what is left of float32 values in `dtype`; BF16 cuts, as the writer below does."""
    if array.dtype != np.float32 or dtype == "F32":
        return array.astype(np.float32)
    if dtype == "BF16":
        return (array.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    return array.astype(np.float16).astype(np.float32)


def write_safetensors(
    path: Path, arrays: Mapping[str, npt.NDArray[Any]], dtype: str = "F32"
) -> None:
    """Write float32 arrays as `dtype`, uint8 arrays as they are."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    chunks, at = [], 0
    for name, array in arrays.items():
        kind = "U8" if array.dtype == np.uint8 else dtype
        if kind == "BF16":
            data = (array.view(np.uint32) >> 16).astype("<u2").tobytes()
        else:
            data = array.astype({"U8": "u1", "F16": "<f2", "F32": "<f4"}[kind]).tobytes()
        header[name] = {
            "dtype": kind,
            "shape": list(array.shape),
            "data_offsets": [at, at + len(data)],
        }
        at += len(data)
        chunks.append(data)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(chunks))


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def change_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None takes a key out."""
    value = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for key, item in changes.items():
        if item is None:
            value.pop(key, None)
        else:
            value[key] = item
    write_json(path, value)


# -- tokenizers -----------------------------------------------------------------------------------

Piece = tuple[str, float, int]


def spm_pieces() -> list[Piece]:
    """A SentencePiece vocabulary of 287 tokens that joins "▁hello" and "▁the"."""
    pieces: list[Piece] = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    joined = ["he", "ll", "hell", "hello", "▁t", "▁the", "▁hello", "th", "the", "▁h", "▁he"]
    letters = ["▁", *"abcdefghlotnri ".replace(" ", "")]
    pieces += [(text, -float(rank + 1), 1) for rank, text in enumerate(joined)]
    pieces += [(text, -float(100 + rank), 1) for rank, text in enumerate(letters)]
    return pieces


def spm_bytes(
    pieces: Sequence[Piece] | None = None,
    *,
    kind: int = 2,
    prefix: bool | None = None,
    normalizer: str = "identity",
) -> bytes:
    """Encode a tokenizer.model."""
    out = b""
    for text, score, type_number in spm_pieces() if pieces is None else pieces:
        piece = _field(1, text.encode()) + b"\x15" + struct.pack("<f", score)
        if type_number != 1:
            piece += b"\x18" + _varint(type_number)
        out += _field(1, piece)
    trainer = b"\x18" + _varint(kind)
    normal = _field(1, normalizer.encode())
    if prefix is not None:
        normal += b"\x18" + _varint(int(prefix))
    return out + _field(2, trainer) + _field(3, normal)


def write_spm(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(spm_bytes())


def write_spm_json(folder: Path) -> None:
    """The vocabulary of `spm_pieces` as transformers converts it: every way to join is a merge."""
    pieces = spm_pieces()
    ids = {text: index for index, (text, _, _) in enumerate(pieces)}
    ranked = sorted((p for p in pieces if p[2] == 1), key=lambda piece: -piece[1])
    merges = [
        [text[:cut], text[cut:]]
        for text, _, _ in ranked
        for cut in range(1, len(text))
        if text[:cut] in ids and text[cut:] in ids
    ]
    special = [
        {"id": ids[text], "content": text, "special": True} for text in ("<unk>", "<s>", "</s>")
    ]
    tokenizer = {
        "added_tokens": special,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": _post_processor("<s>"),
        "model": {
            "type": "BPE",
            "vocab": ids,
            "merges": merges,
            "unk_token": "<unk>",
            "byte_fallback": True,
            "fuse_unk": True,
        },
    }
    write_json(folder / "tokenizer.json", tokenizer)


def write_bpe(folder: Path, *, pre_tokenizer: Any = None, ignore_merges: bool = False) -> None:
    """A byte-level BPE that joins "hello" and "Ġthe", with added tokens; split as Qwen2 does."""
    joined = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "t"), ("Ġt", "he")]
    tokens = [LETTERS[byte] for byte in range(256)] + [a + b for a, b in joined]
    ids = {text: index for index, text in enumerate(tokens)}
    added = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>"]
    write_json(
        folder / "tokenizer.json",
        {
            "added_tokens": [
                {"id": len(ids) + i, "content": text, "special": text.startswith("<|")}
                for i, text in enumerate(added)
            ],
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": pre_tokenizer or qwen2_steps(),
            "post_processor": {"type": "ByteLevel", "add_prefix_space": False},
            "model": {
                "type": "BPE",
                "vocab": ids,
                "merges": [f"{a} {b}" for a, b in joined],
                "ignore_merges": ignore_merges,
            },
        },
    )
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "add_bos_token": False}
    write_json(folder / "tokenizer_config.json", settings)


def qwen2_steps() -> dict[str, Any]:
    """The pre-tokenizer as it stands in the tokenizer.json of Qwen2 and Qwen3."""
    pattern = (
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| "
        "?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
    )
    return split_steps(pattern)


def llama3_steps() -> dict[str, Any]:
    """The pre-tokenizer as it stands in the tokenizer.json of Llama 3."""
    pattern = (
        "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| "
        "?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
    )
    return split_steps(pattern)


def split_steps(pattern: str) -> dict[str, Any]:
    return {
        "type": "Sequence",
        "pretokenizers": [
            {
                "type": "Split",
                "pattern": {"Regex": pattern},
                "behavior": "Isolated",
                "invert": False,
            },
            {
                "type": "ByteLevel",
                "add_prefix_space": False,
                "trim_offsets": False,
                "use_regex": False,
            },
        ],
    }


def _post_processor(first: str) -> dict[str, Any]:
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    token = {"SpecialToken": {"id": first, "type_id": 0}}
    return {"type": "TemplateProcessing", "single": [token, sequence], "special_tokens": {}}


def _field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
