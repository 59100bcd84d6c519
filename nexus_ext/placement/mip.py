"""GPU, RAM or NVMe: three tiers of differing speed, solved as a mixed-integer problem by HiGHS.

llama.cpp offloads the output head and then the last layers, whole and without gaps, so a binary
for each says whether it is on the GPU, and towards the front they may only fall. What stays
behind is counted per group of equal tensors (see `problem`), which keeps 2,000 tensors at a few
hundred variables. The objective is that of `closed_form`: where nothing can go to the GPU, both
find the same token time within what one tensor is worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

from nexus_ext.placement import costs, ring
from nexus_ext.placement.costs import Compute, Rates
from nexus_ext.placement.memory import MIB
from nexus_ext.placement.plan import NVME
from nexus_ext.placement.problem import Group, Problem, resident_bytes
from nexus_ext.types import Catalog, Role, TensorInfo

_MS: Final = 1e3  # HiGHS's tolerances are absolute: milliseconds and MiB suit them


@dataclass(frozen=True, slots=True)
class Limits:
    """Memory that a placement may take. None: no such limit."""

    weights_bytes: int | None  # resident weights, ring and scratch in main memory
    ram_bytes: int | None  # the same and the KV cache (and what the GPU takes, if it is unified)
    gpu_bytes: int  # weights, KV cache and compute buffers on the GPU
    unified: bool


@dataclass(frozen=True, slots=True)
class Slot:
    """A layer, or the output head behind the last one: what moves to the GPU at once."""

    tensors: tuple[TensorInfo, ...]
    weight_bytes: int  # on the GPU, the copy of a tied embedding included
    kv_bytes: int


@dataclass(frozen=True, slots=True)
class Offload:
    """All that putting slots on the GPU depends on."""

    catalog: Catalog
    slots: tuple[Slot, ...]
    rates: Rates
    limits: Limits
    n_ubatch: int
    least: int  # slots that pins put on the GPU
    most: int  # slots that pins and the GPU's memory allow there
    overhead_bytes: int  # compute buffers, as soon as anything is on the GPU

    def names(self, n_gpu: int) -> frozenset[str]:
        """Return the tensors of the last `n_gpu` slots."""
        tail = self.slots[len(self.slots) - n_gpu :]
        return frozenset(tensor.name for slot in tail for tensor in slot.tensors)

    def gpu_bytes(self, n_gpu: int) -> int:
        tail = self.slots[len(self.slots) - n_gpu :]
        used = sum(slot.weight_bytes + slot.kv_bytes for slot in tail)
        return used + self.overhead_bytes if n_gpu else 0

    def kv_on_cpu(self, n_gpu: int) -> int:
        return sum(slot.kv_bytes for slot in self.slots[: len(self.slots) - n_gpu])

    def room(self, n_gpu: int) -> int:
        """Return the weights budget that is left with `n_gpu` slots on the GPU."""
        limits = self.limits
        rooms = [] if limits.weights_bytes is None else [limits.weights_bytes]
        if limits.ram_bytes is not None:
            shared = self.gpu_bytes(n_gpu) if limits.unified else 0
            rooms.append(limits.ram_bytes - self.kv_on_cpu(n_gpu) - shared)
        return min(rooms)


def slots_of(catalog: Catalog, kv_bytes: Sequence[int]) -> tuple[Slot, ...]:
    """Return the layers in order, and the output head as the last."""
    layers = [t.layer for t in catalog.tensors if t.layer is not None]
    n_layers = max(catalog.shape.n_layers, max(layers, default=-1) + 1)
    members: dict[int, list[TensorInfo]] = {}
    copied = 0
    for tensor in catalog.tensors:
        if tensor.tied_output:
            copied = tensor.nbytes
        if tensor.layer is not None:
            members.setdefault(tensor.layer, []).append(tensor)
        elif tensor.role is Role.OUTPUT or tensor.name.startswith("output"):
            members.setdefault(n_layers, []).append(tensor)
    slots = []
    for index in range(n_layers + 1):
        tensors = tuple(members.get(index, ()))
        weights = sum(t.nbytes for t in tensors) + (copied if index == n_layers else 0)
        slots.append(Slot(tensors, weights, kv_bytes[index] if index < len(kv_bytes) else 0))
    return tuple(slots)


@dataclass(frozen=True, slots=True)
class Solution:
    """Slots on the GPU, and how many tensors of each group of the problem are pinned in RAM."""

    n_gpu: int
    dense: tuple[int, ...]
    waited: tuple[int, ...]


def solve(problem: Problem, offload: Offload, ring_bytes: int) -> Solution | None:
    """Return the placement with the shortest token, or None if none keeps to the limits.

    `problem` is the one with nothing on the GPU; `ring_bytes` is charged as soon as any dense
    tensor is streamed.
    """
    return _Model(problem, offload, ring_bytes).solve()


class _Model:
    """The problem in HiGHS's terms; sizes in MiB, times in milliseconds."""

    def __init__(self, problem: Problem, offload: Offload, ring_bytes: int) -> None:
        import highspy  # 50 ms to import, and only machines with a GPU need it

        self.problem, self.offload = problem, offload
        create: Any = highspy.Highs
        self.highs = create()
        self.optimal = highspy.HighsModelStatus.kOptimal
        for option, value in (
            ("output_flag", False),
            ("threads", 1),
            ("mip_rel_gap", 0.0),
            ("mip_abs_gap", 1e-9),
            ("primal_feasibility_tolerance", 1e-9),
            ("mip_feasibility_tolerance", 1e-9),
        ):
            self.highs.setOptionValue(option, value)
        self.slot_of = {t.name: i for i, slot in enumerate(offload.slots) for t in slot.tensors}
        self.on_gpu = self._gpu_variables()
        self.ring_used = self.highs.addIntegral(1 if problem.fixed_dense_bytes else 0, 1)
        self.scratch = self.highs.addVariable(problem.fixed_scratch / MIB, self.highs.inf)
        self.pinned: list[Any] = []
        self.waited_ms: list[Any] = []
        self.ahead_ms: list[Any] = []
        self.ram: list[Any] = [ring_bytes / MIB * self.ring_used, 1.0 * self.scratch]
        for group in (*problem.dense, *problem.waited):
            self._add_group(group)
        self._bound_memory()
        self._set_objective()

    def _gpu_variables(self) -> list[Any]:
        offload, n = self.offload, len(self.offload.slots)
        variables = []
        for i in range(n):
            first = n - i  # slots on the GPU when this one is the first of them
            variables.append(
                self.highs.addIntegral(int(first <= offload.least), int(first <= offload.most))
            )
        for before, after in pairwise(variables):
            self.highs.addConstr(before - after <= 0)
        return variables

    def _add_group(self, group: Group) -> None:
        highs, size = self.highs, len(group.tensors)
        pinned = highs.addIntegral(0, size)
        self.pinned.append(pinned)
        self.ram.append(group.weight / MIB * pinned)
        if group.tensors[0].tied_output:
            self._add_tied(group, pinned)
            return
        streamed = highs.addVariable(0, size)
        counts: dict[int, int] = {}
        for tensor in group.tensors:
            if tensor.name in self.slot_of:
                slot = self.slot_of[tensor.name]
                counts[slot] = counts.get(slot, 0) + 1
        moved = highs.qsum(count * self.on_gpu[slot] for slot, count in counts.items())
        highs.addConstr(streamed + pinned + moved == size)
        seconds = group.saved_s * _MS * streamed
        if not group.scratch:
            highs.addConstr(streamed - size * self.ring_used <= 0)
            self.ahead_ms.append(seconds)
            return
        used = highs.addIntegral(0, 1)
        highs.addConstr(streamed - size * used <= 0)
        highs.addConstr(self.scratch - group.scratch / MIB * used >= 0)
        self.waited_ms.append(seconds)

    def _add_tied(self, group: Group, pinned: Any) -> None:
        """Add an embedding that is read whole, or by the row once the head is on the GPU."""
        highs, head, offload = self.highs, self.on_gpu[-1], self.offload
        tensor = group.tensors[0]
        row_s = costs.read_s(tensor, offload.catalog.shape, offload.rates, row_only=True)
        scratch = ring.scratch_bytes(tensor, offload.n_ubatch, row_only=True)
        whole, row = highs.addVariable(0, 1), highs.addVariable(0, 1)
        highs.addConstr(whole + pinned + head >= 1)
        highs.addConstr(row + pinned - head >= 0)
        highs.addConstr(whole - self.ring_used <= 0)
        highs.addConstr(self.scratch - scratch / MIB * row >= 0)
        self.ahead_ms.append(group.saved_s * _MS * whole)
        self.waited_ms.append(row_s * _MS * row)

    def _bound_memory(self) -> None:
        highs, offload, limits = self.highs, self.offload, self.offload.limits
        problem = self.problem
        gpu: list[Any] = [offload.overhead_bytes / MIB * self.on_gpu[-1]]
        kv_moved: list[Any] = []
        for slot, variable in zip(offload.slots, self.on_gpu, strict=True):
            # What is settled on the host leaves it with its layer.
            settled = [t for t in slot.tensors if problem.fixed.get(t.name, NVME) != NVME]
            freed = sum(resident_bytes(t, problem.fixed[t.name]) for t in settled)
            self.ram.append(-freed / MIB * variable)
            gpu.append((slot.weight_bytes + slot.kv_bytes) / MIB * variable)
            kv_moved.append(-slot.kv_bytes / MIB * variable)
        highs.addConstr(highs.qsum(gpu) <= limits.gpu_bytes / MIB)
        fixed = problem.fixed_bytes
        if limits.weights_bytes is not None:
            highs.addConstr(highs.qsum(self.ram) <= (limits.weights_bytes - fixed) / MIB)
        if limits.ram_bytes is not None:
            parts = [*self.ram, *kv_moved, *(gpu if limits.unified else ())]
            room = limits.ram_bytes - fixed - offload.kv_on_cpu(0)
            highs.addConstr(highs.qsum(parts) <= room / MIB)

    def _set_objective(self) -> None:
        highs, problem, offload = self.highs, self.problem, self.offload
        overlapped = highs.addVariable(problem.fixed_ahead_s * _MS, highs.inf)
        highs.addConstr(overlapped - highs.qsum(self.ahead_ms) >= problem.fixed_ahead_s * _MS)
        dense, experts = [], []
        for i, (slot, variable) in enumerate(zip(offload.slots, self.on_gpu, strict=True)):
            gain = self._gain(slot, head=i == len(offload.slots) - 1)
            dense.append(gain.dense_s * _MS * variable)
            experts.append(-gain.expert_s * _MS * variable)
        highs.addConstr(overlapped + highs.qsum(dense) >= problem.compute.dense_s * _MS)
        loss = costs.OVERLAP_LOSS
        apart = [loss * part for part in self.ahead_ms] + [-loss * part for part in dense]
        self.objective = (1 - loss) * overlapped + highs.qsum([*self.waited_ms, *experts, *apart])

    def _gain(self, slot: Slot, *, head: bool) -> Compute:
        """Return the computing per token that moving a slot to the GPU saves."""
        shape, rates = self.offload.catalog.shape, self.offload.rates
        per_byte = 1 / rates.cpu_bytes_s - 1 / rates.gpu_bytes_s
        saved = Compute()
        for tensor in slot.tensors:
            saved = saved.plus(tensor, costs.token_bytes(tensor, shape) * per_byte)
        for tensor in self.offload.catalog.tensors if head else ():
            if tensor.tied_output:
                row_s = tensor.row_nbytes / rates.cpu_bytes_s
                saved = saved.plus(tensor, tensor.nbytes * per_byte - row_s)
        return saved

    def solve(self) -> Solution | None:
        self.highs.minimize(self.objective)
        if self.highs.getModelStatus() != self.optimal:
            return None
        n_gpu = sum(round(self.highs.val(variable)) for variable in self.on_gpu)
        counts = [round(self.highs.val(variable)) for variable in self.pinned]
        n_dense = len(self.problem.dense)
        return Solution(n_gpu, tuple(counts[:n_dense]), tuple(counts[n_dense:]))
