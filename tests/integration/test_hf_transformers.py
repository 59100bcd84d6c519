"""Converted models say what PyTorch says: random models of `transformers`, logit by logit.

Needs the extra `test-hf`; run with `-m slow`. Both sides compute in float32: the reference is the
model of transformers, ours the GGUF in llama.cpp with a float32 KV cache and no flash attention.
What is compared for BitNet is said at its tests.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from nexus_ext.formats.hf import HfConversion
from tests.hf_tokenizers import N_VOCAB, train_bpe, train_sentencepiece
from tests.synth.hf import LINEAR, change_json

pytestmark = pytest.mark.slow

N_TOKENS = 120
MAX_KL = 1e-4  # nats, of any position
COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": N_VOCAB,
    "max_position_embeddings": 256,
    "initializer_range": 0.25,  # logits with a spread of about 2, as those of trained models
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 500000.0,
}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}
# name -> (class, settings)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, llama3 rope": ("Llama", {"rope_parameters": LLAMA3}),
    "llama, linear rope, biases": (
        "Llama",
        {
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
        },
    ),
    "llama, yarn rope": ("Llama", {"rope_parameters": YARN | {"rope_theta": 1000.0}}),
    "mistral": ("Mistral", {"head_dim": 32, "sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2, tied, yarn rope": (
        "Qwen2",
        {
            "tie_word_embeddings": True,
            "rope_parameters": YARN | {"rope_theta": 1e6, "attention_factor": 1.5},
        },
    ),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "sliding_window": None}),
    "qwen3moe": (
        "Qwen3Moe",
        {
            "head_dim": 16,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
        },
    ),
    "bitnet": ("BitNet", {"hidden_act": "silu", "tie_word_embeddings": True}),
}


def make(name: str, folder: Path, dtype: str = "float32") -> Any:
    """Save a random model in several shards; return it, in float32 and with its stored values."""
    torch = pytest.importorskip("torch", reason="the extra test-hf is not installed")
    transformers = pytest.importorskip("transformers", reason="test-hf is not installed")
    kind, settings = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**COMMON, **settings)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms of ones and biases of zeros would hide mistakes
                parameter.add_(torch.randn_like(parameter) * 0.1)
    stored = copy.deepcopy(model).to(getattr(torch, dtype))
    stored.save_pretrained(folder, max_shard_size="200KB")
    # Parameters only: buffers, the frequencies of the rotary embedding, are not stored.
    with torch.no_grad():
        for parameter, rounded in zip(model.parameters(), stored.parameters(), strict=True):
            parameter.copy_(rounded.float())
    return model


def reference_logits(model: Any, tokens: list[int]) -> npt.NDArray[np.float64]:
    torch = pytest.importorskip("torch", reason="the extra test-hf is not installed")

    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0]
    return np.asarray(logits.numpy(), np.float64)


def our_logits(path: Path, tokens: list[int]) -> npt.NDArray[np.float64]:
    import llama_cpp

    llm = llama_cpp.Llama(
        str(path),
        n_ctx=len(tokens) + 8,
        logits_all=True,
        flash_attn=False,
        type_k=0,
        type_v=0,
        verbose=False,
    )
    llm.eval(tokens)
    logits = np.array(llm.scores[: len(tokens)], np.float64)
    llm.close()
    return logits


def compare(name: str, model: Any, path: Path) -> tuple[float, float]:
    """Return (largest KL divergence of a position in nats, share of positions with one top-1)."""
    tokens = np.random.default_rng(0).integers(0, 400, N_TOKENS).tolist()
    wanted, found = reference_logits(model, tokens), our_logits(path, tokens)
    p = wanted - np.logaddexp.reduce(wanted, axis=1, keepdims=True)
    q = found - np.logaddexp.reduce(found, axis=1, keepdims=True)
    divergence = float((np.exp(p) * (p - q)).sum(axis=1).max())
    same = float((wanted.argmax(axis=1) == found.argmax(axis=1)).mean())
    print(f"{name}: largest KL {divergence:.1e} nats, same top-1 at {same:.0%} of {N_TOKENS}")
    assert wanted.std() > 1  # a flat distribution would agree with anything
    return divergence, same


def tokenizer(kind: str, folder: Path) -> None:
    if kind == "sentencepiece":
        train_sentencepiece(folder)
    else:
        train_bpe(folder, kind)


@pytest.mark.parametrize("kind", ["sentencepiece", "qwen2"])
@pytest.mark.parametrize("name", MODELS)
def test_the_same_logits_as_pytorch(tmp_path: Path, name: str, kind: str) -> None:
    model = make(name, tmp_path / "m")
    tokenizer(kind, tmp_path / "m")
    HfConversion(tmp_path / "m").write(tmp_path / "m.gguf")
    divergence, same = compare(f"{name}, {kind}", model, tmp_path / "m.gguf")
    assert divergence < MAX_KL and same == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama", "qwen3moe"])
def test_weights_of_16_bits_in_float32(tmp_path: Path, name: str, dtype: str) -> None:
    """The values of 16 bits, computed in float32 on both sides."""
    model = make(name, tmp_path / "m", dtype)
    tokenizer("llama-bpe", tmp_path / "m")
    HfConversion(tmp_path / "m", float_type="f32").write(tmp_path / "m.gguf")
    divergence, same = compare(f"{name}, {dtype}", model, tmp_path / "m.gguf")
    assert divergence < MAX_KL and same == 1


@pytest.mark.parametrize("linear_class", ["autobitlinear", "bitlinear"])
@pytest.mark.parametrize("name", ["bitnet", "llama"])
def test_ternary_weights_that_transformers_has_packed(
    tmp_path: Path, name: str, linear_class: str
) -> None:
    """Weights are packed by transformers, unpacked by us.

    The reference multiplies by the same ternary weights in float32. transformers itself would
    round activations to 8 bits before each product, which llama.cpp does in its own way and only
    for its ternary types.
    """
    torch = pytest.importorskip("torch", reason="the extra test-hf is not installed")
    from safetensors.torch import load_file, save_file
    from transformers.integrations.bitnet import pack_weights

    folder = tmp_path / "m"
    model = make(name, folder)
    tokenizer("sentencepiece", folder)
    packed, meant = {}, model.state_dict()
    for shard in sorted(folder.glob("*.safetensors")):
        for key, weight in load_file(shard).items():
            if not key.endswith(tuple(f"{part}.weight" for part in LINEAR)):
                packed[key] = weight
                continue
            mean = weight.abs().mean()
            signs = (weight / mean).round().clamp(-1, 1)
            packed[key] = pack_weights(signs.clone())
            scale = mean if linear_class == "autobitlinear" else 1 / mean
            packed[key.replace(".weight", ".weight_scale")] = scale.reshape(1)
            meant[key] = signs * scale if linear_class == "autobitlinear" else signs / scale
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink()
    save_file({k: v.contiguous() for k, v in packed.items()}, folder / "model.safetensors")
    quantization = {"quant_method": "bitnet", "linear_class": linear_class}
    change_json(folder / "config.json", quantization_config=quantization)
    model.load_state_dict(meant)
    assert torch.equal(
        model.state_dict()["model.layers.0.mlp.up_proj.weight"],
        meant["model.layers.0.mlp.up_proj.weight"],
    )
    HfConversion(folder).write(tmp_path / "m.gguf")
    divergence, same = compare(f"{name}, packed, {linear_class}", model, tmp_path / "m.gguf")
    assert divergence < MAX_KL and same == 1


def test_ternary_weights_against_transformers_with_its_rounding(tmp_path: Path) -> None:
    """What transformers' own BitNet says, activations of 8 bits and all: close, not the same."""
    torch = pytest.importorskip("torch", reason="the extra test-hf is not installed")
    from transformers.integrations.bitnet import ActQuant, WeightQuant

    folder = tmp_path / "m"
    model = make("bitnet", folder)
    tokenizer("sentencepiece", folder)
    quantization = {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "online",
    }
    change_json(folder / "config.json", quantization_config=quantization)
    HfConversion(folder).write(tmp_path / "m.gguf")
    eager = {
        cls: cls.forward.__wrapped__ if hasattr(cls.forward, "__wrapped__") else cls.forward
        for cls in (ActQuant, WeightQuant)
    }

    def forward(self: Any, x: Any, round_activations: bool) -> Any:
        weight = eager[WeightQuant](None, self.weight)
        x = eager[ActQuant](None, x) if round_activations else x
        return torch.nn.functional.linear(x, weight, self.bias)

    for round_activations in (False, True):
        for key, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and key.endswith(LINEAR):
                module.forward = lambda x, module=module, r=round_activations: forward(module, x, r)
        what = "with" if round_activations else "without"
        divergence, same = compare(f"bitnet, {what} 8 bits", model, tmp_path / "m.gguf")
        if round_activations:
            assert divergence < 0.5 and same > 0.8
        else:
            assert divergence < MAX_KL and same == 1


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    make("mixtral", tmp_path / "m")
    tokenizer("sentencepiece", tmp_path / "m")
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 2
    shutil.move(tmp_path / "m" / shards[1], tmp_path / "elsewhere")
    with pytest.raises(Exception, match=f"the first is {shards[1]}"):
        HfConversion(tmp_path / "m")
