"""Which bytes of a model go to which memory: from catalog, machine and wish to a plan.

Pure: the same input gives the same plan. Whether a placement fits is counted exactly, in bytes;
how fast it is comes from `costs`. Without a GPU `closed_form` decides, with one `mip` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NoReturn

from nexus_ext.errors import DoesNotFit, UsageError
from nexus_ext.placement import closed_form, costs, experts, memory, mip, problem, ring
from nexus_ext.placement.budget import Allowance, allowance, check, kernel_bytes
from nexus_ext.placement.closed_form import Choice
from nexus_ext.placement.memory import Context
from nexus_ext.placement.mip import Offload
from nexus_ext.placement.plan import (
    GPU,
    HOST,
    NVME,
    RAM,
    ROWS,
    Budget,
    ExpertCache,
    Pin,
    Plan,
    PlanRequest,
)
from nexus_ext.placement.problem import Problem
from nexus_ext.types import Catalog
from nexus_ext.units import format_bytes

if TYPE_CHECKING:
    from nexus_ext.hardware.profile import HardwareProfile


def solve(catalog: Catalog, hardware: HardwareProfile, request: PlanRequest) -> Plan:
    """Return the plan with the shortest predicted token time that keeps to every budget.

    Raises DoesNotFit, with the smallest budget of the kind that is short, when there is none,
    and UsageError for a request or a pin that cannot be met.
    """
    check(request)
    return _Solver(catalog, hardware, request).plan()


@dataclass(frozen=True, slots=True)
class _Placement:
    problem: Problem
    choice: Choice
    n_gpu: int


class _Solver:
    def __init__(self, catalog: Catalog, hardware: HardwareProfile, request: PlanRequest) -> None:
        self.catalog, self.hardware, self.request = catalog, hardware, request
        n_threads = request.n_threads or hardware.cpu.n_usable_cores
        self.context: Context = memory.context_of(catalog.shape, request, n_threads)
        self.compute_bytes = memory.compute_bytes(catalog, self.context)
        self.runtime_bytes = memory.runtime_bytes(catalog, self.context)
        kv = memory.kv_layer_bytes(catalog, self.context)
        self.allowed: Allowance = allowance(
            request, hardware, self.compute_bytes + self.runtime_bytes
        )
        self.rates, notes = costs.rates_of(catalog, hardware, self.allowed.gpu, n_threads)
        self.notes = [*self.allowed.notes, *notes]
        self.pinned = problem.match_pins(catalog, request.pins)
        slots = mip.slots_of(catalog, kv)
        self.offload = Offload(
            catalog=catalog,
            slots=slots,
            rates=self.rates,
            limits=self.allowed.limits,
            n_ubatch=self.context.n_ubatch,
            least=0,
            most=0,
            overhead_bytes=memory.graph_bytes(catalog, self.context),
        )
        self.offload = self._with_range(self.offload, self.pinned)

    def plan(self) -> Plan:
        placement = self._place(self.offload, self.pinned)
        if placement is None:
            self._refuse()
        return self._plan(placement)

    def _problem(
        self, n_gpu: int, offload: Offload, pinned: Mapping[str, tuple[str, Pin]]
    ) -> Problem:
        names = offload.names(n_gpu) if n_gpu else frozenset()
        return problem.problem_of(self.catalog, self.rates, self.context.n_ubatch, pinned, names)

    def _place(self, offload: Offload, pinned: Mapping[str, tuple[str, Pin]]) -> _Placement | None:
        """Return the best of the extremes and, between them, of what HiGHS finds."""
        candidates = []
        for n_gpu in sorted({offload.least, offload.most}):
            there = self._problem(n_gpu, offload, pinned)
            choice = closed_form.choose(there, offload.room(n_gpu))
            if choice is not None:
                candidates.append(_Placement(there, choice, n_gpu))
        if offload.most > offload.least:
            candidates.extend(self._between(offload, pinned))
        return min(
            candidates, key=lambda p: (p.choice.token_s, p.choice.read_s, p.n_gpu), default=None
        )

    def _between(self, offload: Offload, pinned: Mapping[str, tuple[str, Pin]]) -> list[_Placement]:
        base = self._problem(0, offload, pinned)
        slack = max(
            offload.room(n) - closed_form.smallest_bytes(self._problem(n, offload, pinned))
            for n in (offload.least, offload.most)
        )
        # Room for pinning must not shrink when the budget grows, hence a quarter of the slack.
        ring_bytes = min(base.ring.target, base.ring.smallest + max(slack, 0) // 4)
        found = mip.solve(base, offload, ring_bytes)
        if found is None:
            return []
        there = self._problem(found.n_gpu, offload, pinned)
        counts = {
            group.tensors[0].name: count
            for groups, numbers in ((base.dense, found.dense), (base.waited, found.waited))
            for group, count in zip(groups, numbers, strict=True)
        }
        where = {t.name: g.tensors[0].name for g in (*base.dense, *base.waited) for t in g.tensors}
        dense = tuple(counts[where[group.tensors[0].name]] for group in there.dense)
        waited = tuple(counts[where[group.tensors[0].name]] for group in there.waited)
        room = offload.room(found.n_gpu)
        choice = closed_form.complete(there, room, dense, waited, ring_bytes)
        if choice is None:  # too much by what HiGHS rounds
            choice = closed_form.choose(there, room)
        if choice is None:
            return []
        return [_Placement(there, choice, found.n_gpu)]

    def _with_range(self, offload: Offload, pinned: Mapping[str, tuple[str, Pin]]) -> Offload:
        """Return `offload` with the numbers of slots that pins and the GPU's memory allow."""
        n = len(offload.slots)
        index = {t.name: i for i, slot in enumerate(offload.slots) for t in slot.tensors}
        least, most = 0, n if self.allowed.gpu is not None else 0
        lower = upper = None
        for name, (tier, pin) in pinned.items():
            if tier == GPU:
                if self.allowed.gpu is None:
                    raise UsageError(
                        f"pin {pin.pattern!r} puts {name} on a GPU, but none is used",
                        hint="Pin it to ram, or allow a GPU.",
                    )
                if name not in index:
                    raise UsageError(
                        f"pin {pin.pattern!r} puts {name} on the GPU, but llama.cpp keeps it "
                        "on the CPU",
                        hint="Pin it to ram.",
                    )
                if n - index[name] > least:
                    least, lower = n - index[name], pin
            elif name in index and n - index[name] - 1 < most:
                most, upper = n - index[name] - 1, pin
        if lower is not None and least > most and upper is not None:
            raise UsageError(
                f"pin {lower.pattern!r} puts {least} of the last layers on the GPU, but pin "
                f"{upper.pattern!r} keeps one of them off it",
                hint="llama.cpp offloads whole layers, from the last one on.",
            )
        while most > least and offload.gpu_bytes(most) > self.allowed.gpu_bytes:
            most -= 1
        if least and offload.gpu_bytes(least) > self.allowed.gpu_bytes:
            assert lower is not None
            need = offload.gpu_bytes(least)
            raise DoesNotFit(
                f"pin {lower.pattern!r} needs {format_bytes(need)} of GPU memory, but "
                f"{format_bytes(self.allowed.gpu_bytes)} can be used",
                hint="Pin fewer layers to the GPU.",
                smallest_bytes=need,
            )
        return replace(offload, least=least, most=most)

    def _refuse(self) -> NoReturn:
        weights, ram = self.allowed.weights_bytes, self.allowed.ram_bytes
        offload, blame = self.offload, self._blame()
        needs = {}
        for n_gpu in (offload.least, offload.most):
            there = self._problem(n_gpu, offload, self.pinned)
            needs[n_gpu] = closed_form.smallest_bytes(there) + self.allowed.residual_bytes
        need = min(needs.values())
        if weights is not None and weights < need:
            raise DoesNotFit(
                f"The model needs {format_bytes(need)} for weights and buffers{blame}, "
                f"but the weights budget is {format_bytes(weights)}",
                hint=f"Allow {need} bytes or more for weights.",
                smallest_bytes=need,
            )
        assert ram is not None  # a weights budget alone would have been enough
        need = min(
            self.allowed.ram_for(size + offload.kv_on_cpu(n_gpu) + self._shared(n_gpu))
            for n_gpu, size in needs.items()
            if weights is None or size <= weights
        )
        raise DoesNotFit(
            f"The model needs {format_bytes(need)} of RAM{blame}, "
            f"but the budget is {format_bytes(ram)}",
            hint=f"Allow {need} bytes or more, or lower n_ctx, n_ubatch or the KV cache types.",
            smallest_bytes=need,
        )

    def _shared(self, n_gpu: int) -> int:
        """Return what the GPU takes of main memory."""
        return self.offload.gpu_bytes(n_gpu) if self.offload.limits.unified else 0

    def _blame(self) -> str:
        """Return words that name the pin without which the model would fit, if there is one."""
        sizes: dict[str, int] = {}
        for tensor in self.catalog.tensors:
            tier, pin = self.pinned.get(tensor.name, (NVME, None))
            if pin is not None and tier in (RAM, HOST):
                sizes[pin.pattern] = sizes.get(pin.pattern, 0) + tensor.nbytes
        unpinned = {name: (t, p) for name, (t, p) in self.pinned.items() if t not in (RAM, HOST)}
        if not sizes or self._place(self._with_range(self.offload, unpinned), unpinned) is None:
            return ""
        pattern = max(sizes, key=lambda key: sizes[key])
        return f" with pin {pattern!r}, which keeps {format_bytes(sizes[pattern])} resident"

    def _tiers(self, placement: _Placement) -> dict[str, str]:
        there, choice = placement.problem, placement.choice
        tiers = dict(there.fixed)
        counted = zip((*there.dense, *there.waited), (*choice.dense, *choice.waited), strict=True)
        for group, count in counted:
            tiers.update((tensor.name, NVME) for tensor in group.tensors)
            tiers.update((t.name, RAM) for t in problem.spread(group.tensors, count))
        return {tensor.name: tiers[tensor.name] for tensor in self.catalog.tensors}

    def _plan(self, placement: _Placement) -> Plan:
        tiers = self._tiers(placement)
        choice, n_gpu = placement.choice, placement.n_gpu
        tensors = self.catalog.tensors
        row_only = costs.output_on_gpu(tensors, tiers)
        through_ring = [
            t
            for t in tensors
            if tiers[t.name] == NVME and costs.is_dense(t) and not (t.tied_output and row_only)
        ]
        prediction, streamed = costs.predict(self.catalog, tiers, self.rates, self.context.n_ubatch)
        caches, scratch_bytes = self._caches(tiers, choice.scratch_bytes)
        if caches:
            cached = {**tiers, **{name: NVME for cache in caches for name in cache.tensors}}
            missing = self._missing(caches)
            with_cache = costs.predict(
                self.catalog, cached, self.rates, self.context.n_ubatch, missing
            )
            # Never arm a cache that is predicted slower than pinning as many experts.
            if with_cache[0].token_s <= prediction.token_s:
                tiers, (prediction, streamed) = cached, with_cache
            else:
                caches, scratch_bytes = (), choice.scratch_bytes
        resident = {
            tier: sum(problem.resident_bytes(t, tier) for t in tensors if tiers[t.name] == tier)
            for tier in (HOST, RAM)
        }
        kv, shared = self.offload.kv_on_cpu(n_gpu), self._shared(n_gpu)
        ram = self.allowed.ram_bytes
        if ram is None:
            assert self.allowed.weights_bytes is not None
            ram = self.allowed.ram_for(self.allowed.weights_bytes + kv + shared)
        runtime = self.runtime_bytes + kernel_bytes(ram)
        tied_bytes = max(0, ring.tied_rows_bytes(through_ring) - scratch_bytes)
        scratch_bytes, ring_bytes = scratch_bytes + tied_bytes, choice.ring_bytes - tied_bytes
        cache_bytes = sum(cache.nbytes for cache in caches)
        taken = (resident[HOST], resident[RAM], ring_bytes, scratch_bytes, cache_bytes)
        residuals = self.allowed.residual_bytes
        parts = (*taken, residuals, kv, self.compute_bytes, runtime, shared)
        breakdown = dict(zip(ROWS, (*parts, ram - sum(parts)), strict=True))
        return Plan(
            fingerprint=self.catalog.fingerprint,
            tiers=tiers,
            ring_bytes=ring_bytes,
            slab_bytes=ring.slab_bytes(through_ring, ring_bytes),
            scratch_bytes=scratch_bytes,
            io_mode=self.request.io_mode,
            budget=Budget(
                self.allowed.ram_bytes, self.allowed.weights_bytes, self.allowed.gpu_bytes
            ),
            breakdown=breakdown,
            gpu_breakdown=self._gpu_breakdown(n_gpu),
            n_gpu_layers=n_gpu,
            streamed_bytes_per_token=streamed,
            prediction=prediction,
            everything_fits=NVME not in tiers.values(),
            notes=tuple(self.notes),
            expert_caches=caches,
        )

    def _caches(
        self, tiers: Mapping[str, str], scratch_bytes: int
    ) -> tuple[tuple[ExpertCache, ...], int]:
        """Return the caches that the memory of pinned experts gives, if any expert is streamed.

        Also the scratch area that is needed then: experts that were pinned may be larger than those
        that were streamed. What it grows by comes from the same memory.
        """
        found = experts.cacheable(self.catalog.tensors, tiers, frozenset(self.pinned))
        movable = [tensor for parts in found for tensor in parts]
        if not any(tiers[t.name] == NVME for t in movable):
            return (), scratch_bytes
        freed = [t for t in movable if tiers[t.name] == RAM]
        wanted = [scratch_bytes, *(ring.scratch_bytes(t, self.context.n_ubatch) for t in freed)]
        budget = sum(problem.resident_bytes(t, RAM) for t in freed)
        budget -= max(wanted) - scratch_bytes
        caches = experts.caches(found, self.catalog.shape, budget)
        return caches, max(wanted) if caches else scratch_bytes

    def _missing(self, caches: tuple[ExpertCache, ...]) -> dict[str, float]:
        n_experts = {t.name: t.n_experts for t in self.catalog.tensors}
        return {
            name: 1.0 - experts.hit_rate(cache.slots / n_experts[name])
            for cache in caches
            for name in cache.tensors
        }

    def _gpu_breakdown(self, n_gpu: int) -> dict[str, int]:
        if not n_gpu:
            return {}
        tail = self.offload.slots[-n_gpu:]
        parts = {
            "weights": sum(slot.weight_bytes for slot in tail),
            "KV cache": sum(slot.kv_bytes for slot in tail),
            "compute buffers": self.offload.overhead_bytes,
        }
        return {**parts, "free": self.allowed.gpu_bytes - sum(parts.values())}
