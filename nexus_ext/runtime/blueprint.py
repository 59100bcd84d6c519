"""What can be said of a model by its header alone: its sizes, and the parts it is divided into.

`Blueprint.units` are the parts in the order in which they are worth having; what is resident of a
model (see `elastic`) is always a prefix of them.

Layers are spread: every prefix takes them from the whole depth of the model, so that reading and
computing alternate (as `placement.problem.spread` does for a fixed plan). Experts come after dense
weights, one slot in all layers at a time: a dense weight is read for every token, an expert is not.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from nexus_ext import kernels
from nexus_ext.errors import UsageError
from nexus_ext.formats import open_model
from nexus_ext.formats.residuals import ResidualTable, read_residuals
from nexus_ext.hardware.memory import available_bytes
from nexus_ext.placement import PlanRequest, experts, memory, ring
from nexus_ext.placement.costs import PAGED, is_dense
from nexus_ext.placement.gpu import NOTHING, GpuPart, gpu_part, largest_part
from nexus_ext.plugins import plugins
from nexus_ext.policies import IoInfo, IoMode
from nexus_ext.runtime.batch import Shape
from nexus_ext.runtime.loadable import check_loadable
from nexus_ext.runtime.own_kernels import own_types
from nexus_ext.runtime.residual import checked, memory_nbytes
from nexus_ext.types import Catalog, TensorInfo

_RING_RATE = 2e9  # bytes a second: the ring is sized for a disk like this, see placement.ring
_SLACK = 2 * memory.PAGE  # of a permanent tensor: direct reads cover whole pages
RESIDUAL_SHARE = 0.03  # of the input channels, unless something else is asked for


@dataclass(frozen=True, slots=True)
class Options:
    """How a model is opened. The defaults are those of `runtime.Llama`."""

    kernels: str = "auto"  # see `own_kernels.MODES`
    policy: str = "auto"  # how weights are read: "auto", "direct" or "buffered"
    residual: str | None = None  # a file that `nexus quantize --residual` made: changes answers
    residual_share: float = RESIDUAL_SHARE  # of the input channels that it corrects
    warm_start: bool | None = None  # None: unless NEXUS_WARM_START is 0
    budget_bytes: int = 0  # of memory for all models: what the I/O policy is told to reckon with
    gpu: int = 0  # which GPU
    gpu_layers: int | None = None  # on it, as llama.cpp counts; None: as many as fit its budget
    gpu_budget_bytes: int = 0  # of that GPU


@dataclass(frozen=True, slots=True)
class Unit:
    """A part of a model that is in memory or not: one layer's dense weights, or expert slots."""

    name: str
    extents: tuple[int, ...]  # numbers in the catalog; empty for slots
    nbytes: int  # of memory


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a model takes beside its units, in bytes of memory."""

    permanent: int  # norms and other small tensors
    ring: int
    slab: int
    scratch: int
    kv: int
    compute: int
    bookkeeping: int  # vocabulary, graph, scheduler
    residuals: int
    packing: int  # one weight, while it is packed for our own kernels

    @property
    def ring_bytes(self) -> int:
        return self.ring

    @property
    def slab_bytes(self) -> int:
        return self.slab

    @property
    def scratch_bytes(self) -> int:
        return self.scratch

    @property
    def total(self) -> int:
        parts = (self.permanent, self.ring, self.scratch, self.kv, self.compute, self.bookkeeping)
        return sum(parts) + self.residuals + self.packing


@dataclass(frozen=True, slots=True)
class Blueprint:
    """What can be said of a model by its header alone: sizes and units."""

    path: str
    catalog: Catalog
    shape: Shape
    sizes: Sizes
    units: tuple[Unit, ...]  # most worth having first
    caches: tuple[tuple[TensorInfo, ...], ...]  # expert tensors of a layer that share slots
    options: Options
    own_kernels: tuple[str, ...]  # types of weights that our kernels compute with
    io_mode: IoMode
    residuals: ResidualTable | None
    gpu: GpuPart

    @property
    def vocabulary_bytes(self) -> int:
        """Memory of the vocabulary alone, at most."""
        return self.sizes.bookkeeping

    @property
    def units_bytes(self) -> int:
        return sum(unit.nbytes for unit in self.units)

    @property
    def n_dense(self) -> int:
        """How many of the units are dense weights; they come first."""
        return sum(bool(unit.extents) for unit in self.units)


def blueprint(
    path: str | os.PathLike[str], shape: Shape, options: Options | None = None
) -> Blueprint:
    """Read the header of a model and divide it.

    `shape.n_ctx` 0 means the length that the model was trained with. Raises FormatError,
    ReadFailed, UsageError, or PluginError.
    """
    options = options or Options()
    catalog = open_model(os.fspath(path))
    check_loadable(catalog)
    if not shape.n_ctx:
        shape = replace(shape, n_ctx=catalog.shape.n_ctx_train or 512)
    gpu = _on_gpu(catalog, shape, options)
    here = [t for t in catalog.tensors if t.name not in gpu.names]
    caches = tuple(
        parts for parts in experts.groups(here) if all(t.role in PAGED and t.nbytes for t in parts)
    )
    cached = {t.name for parts in caches for t in parts}
    elastic = [t for t in here if t.role in PAGED and t.nbytes and t.name not in cached]
    table = read_residuals(options.residual) if options.residual is not None else None
    own = own_types((t for t in here if t.role in PAGED and t.nbytes), options.kernels)
    units = (*_dense_units(catalog, elastic, own), *_slot_units(caches))
    return Blueprint(
        path=os.fspath(path),
        catalog=catalog,
        shape=shape,
        sizes=replace(
            _sizes(catalog, shape, {t.name for t in elastic} | cached, gpu),
            residuals=memory_nbytes(table) if table is not None else 0,
            packing=max((_packed_bytes(t) for t in elastic if _is_ours(t, own)), default=0),
        ),
        units=units,
        caches=caches,
        options=options,
        own_kernels=own,
        io_mode=_io_mode(options, sum(unit.nbytes for unit in units)),
        residuals=checked(table, catalog) if table is not None else None,
        gpu=gpu,
    )


def _on_gpu(catalog: Catalog, shape: Shape, options: Options) -> GpuPart:
    context = _context(catalog, shape, shape.n_seq)
    if options.gpu_layers is not None:
        return gpu_part(catalog, context, options.gpu_layers)
    if not options.gpu_budget_bytes:
        return NOTHING
    return largest_part(catalog, context, options.gpu_budget_bytes)


def _io_mode(options: Options, units_bytes: int) -> IoMode:
    """Return how units are read: as asked, else as the I/O policy decides.

    All models together may fill the budget, so what the page cache holds of one is beyond it.
    """
    if options.policy in ("direct", "buffered"):
        return options.policy  # type: ignore[return-value]
    if options.policy != "auto":
        raise UsageError(f"policy is {options.policy!r}", hint='use "auto", "direct" or "buffered"')
    return plugins().choose_io(
        IoInfo(
            streamed_bytes=units_bytes,
            resident_bytes=options.budget_bytes,
            available_bytes=available_bytes(),
            limit_bytes=options.budget_bytes,
        )
    )


def _context(catalog: Catalog, shape: Shape, n_outputs: int) -> memory.Context:
    request = PlanRequest(
        n_ctx=shape.n_ctx * shape.n_seq,
        n_batch=max(shape.n_ubatch, shape.n_seq),
        n_ubatch=max(shape.n_ubatch, shape.n_seq),
        n_seq_max=shape.n_seq,
        kv_type_k=shape.kv_type,
        kv_type_v="f16" if shape.kv_type == "q8_0" else shape.kv_type,
        n_threads=shape.n_threads or os.cpu_count() or 1,
        n_outputs_max=n_outputs,
    )
    return memory.context_of(catalog.shape, request, request.n_threads)


def context_bytes(catalog: Catalog, shape: Shape, *, embeddings: bool = False) -> tuple[int, int]:
    """Return what a context of `shape` takes: (KV cache, compute buffers), in bytes.

    Embeddings are computed for all tokens of a batch, logits for one token a sequence.
    """
    context = _context(catalog, shape, shape.n_ubatch if embeddings else shape.n_seq)
    kv = sum(memory.kv_layer_bytes(catalog, context))
    return kv, memory.compute_bytes(catalog, context)


def _sizes(catalog: Catalog, shape: Shape, moving: set[str], gpu: GpuPart) -> Sizes:
    kv, compute = context_bytes(catalog, shape)
    context = _context(catalog, shape, shape.n_seq)
    moved = [t for t in catalog.tensors if t.name in moving]
    streamed = [t for t in moved if is_dense(t)]
    limits = ring.ring_size(streamed, _RING_RATE)
    # A ring is memory that holds no weights: of a small model not more than a small part.
    ring_bytes = max(limits.smallest, min(limits.target, sum(t.nbytes for t in moved) // 8))
    ring_bytes = memory.round_up(ring_bytes, memory.PAGE)
    scratch = [ring.scratch_bytes(t, shape.n_ubatch) for t in moved]
    scratch.append(ring.tied_rows_bytes(streamed))
    return Sizes(
        permanent=sum(
            t.nbytes + _SLACK for t in catalog.tensors if t.name not in moving | gpu.names
        ),
        ring=ring_bytes,
        slab=ring.slab_bytes(streamed, ring_bytes),
        scratch=memory.round_up(max(scratch, default=0), memory.PAGE),
        kv=kv - gpu.kv_bytes,
        compute=compute,
        bookkeeping=memory.runtime_bytes(catalog, context) - memory.PROCESS_BYTES,
        residuals=0,
        packing=0,
    )


def _dense_units(
    catalog: Catalog, elastic: Sequence[TensorInfo], own: Collection[str]
) -> list[Unit]:
    """One unit a layer, and one for each tensor outside of the layers."""
    number = {t.name: i for i, t in enumerate(catalog.tensors)}
    parts: dict[str, list[TensorInfo]] = {}
    for tensor in elastic:
        name = tensor.name if tensor.layer is None else f"layer {tensor.layer}"
        parts.setdefault(name, []).append(tensor)
    layers = sorted((t[0].layer, name) for name, t in parts.items() if t[0].layer is not None)
    order = [layers[i][1] for i in _spread_order(len(layers))]
    alone = [name for name, t in parts.items() if t[0].layer is None]
    # Rows of an embedding that is no output head are read a few at a time: it can wait.
    order = [n for n in alone if is_dense(parts[n][0])] + order
    order += [n for n in alone if not is_dense(parts[n][0])]
    return [
        Unit(
            name,
            tuple(number[t.name] for t in parts[name]),
            sum(_memory(t, own) for t in parts[name]),
        )
        for name in order
    ]


def _memory(tensor: TensorInfo, own: Collection[str]) -> int:
    """What an elastic extent takes, as native/residency.c counts it: pages, or its packed form."""
    span = memory.round_up(tensor.offset % memory.PAGE + tensor.nbytes, memory.PAGE)
    return max(span, _packed_bytes(tensor)) if _is_ours(tensor, own) else span


def _is_ours(tensor: TensorInfo, own: Collection[str]) -> bool:
    return len(tensor.shape) == 2 and tensor.type_name.lower() in own


def _packed_bytes(tensor: TensorInfo) -> int:
    n_in, n_out = tensor.shape
    return kernels.packed_bytes(tensor.type_name.lower(), n_in, n_out) + 2 * memory.PAGE


def _slot_units(caches: Sequence[Sequence[TensorInfo]]) -> list[Unit]:
    most = max((parts[0].n_experts for parts in caches), default=0)
    return [
        Unit(
            f"experts {slot + 1}/{most}",
            (),
            sum(experts.slot_bytes(p) for p in caches if slot < p[0].n_experts),
        )
        for slot in range(most)
    ]


def _spread_order(n: int) -> list[int]:
    """Return 0..n-1 so that every prefix lies evenly in the range (van der Corput's sequence)."""
    bits = max(n - 1, 0).bit_length()
    reversed_bits = (int(f"{i:0{bits}b}"[::-1], 2) if bits else 0 for i in range(1 << bits))
    return [i for i in reversed_bits if i < n]
