"""`nexus inspect`: what a model file says of itself. Reads headers only."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from nexus_ext.cli.library import MODEL
from nexus_ext.cli.options import output_options
from nexus_ext.cli.output import Output
from nexus_ext.units import format_bytes

if TYPE_CHECKING:
    from nexus_ext.types import Catalog, ChunkTable, TensorInfo

_LONGEST_VALUE = 80  # characters of metadata that a line shows; JSON has it all


@click.command()
@click.argument("model", type=MODEL)
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--metadata", is_flag=True, help="List every key and value.")
@output_options
def inspect(model: str, tensors: bool, metadata: bool, output: Output) -> None:
    """Show what is in MODEL: shape, types, and where its bytes are.

    Of a model split over several files, name any one of them.

    \b
    Examples:
      nexus inspect model.gguf
      nexus inspect model.gguf --tensors | grep ffn_down
      nexus inspect model.gguf --metadata --json
    """
    from nexus_ext.formats import open_model

    catalog = open_model(model)
    output.result(_fields(catalog, tensors=tensors, metadata=metadata))
    output.facts(_summary(catalog))
    if catalog.chunks is not None:
        output.heading("Container")
        output.facts(_container(catalog.chunks))
    output.heading("Weights by role")
    _show_groups(output, "role", _groups(catalog, lambda tensor: tensor.role.value))
    output.heading("Weights by type")
    _show_groups(output, "type", _groups(catalog, lambda tensor: tensor.type_name))
    if metadata:
        output.heading("Metadata")
        output.facts([(key, _short(value)) for key, value in catalog.metadata.items()])
    if tensors:
        output.heading("Tensors")
        output.table(
            ("name", "role", "type", "shape", ">bytes", ">file", ">offset"),
            [
                (
                    tensor.name,
                    tensor.role.value,
                    tensor.type_name,
                    " x ".join(map(str, tensor.shape)),
                    str(tensor.nbytes),
                    str(tensor.file),
                    str(tensor.offset),
                )
                for tensor in catalog.tensors
            ],
        )


def _summary(catalog: Catalog) -> list[tuple[str, str]]:
    shape = catalog.shape
    name = catalog.metadata.get("general.name")
    heads_kv = sorted(set(shape.n_heads_kv))
    facts = [
        ("name", str(name) if name is not None else "-"),
        ("architecture", shape.architecture),
        ("parameters", _count(_n_parameters(catalog))),
        ("weights", f"{format_bytes(catalog.nbytes)}, {_bits(catalog):.2f} bits each"),
        ("files", f"{len(catalog.files)}, {format_bytes(catalog.file_nbytes)}"),
        ("layers", str(shape.n_layers)),
        ("embedding", str(shape.n_embd)),
        ("feed forward", str(shape.n_ff)),
        ("heads", f"{shape.n_heads}, KV {', '.join(map(str, heads_kv)) or '-'}"),
        ("vocabulary", str(shape.n_vocab)),
        ("context", f"{shape.n_ctx_train} (trained)"),
    ]
    if shape.n_experts:
        facts.append(("experts", f"{shape.n_experts}, {shape.n_experts_used} a token"))
    template = "tokenizer.chat_template" in catalog.metadata
    return [*facts, ("chat template", "yes" if template else "no"), ("id", catalog.fingerprint)]


def _container(chunks: ChunkTable) -> list[tuple[str, str]]:
    facts = chunks.summary()
    codecs = ", ".join(f"{n} {name}" for name, n in facts.chunks_by_codec.items())
    ratio = facts.stored_nbytes / max(facts.raw_nbytes, 1)
    rows = [
        ("written by", facts.writer),
        ("made of", ", ".join(name for name, _ in facts.sources)),
        ("chunks", f"{sum(facts.chunks_by_codec.values())}: {codecs}"),
        ("stored", f"{format_bytes(facts.stored_nbytes)}, {ratio:.3f} of what it decodes to"),
        ("records", f"{facts.n_records} of experts, in {facts.n_groups} layers"),
    ]
    rows += [("section", f"{name}, {format_bytes(n)}") for name, n in facts.sections.items()]
    return [*rows, *(("sha256", f"{d}  {name}") for name, d in facts.sources if d)]


def _groups(catalog: Catalog, key: Callable[[TensorInfo], str]) -> dict[str, tuple[int, int]]:
    """Return key -> (tensors, bytes), the largest first."""
    groups: dict[str, tuple[int, int]] = {}
    for tensor in catalog.tensors:
        count, nbytes = groups.get(key(tensor), (0, 0))
        groups[key(tensor)] = (count + 1, nbytes + tensor.nbytes)
    return dict(sorted(groups.items(), key=lambda item: (-item[1][1], item[0])))


def _show_groups(output: Output, what: str, groups: dict[str, tuple[int, int]]) -> None:
    total = sum(nbytes for _, nbytes in groups.values())
    rows = [
        (name, str(count), format_bytes(nbytes), f"{nbytes / max(total, 1):.1%}")
        for name, (count, nbytes) in groups.items()
    ]
    n_tensors = sum(count for count, _ in groups.values())
    rows.append(("all", str(n_tensors), format_bytes(total), ""))
    output.table((what, ">tensors", ">bytes", ">share"), rows, total=True)


def _fields(catalog: Catalog, *, tensors: bool, metadata: bool) -> dict[str, object]:
    fields: dict[str, object] = {
        "files": catalog.files,
        "container": catalog.container,
        "chunks": None if catalog.chunks is None else catalog.chunks.summary(),
        "fingerprint": catalog.fingerprint,
        "name": catalog.metadata.get("general.name"),
        "n_parameters": _n_parameters(catalog),
        "weights_bytes": catalog.nbytes,
        "file_bytes": catalog.file_nbytes,
        "shape": catalog.shape,
        "roles": _named(_groups(catalog, lambda tensor: tensor.role.value)),
        "types": _named(_groups(catalog, lambda tensor: tensor.type_name)),
        "has_chat_template": "tokenizer.chat_template" in catalog.metadata,
    }
    if metadata:
        fields["metadata"] = catalog.metadata
    if tensors:
        fields["tensors"] = catalog.tensors
    return fields


def _named(groups: dict[str, tuple[int, int]]) -> dict[str, dict[str, int]]:
    return {name: {"tensors": n, "bytes": nbytes} for name, (n, nbytes) in groups.items()}


def _n_parameters(catalog: Catalog) -> int:
    return sum(math.prod(tensor.shape) for tensor in catalog.tensors)


def _bits(catalog: Catalog) -> float:
    return 8 * catalog.nbytes / max(_n_parameters(catalog), 1)


def _count(number: int) -> str:
    for factor, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= factor:
            return f"{number / factor:.2f} {unit}"
    return str(number)


def _short(value: object) -> str:
    from nexus_ext.formats.gguf_header import ArraySize

    if isinstance(value, ArraySize):
        return f"[{value.length} x {value.element}]"
    text = value if isinstance(value, str) else repr(value)
    text = text.replace("\n", "\\n").replace("\t", "\\t")  # one line each
    if len(text) > _LONGEST_VALUE:
        return f"{text[:_LONGEST_VALUE]}... ({len(text)} characters)"
    return text
