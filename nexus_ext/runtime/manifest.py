"""A plan, told to the native core: the text that native/manifest.c reads."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Final, Protocol

from nexus_ext.errors import UsageError
from nexus_ext.placement import Plan
from nexus_ext.placement.memory import chunk_threads
from nexus_ext.placement.plan import ExpertCache
from nexus_ext.runtime.streamed_codecs import know_codec
from nexus_ext.types import Catalog, TensorInfo

# What stays resident is ours to read and to keep, however small. What goes to a GPU is llama.cpp's.
_CORE_TIERS = {"gpu": "host", "host": "ram", "ram": "ram", "nvme": "nvme"}
_CORE_CODECS = frozenset({"raw", "ans", "zstd"})  # those that native/chunks.c has
# When hashes are compared of chunks that are stored as they are; of encoded ones they always are.
# "first": when a chunk is read for the first time in this process; "always": every time; "never".
VERIFY_VARIABLE: Final = "NEXUS_VERIFY_CHUNKS"
_VERIFY: Final = {"": "first", "1": "first", "0": "never"}


def manifest(
    catalog: Catalog,
    plan: Plan,
    io_mode: str,
    own_kernels: tuple[str, ...] = (),
    *,
    opencl: bool = False,
    view: str = "",
) -> str:
    """Return the manifest of `catalog` placed by `plan`, read in `io_mode`.

    `own_kernels`: types of weights that our kernels compute with; packing resident ones may add as
    much memory as the plan leaves free. `opencl`: resident ones go to the OpenCL device. `view`:
    the file that the runtime opens in place of those of the model
    (native/include/nexus_view.h). Tensors on a GPU are llama.cpp's business, as host tensors are.
    Raises UsageError when the plan was made for another model.
    """
    check_plan(catalog, plan)
    tiers = {name: _CORE_TIERS[tier] for name, tier in plan.tiers.items()}
    more = []
    if own_kernels:
        more.append(f"kernels {plan.breakdown.get('free', 0)} {' '.join(own_kernels)}")
        more += ["opencl"] if opencl else []
    if view:
        more.append(f"view {_one_line(view)}")
    return manifest_text(catalog, tiers, plan, io_mode, plan.expert_caches, "\n".join(more))


def _one_line(path: str) -> str:
    if "\n" in path:
        raise UsageError(f"the path {path!r} has a line break", hint="rename the file")
    return path


def check_plan(catalog: Catalog, plan: Plan) -> None:
    """Raise UsageError when the plan was made for another model."""
    if plan.fingerprint != catalog.fingerprint:
        raise UsageError(
            f"the plan is for the model {plan.fingerprint}, this is {catalog.fingerprint}",
            hint="make a plan of this model with `nexus plan`",
        )


class Geometry(Protocol):
    """The sizes of the areas that streamed weights pass through. A `Plan` has them."""

    @property
    def ring_bytes(self) -> int: ...
    @property
    def slab_bytes(self) -> int: ...
    @property
    def scratch_bytes(self) -> int: ...


def manifest_text(
    catalog: Catalog,
    tiers: Mapping[str, str],
    geometry: Geometry,
    io_mode: str,
    caches: Iterable[ExpertCache],
    more: str = "",
) -> str:
    """Return the manifest of `catalog`; `tiers` are the core's: host, ram, nvme or elastic.

    `more`: lines at its end: what asks for kernels of our own, and names a view.
    """
    lines = [
        "nexus-manifest 1",
        f"ring {geometry.ring_bytes}",
        f"slab {geometry.slab_bytes}",
        f"scratch {geometry.scratch_bytes}",
        f"virtual {catalog.virtual_nbytes}",
        f"io {io_mode}",
    ]
    verify = _verify()
    if catalog.chunks is not None:
        lines.append(f"decoders {chunk_threads(catalog)}")
        lines += [f"verify {verify}"] if verify != "never" else []
    for file in catalog.files:
        lines.append(f"file {file.nbytes} {_one_line(file.path)}")
    known = set(_CORE_CODECS)
    for tensor, virtual_offset in zip(catalog.tensors, catalog.virtual_offsets, strict=True):
        shape = (*tensor.shape, 1, 1, 1, 1)[:4]
        tier = tiers[tensor.name] if tensor.nbytes else "host"
        lines.append(
            f"tensor {tier} {tensor.file} {tensor.offset} {tensor.nbytes} {virtual_offset} "
            f"{shape[0]} {shape[1]} {shape[2]} {shape[3]} {tensor.type_name} {tensor.name}"
        )
        if catalog.chunks is not None and tensor.nbytes:
            lines += _stored(catalog, tensor, verify != "never", known)
    number = {tensor.name: i for i, tensor in enumerate(catalog.tensors)}
    for cache in caches:
        members = " ".join(str(number[name]) for name in cache.tensors)
        lines.append(f"experts {cache.slots} {members}")
    if more:
        lines.append(more)
    lines.append(f"end {len(catalog.tensors)}")
    return "\n".join(lines) + "\n"


def _verify() -> str:
    value = os.environ.get(VERIFY_VARIABLE, "")
    found = _VERIFY.get(value, value)
    if found not in ("first", "always", "never"):
        raise UsageError(
            f"{VERIFY_VARIABLE} is {value!r}",
            hint="set it to first, always or never, or to nothing",
        )
    return found


def _stored(catalog: Catalog, tensor: TensorInfo, verify: bool, known: set[str]) -> list[str]:
    """Return the lines of a tensor's chunks; none where it is read as it lies in the file.

    `known`: codecs that the core has. Those of plugins are told to it, and added.
    """
    assert catalog.chunks is not None
    stored = catalog.chunks.chunks_of(tensor.name)
    if stored.span() is not None and not verify:
        return []
    lines = [f"chunks {stored.n_matrices} {stored.chunk_nbytes}"]
    for chunk in stored.chunks:
        if chunk.codec not in known:
            know_codec(catalog, tensor.name, chunk)
            known.add(chunk.codec)
        lines.append(
            f"chunk {chunk.file} {chunk.offset} {chunk.stored_nbytes} {chunk.codec} {chunk.hash:x}"
        )
    return lines
