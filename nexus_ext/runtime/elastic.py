"""A model whose weights come and go in parts while it is in use: layers, and slots for experts.

`ElasticModel.units` are the parts in the order in which they are worth having; what is resident is
always a prefix of them. What is not resident is streamed, so a model computes with any prefix, bit
by bit the same. Who gives how much to which model is not decided here.

Layers are spread: every prefix takes them from the whole depth of the model, so that reading and
computing alternate (as `placement.problem.spread` does for a fixed plan). Experts come after dense
weights, one slot in all layers at a time: a dense weight is read for every token, an expert is not.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import llama_cpp.llama_cpp as bindings

from nexus_ext import core
from nexus_ext.errors import FormatError
from nexus_ext.formats import open_model
from nexus_ext.placement import PlanRequest, experts, memory, ring
from nexus_ext.placement.costs import PAGED, is_dense
from nexus_ext.placement.plan import ExpertCache
from nexus_ext.runtime import backend
from nexus_ext.runtime.batch import Shape
from nexus_ext.runtime.loading import load_paged
from nexus_ext.runtime.manifest import manifest_text
from nexus_ext.runtime.vocabulary import Vocabulary
from nexus_ext.types import Catalog, TensorInfo

_RING_RATE = 2e9  # bytes a second: the ring is sized for a disk like this, see placement.ring
_SLACK = 2 * memory.PAGE  # of a permanent tensor: direct reads cover whole pages


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
        return sum(parts)


@dataclass(frozen=True, slots=True)
class Blueprint:
    """What can be said of a model by its header alone: sizes and units."""

    path: str
    catalog: Catalog
    shape: Shape
    sizes: Sizes
    units: tuple[Unit, ...]  # most worth having first
    caches: tuple[tuple[TensorInfo, ...], ...]  # expert tensors of a layer that share slots

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


def blueprint(path: str | os.PathLike[str], shape: Shape) -> Blueprint:
    """Read the header of a model and divide it. Raises FormatError, ReadFailed or UsageError.

    `shape.n_ctx` 0 means the length that the model was trained with.
    """
    catalog = open_model(os.fspath(path))
    if not shape.n_ctx:
        trained = catalog.shape.n_ctx_train or 512
        shape = Shape(shape.n_seq, trained, shape.n_ubatch, shape.n_threads, shape.kv_type)
    caches = tuple(
        parts
        for parts in experts.groups(catalog.tensors)
        if all(t.role in PAGED and t.nbytes for t in parts)
    )
    cached = {t.name for parts in caches for t in parts}
    elastic = [t for t in catalog.tensors if t.role in PAGED and t.nbytes and t.name not in cached]
    return Blueprint(
        path=os.fspath(path),
        catalog=catalog,
        shape=shape,
        sizes=_sizes(catalog, shape, {t.name for t in elastic} | cached),
        units=(*_dense_units(catalog, elastic), *_slot_units(caches)),
        caches=caches,
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


def _sizes(catalog: Catalog, shape: Shape, moving: set[str]) -> Sizes:
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
        permanent=sum(t.nbytes + _SLACK for t in catalog.tensors if t.name not in moving),
        ring=ring_bytes,
        slab=ring.slab_bytes(streamed, ring_bytes),
        scratch=memory.round_up(max(scratch, default=0), memory.PAGE),
        kv=kv,
        compute=compute,
        bookkeeping=memory.runtime_bytes(catalog, context) - memory.PROCESS_BYTES,
    )


def _dense_units(catalog: Catalog, elastic: Sequence[TensorInfo]) -> list[Unit]:
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
            sum(_span(t) for t in parts[name]),
        )
        for name in order
    ]


def _span(tensor: TensorInfo) -> int:
    """The pages of an elastic extent, as native/core_internal.h counts them (nx_span)."""
    return memory.round_up(tensor.offset % memory.PAGE + tensor.nbytes, memory.PAGE)


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


class ElasticModel:
    """An open model. One thread at a time may change what is resident; any may compute."""

    def __init__(self, plan: Blueprint) -> None:
        """Open it: everything permanent is read, no unit is resident yet.

        Raises FormatError, ReadFailed, ModelChanged, OutOfMemory or BackendUnavailable.
        """
        backend.register()
        self.blueprint = plan
        self.resident = 0  # units
        catalog = plan.catalog
        dense = {n for unit in plan.units for n in unit.extents}
        cached = {t.name for parts in plan.caches for t in parts}
        tiers = {
            t.name: "elastic" if i in dense else "nvme" if t.name in cached else "ram"
            for i, t in enumerate(catalog.tensors)
        }
        caches = [
            ExpertCache(tuple(t.name for t in parts), parts[0].n_experts, 0)
            for parts in plan.caches
        ]
        text = manifest_text(catalog, tiers, plan.sizes, "direct", caches)
        self.core = core.Model(text, catalog.header)
        self.pointer: Any = None
        try:
            for group in range(len(plan.caches)):
                self.core.resize_cache(group, 0)
            backend.silence_llama_log()
            bindings.llama_backend_init()
            params = bindings.llama_model_default_params()
            params.n_gpu_layers = 0
            self.pointer = load_paged(self.core, params)
            if not self.pointer:
                named = self.core.take_error("loading the model")
                raise named or FormatError(
                    f"llama.cpp cannot load {plan.path}",
                    hint="`nexus run` shows what it says; a newer llama-cpp-python may know it",
                )
            self.core.finish_load()
            self.vocabulary = Vocabulary(self.pointer)
        except BaseException:
            self.close()
            raise

    def set_resident(self, n_units: int, stop: core.StopFlag | None = None) -> int:
        """Make the first `n_units` units resident and the others not; return the bytes moved.

        On an error (ReadFailed and others, Interrupted after `stop`) all whole units that are there
        are kept, and `resident` says how many.
        """
        units = self.blueprint.units
        if n_units < self.resident:
            leaving = units[n_units : self.resident]
            self._set_slots(n_units)
            numbers = [n for unit in leaving for n in unit.extents]
            if numbers:
                self.core.demote(numbers)
            self.resident = n_units  # what could not be given back still counts
            return sum(unit.nbytes for unit in leaving)
        coming = units[self.resident : n_units]
        numbers = [n for unit in coming for n in unit.extents]
        try:
            if numbers:
                self.core.promote(numbers, stop)
            self._set_slots(n_units)
        except BaseException:
            whole = 0
            for unit in coming:
                if not all(self.core.is_resident(n) for n in unit.extents):
                    break
                whole += 1
            partial = [n for unit in coming[whole:] for n in unit.extents]
            self.resident += min(whole, sum(bool(unit.extents) for unit in coming))
            with contextlib.suppress(Exception):  # the error that matters is on its way already
                self.core.demote(partial)
                self._set_slots(self.resident)
            raise
        self.resident = n_units
        return sum(unit.nbytes for unit in coming)

    def _set_slots(self, n_units: int) -> None:
        slots = max(0, n_units - self.blueprint.n_dense)
        for group, parts in enumerate(self.blueprint.caches):
            self.core.resize_cache(group, min(slots, parts[0].n_experts))

    def close(self) -> None:
        """Give back every byte. Contexts of the model must be closed before."""
        if self.pointer:
            bindings.llama_model_free(self.pointer)
            self.pointer = None
        self.core.release()
