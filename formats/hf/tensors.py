"""Which tensors the GGUF of a model has, and from which stored ones each is made.

Names are mapped by the gguf package. Every tensor that llama.cpp will ask for must be there with
the shape that the configuration says, and no tensor may be left over: a model that is not
understood completely is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import gguf

from nexus_ext.errors import FormatError
from nexus_ext.formats.floats import FLOATS, to_float32
from nexus_ext.formats.hf.config import HfModel
from nexus_ext.formats.hf.rows import (
    Constant,
    MadeTernary,
    Permuted,
    PermutedVector,
    Rows,
    Stored,
    Unpacked,
)
from nexus_ext.formats.safetensors import StoredTensor, TensorReader

_EXPERT = re.compile(r"(.*\.experts)\.(\d{1,5})\.(\w+)\.weight")
# Experts in one tensor each, as transformers 5 holds them in memory: gate and up one after the
# other in the rows of every expert.
_FUSED_EXPERTS = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)")
# Buffers of old checkpoints, which are computed from the configuration.
_IGNORED = re.compile(r".*\.(rotary_emb\.inv_freq|rotary_emb\.(cos|sin)_cached|masked_bias)")
_SCALE = ".weight_scale"
# transformers names these norms otherwise than the first BitNet models, which gguf knows.
_RENAMED = ((".attn_sub_norm.", ".inner_attn_ln."), (".ffn_sub_norm.", ".ffn_layernorm."))
_EXPERT_PARTS = ("w1", "w2", "w3", "gate_proj", "down_proj", "up_proj")
_LINEAR = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


@dataclass(frozen=True, slots=True)
class OutTensor:
    """A tensor to write: its parts one after the other."""

    name: str
    shape: tuple[int, ...]  # outermost first
    parts: tuple[Rows, ...]
    is_weight: bool  # may be quantized; norms, biases and routers stay F32
    ternary: bool = False

    @property
    def stored_dtypes(self) -> set[str]:
        return {part.dtype for part in self.parts}


@dataclass(frozen=True, slots=True)
class _Wanted:
    shape: tuple[int, ...]
    required: bool = True
    is_weight: bool = True


def plan_tensors(
    model: HfModel, stored: Mapping[str, StoredTensor], reader: TensorReader, where: str
) -> list[OutTensor]:
    """Return the tensors in the order in which they are written; `where` names the folder.

    FormatError for tensors that are missing, of another shape, or not known.
    """
    found = _Found(model, stored, where)
    tensors = []
    for name, wanted in _wanted(model):
        parts = found.take(name, wanted, reader)
        if parts is None:
            continue
        tensors.append(
            OutTensor(
                name=name,
                shape=wanted.shape,
                parts=parts,
                is_weight=wanted.is_weight,
                ternary=model.ternary is not None and _part(name) in _LINEAR,
            )
        )
    if model.rope_factors:
        factors = Constant(model.rope_factors)
        tensors.append(
            OutTensor("rope_freqs.weight", (len(model.rope_factors),), (factors,), False)
        )
    found.check_nothing_left()
    return tensors


def _wanted(model: HfModel) -> Iterator[tuple[str, _Wanted]]:
    """Every tensor of the architecture, in the order of llama.cpp's graph."""
    arch = model.arch
    embedding = (model.n_vocab, model.n_embd)
    yield "token_embd.weight", _Wanted(embedding)
    for layer in range(model.n_layers):
        for part, wanted in _wanted_of_layer(model):
            yield f"blk.{layer}.{part}", wanted
    yield "output_norm.weight", _Wanted((model.n_embd,), is_weight=False)
    if arch.untied_output and not model.tied:
        yield "output.weight", _Wanted(embedding)


def _wanted_of_layer(model: HfModel) -> Iterator[tuple[str, _Wanted]]:
    arch, n_embd, n_ff = model.arch, model.n_embd, model.n_ff
    n_q, n_kv = model.n_heads * model.head_dim, model.n_heads_kv * model.head_dim
    norm = _Wanted((n_embd,), is_weight=False)
    yield "attn_norm.weight", norm
    for part, rows, columns in (
        ("attn_q", n_q, n_embd),
        ("attn_k", n_kv, n_embd),
        ("attn_v", n_kv, n_embd),
        ("attn_output", n_embd, n_q),
    ):
        yield f"{part}.weight", _Wanted((rows, columns))
        if part in arch.biases:
            required = model.attention_bias or (arch.needs_qkv_bias and part != "attn_output")
            yield f"{part}.bias", _Wanted((rows,), required, is_weight=False)
    if arch.qk_norm:
        head = _Wanted((model.head_dim,), is_weight=False)
        yield "attn_q_norm.weight", head
        yield "attn_k_norm.weight", head
    if arch.sub_norms:
        yield "attn_sub_norm.weight", _Wanted((n_q,), is_weight=False)
    yield "ffn_norm.weight", norm
    if model.n_experts:
        yield "ffn_gate_inp.weight", _Wanted((model.n_experts, n_embd), is_weight=False)
        yield "ffn_gate_exps.weight", _Wanted((model.n_experts, n_ff, n_embd))
        yield "ffn_up_exps.weight", _Wanted((model.n_experts, n_ff, n_embd))
        yield "ffn_down_exps.weight", _Wanted((model.n_experts, n_embd, n_ff))
        return
    for part, rows, columns in (
        ("ffn_gate", n_ff, n_embd),
        ("ffn_up", n_ff, n_embd),
        ("ffn_down", n_embd, n_ff),
    ):
        yield f"{part}.weight", _Wanted((rows, columns))
        if part in arch.biases:
            yield f"{part}.bias", _Wanted((rows,), model.mlp_bias, is_weight=False)
    if arch.sub_norms:
        yield "ffn_sub_norm.weight", _Wanted((n_ff,), is_weight=False)


class _Found:
    """The stored tensors by the GGUF name of what they become."""

    def __init__(self, model: HfModel, stored: Mapping[str, StoredTensor], where: str) -> None:
        self._model, self._where, self._stored = model, where, stored
        self._map = gguf.get_tensor_name_map(_arch_number(model.arch.name), model.n_layers)
        # GGUF name -> expert number (0 for what is no expert) -> stored tensor
        self._by_name: dict[str, dict[int, StoredTensor]] = {}
        self._scales: dict[str, StoredTensor] = {}
        self._unknown: list[StoredTensor] = []
        for tensor in stored.values():
            self._sort_in(tensor)

    def _sort_in(self, tensor: StoredTensor) -> None:
        name = tensor.name
        if _IGNORED.fullmatch(name):
            return
        if name.endswith(_SCALE) and self._model.ternary:
            self._scales[name.removesuffix(_SCALE) + ".weight"] = tensor
            return
        if name == "lm_head.weight" and self._model.tied:
            return  # a copy of the embedding
        for new, old in _RENAMED:
            name = name.replace(new, old)
        index = 0
        expert = _EXPERT.fullmatch(name)
        fused = _FUSED_EXPERTS.fullmatch(name)
        if expert and expert[3] in _EXPERT_PARTS and self._model.n_experts:
            index = int(expert[2])
            name = f"{expert[1]}.{expert[3]}.weight"
        elif fused and self._model.n_experts:
            self._sort_in_fused(tensor, fused[1], fused[2])
            return
        mapped = self._map.get_name(name, try_suffixes=(".weight", ".bias"))
        if mapped is None:
            self._unknown.append(tensor)
            return
        self._add(mapped, index, tensor)

    def _sort_in_fused(self, tensor: StoredTensor, prefix: str, part: str) -> None:
        for name in ("gate_proj", "up_proj") if part == "gate_up_proj" else ("down_proj",):
            mapped = self._map.get_name(f"{prefix}.{name}")
            if mapped is None:
                self._unknown.append(tensor)
                return
            self._add(f"{mapped}.weight", -1, tensor)

    def _add(self, name: str, index: int, tensor: StoredTensor) -> None:
        before = self._by_name.setdefault(name, {}).setdefault(index, tensor)
        if before is not tensor:
            raise FormatError(
                f"{tensor.path}: the tensors {before.name!r} and {tensor.name!r} both become "
                f"{name!r}"
            )

    def take(self, name: str, wanted: _Wanted, reader: TensorReader) -> tuple[Rows, ...] | None:
        """Return the parts of a tensor, or None if an optional one is not there."""
        sources = self._by_name.pop(name, {})
        if not sources:
            if wanted.required:
                raise self._missing(name)
            return None
        if len(wanted.shape) == 3:
            return self._take_experts(name, wanted, sources, reader)
        if sources.keys() != {0}:
            raise FormatError(f"{self._where}: {name!r} of a dense layer is made of experts")
        return (self._rows(name, sources[0], wanted.shape, reader),)

    def _take_experts(
        self,
        name: str,
        wanted: _Wanted,
        sources: dict[int, StoredTensor],
        reader: TensorReader,
    ) -> tuple[Rows, ...]:
        n_experts, n_rows, columns = wanted.shape
        if sources.keys() == {-1}:
            tensor = sources[-1]
            # Rows of gate and up together are twice those of one.
            both = "gate_up_proj" in tensor.name
            _check_shape(tensor, (n_experts, n_rows * (1 + both), columns))
            offset = n_rows if both and "_up_" in name else 0
            return tuple(
                Stored(reader, tensor, expert * n_rows * (1 + both) + offset, n_rows)
                for expert in range(n_experts)
            )
        missing = [index for index in range(n_experts) if index not in sources]
        if missing or len(sources) != n_experts:
            raise FormatError(
                f"{self._where}: {name!r} is made of {n_experts} experts by config.json, "
                + (f"number {missing[0]} is missing" if missing else f"{len(sources)} are there"),
                hint="Download the missing files, or look whether config.json is of this model.",
            )
        shape = wanted.shape[1:]
        return tuple(self._rows(name, sources[i], shape, reader) for i in range(n_experts))

    def _rows(
        self, name: str, tensor: StoredTensor, shape: tuple[int, ...], reader: TensorReader
    ) -> Rows:
        ternary = self._model.ternary
        part = _part(name)
        is_linear = part in _LINEAR and len(shape) == 2
        rows: Rows
        if ternary and ternary.packed and is_linear and tensor.dtype == "U8":
            rows = self._unpacked(tensor, shape, reader)
        else:
            _check_shape(tensor, shape)
            rows = Stored(reader, tensor)
            if ternary and ternary.online and is_linear:
                rows = MadeTernary(rows)
        if self._model.arch.permuted and part in ("attn_q", "attn_k"):
            head_dim = self._model.head_dim
            return Permuted(rows, head_dim) if len(shape) == 2 else PermutedVector(rows, head_dim)
        return rows

    def _unpacked(
        self, tensor: StoredTensor, shape: tuple[int, ...], reader: TensorReader
    ) -> Unpacked:
        n_rows, columns = shape
        if n_rows % 4:
            raise FormatError(f"{tensor.path}: the {n_rows} rows of {tensor.name!r} are not packed")
        _check_shape(tensor, (n_rows // 4, columns))
        stored_scale = self._scales.pop(tensor.name, None)
        if stored_scale is None:
            raise FormatError(
                f"{tensor.path}: the scale of the ternary tensor {tensor.name!r} is missing"
            )
        if stored_scale.dtype not in FLOATS or stored_scale.nbytes != (
            FLOATS[stored_scale.dtype].itemsize
        ):
            raise FormatError(f"{stored_scale.path}: {stored_scale.name!r} is not one number")
        rows = Stored(reader, stored_scale)
        scale = float(to_float32(rows.read(0, 1), rows.dtype)[0, 0])
        if not 0 < abs(scale) < float("inf"):
            raise FormatError(f"{stored_scale.path}: {stored_scale.name!r} is {scale}")
        assert self._model.ternary is not None
        return Unpacked(reader, tensor, 1 / scale if self._model.ternary.divided else scale)

    def _missing(self, name: str) -> FormatError:
        return FormatError(
            f"{self._where}: no tensor becomes {name!r}; {self._hub_name(name)!r} is missing",
            hint="Download the missing files, or look whether config.json is of this model.",
        )

    def _hub_name(self, name: str) -> str:
        """Return the name under which a tensor usually lies in a folder of the hub."""
        stem, suffix = name.rsplit(".", 1)
        known = [key for key, (_, mapped) in self._map.mapping.items() if mapped == stem]
        usual = [key for key in known if key.startswith(("model.", "lm_head"))]
        return f"{(usual or known or [stem])[0]}.{suffix}"

    def check_nothing_left(self) -> None:
        """FormatError if a stored tensor was not used."""
        left = [t for sources in self._by_name.values() for t in sources.values()]
        left += self._unknown + list(self._scales.values())
        if left:
            first = min(left, key=lambda tensor: tensor.name)
            raise FormatError(
                f"{first.path}: the tensor {first.name!r} {list(first.shape)} has no place in "
                f"llama.cpp's {self._model.arch.name}"
                + (f", nor have {len(left) - 1} others" if len(left) > 1 else ""),
                hint="The model has parts that would be lost, so it is not converted.",
            )


def _check_shape(tensor: StoredTensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise FormatError(
            f"{tensor.path}: the tensor {tensor.name!r} has the shape {list(tensor.shape)}, by "
            f"config.json it is {list(shape)}"
        )


def _part(name: str) -> str:
    return name.split(".")[2] if name.startswith("blk.") else name.split(".")[0]


def _arch_number(name: str) -> gguf.MODEL_ARCH:
    return next(number for number, text in gguf.MODEL_ARCH_NAMES.items() if text == name)
