"""A model whose weights come and go in parts while it is in use: layers, and slots for experts.

What is resident is always a prefix of its blueprint's units. What is not resident is streamed, so a
model computes with any prefix, bit by bit the same. Who gives how much to which model is not
decided here.
"""

from __future__ import annotations

import contextlib
from typing import Any

import llama_cpp.llama_cpp as bindings

from nexus_ext import core
from nexus_ext.placement.plan import ExpertCache
from nexus_ext.runtime import ggml
from nexus_ext.runtime.blueprint import Blueprint
from nexus_ext.runtime.llama_log import load_failed, reasons_heard, silence_llama_log
from nexus_ext.runtime.loading import load_paged
from nexus_ext.runtime.manifest import manifest_text
from nexus_ext.runtime.paged import PagedModel
from nexus_ext.runtime.popularity import wanted
from nexus_ext.runtime.vocabulary import Vocabulary


class ElasticModel:
    """An open model. One thread at a time may change what is resident; any may compute."""

    def __init__(self, plan: Blueprint) -> None:
        """Open it: everything permanent is read, no unit is resident yet.

        Raises FormatError, ReadFailed, ModelChanged, OutOfMemory or BackendUnavailable.
        """
        self.blueprint = plan
        self.resident = 0  # units
        catalog = plan.catalog
        dense = {n for unit in plan.units for n in unit.extents}
        cached = {t.name for parts in plan.caches for t in parts}
        tiers = {
            t.name: "elastic" if i in dense else "nvme" if t.name in cached else "ram"
            for i, t in enumerate(catalog.tensors)
        }
        tiers |= dict.fromkeys(plan.gpu.names, "host")  # llama.cpp reads and keeps these
        caches = [
            ExpertCache(tuple(t.name for t in parts), parts[0].n_experts, 0)
            for parts in plan.caches
        ]
        # Units count with what packing takes, what is permanent has none of these types.
        ours = f"kernels 0 {' '.join(plan.own_kernels)}" if plan.own_kernels else ""
        self.paged = PagedModel(
            catalog,
            manifest_text(catalog, tiers, plan.sizes, plan.io_mode, caches, ours),
            cache_slots=[cache.slots for cache in caches],
            own_kernels=plan.own_kernels,
        )
        self.core = self.paged.core
        self.pointer: Any = None
        try:
            for group in range(len(plan.caches)):
                self.core.resize_cache(group, 0)
            silence_llama_log()
            bindings.llama_backend_init()
            params = bindings.llama_model_default_params()
            params.n_gpu_layers = plan.gpu.n_layers
            if plan.gpu.n_layers and ggml.gpus():
                params.main_gpu = plan.options.gpu
                params.split_mode = bindings.LLAMA_SPLIT_MODE_NONE
            with reasons_heard() as reasons:
                self.pointer = load_paged(self.core, params)
            if not self.pointer:
                named = self.core.take_error("loading the model")
                raise named or load_failed(plan.path, reasons, "it does not say why")
            self.core.finish_load()
            self.vocabulary = Vocabulary(self.pointer)
            if plan.residuals is not None:
                residuals = self.paged.attach(plan.residuals, lambda name: tiers[name] != "host")
                residuals.set_share(plan.options.residual_share)
        except BaseException:
            self.close()
            raise

    def warm(self) -> None:
        """Have the experts that were used most read into empty slots, until the first graph."""
        if self.blueprint.caches and wanted(self.blueprint.options.warm_start):
            self.paged.start_warm()

    def set_resident(self, n_units: int, stop: core.StopFlag | None = None) -> int:
        """Make the first `n_units` units resident and the others not; return the bytes moved.

        On an error (ReadFailed and others, Interrupted after `stop`) all whole units that are there
        are kept, and `resident` says how many.
        """
        units = self.blueprint.units
        if n_units < self.resident:
            leaving = units[n_units : self.resident]
            self._set_slots(n_units)
            numbers = sorted(n for unit in leaving for n in unit.extents)  # neighbours together
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
        self.paged.stop_warm()
        if self.pointer:
            bindings.llama_model_free(self.pointer)
            self.pointer = None
        self.paged.close()
