"""Whether a plan of somebody else can be used: complete, within the budget, and large enough.

The sizes are counted as the solver counts them; how good the plan is, is not looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from nexus_ext.errors import FormatError
from nexus_ext.placement import costs, experts, memory, ring
from nexus_ext.placement.budget import Allowance, allowance, kernel_bytes
from nexus_ext.placement.memory import Context
from nexus_ext.placement.plan import GPU, HOST, NVME, RAM, Budget, Plan, PlanRequest
from nexus_ext.placement.problem import match_pins, resident_bytes
from nexus_ext.types import Catalog

if TYPE_CHECKING:
    from nexus_ext.hardware.profile import HardwareProfile


def faults(plan: Plan, catalog: Catalog, hardware: HardwareProfile, request: PlanRequest) -> str:
    """Return the first thing that is wrong with a plan of this model; "" if nothing is.

    Raises UsageError for a request or a pin that cannot be met by any plan.
    """
    try:
        plan = Plan.from_json(plan.to_json(), source="it")  # plain values, and consistent ones
    except FormatError as error:
        return str(error)
    return next(_faults(plan, catalog, hardware, request), "")


def missing_bytes(
    plan: Plan, catalog: Catalog, hardware: HardwareProfile, request: PlanRequest
) -> int:
    """Return what the context of `request` takes beyond what a plan with a RAM budget has for it.

    A plan knows nothing of the context that it was made for but how many bytes it set aside.
    """
    if plan.budget.ram_bytes is None:
        return 0
    context = memory.context_of(
        catalog.shape, request, request.n_threads or hardware.cpu.n_usable_cores
    )
    need = memory.compute_bytes(catalog, context) + memory.runtime_bytes(catalog, context)
    need += kernel_bytes(plan.budget.ram_bytes)
    if not plan.n_gpu_layers:
        need += sum(memory.kv_layer_bytes(catalog, context))
    rows = ["compute buffers", "runtime", "free", *([] if plan.n_gpu_layers else ["KV cache"])]
    return max(0, need - sum(plan.breakdown[row] for row in rows))


def _faults(
    plan: Plan, catalog: Catalog, hardware: HardwareProfile, request: PlanRequest
) -> Iterator[str]:
    if plan.fingerprint != catalog.fingerprint:
        yield f"it is for the model {plan.fingerprint!r}"
    names = {tensor.name for tensor in catalog.tensors}
    for name in sorted(names.symmetric_difference(plan.tiers)):
        yield f"it {'leaves out' if name in names else 'places'} {name!r}"
    n_threads = request.n_threads or hardware.cpu.n_usable_cores
    context = memory.context_of(catalog.shape, request, n_threads)
    process = (memory.compute_bytes(catalog, context), memory.runtime_bytes(catalog, context))
    allowed = allowance(request, hardware, sum(process))
    if plan.budget != Budget(allowed.ram_bytes, allowed.weights_bytes, allowed.gpu_bytes):
        yield f"it keeps to {plan.budget}, which is not what was asked for"
    if request.io_mode not in ("auto", plan.io_mode):
        yield f"its io_mode is {plan.io_mode!r}, not {request.io_mode!r}"
    yield from _tiers(plan, catalog, request, allowed)
    yield from _caches(plan, catalog)
    yield from _rows(plan, catalog, context, process)
    yield from _areas(plan, catalog, context)


def _tiers(plan: Plan, catalog: Catalog, request: PlanRequest, allowed: Allowance) -> Iterator[str]:
    for tensor in catalog.tensors:
        tier = plan.tiers[tensor.name]
        if tensor.role not in costs.PAGED and tier in (RAM, NVME):
            yield f"{tensor.name} ({tensor.role.value}) cannot be on {tier}"
    for name, (tier, pin) in match_pins(catalog, request.pins).items():
        if plan.tiers[name] != tier:
            yield f"{name} is on {plan.tiers[name]}, and pin {pin.pattern!r} wants it on {tier}"
    on_gpu = GPU in plan.tiers.values()
    if on_gpu and allowed.gpu is None:
        yield "it uses a GPU, and there is none to use"
    if on_gpu != (plan.n_gpu_layers > 0):
        yield f"n_gpu_layers is {plan.n_gpu_layers}, the tiers disagree"


def _caches(plan: Plan, catalog: Catalog) -> Iterator[str]:
    groups = {tuple(t.name for t in parts): parts for parts in experts.groups(catalog.tensors)}
    seen = set()
    for cache in plan.expert_caches:
        parts = groups.get(cache.tensors)
        if parts is None or cache.tensors in seen:
            yield f"{', '.join(cache.tensors)} are not the experts of one layer, or twice"
            return
        seen.add(cache.tensors)
        least = max(catalog.shape.n_experts_used, 1)
        if not least <= cache.slots <= parts[0].n_experts:
            yield f"{cache.slots} slots for {parts[0].n_experts} experts, {least} at a time"
        if cache.nbytes < cache.slots * experts.slot_bytes(parts):
            yield f"{cache.slots} slots do not fit in {cache.nbytes} bytes"


def _rows(
    plan: Plan, catalog: Catalog, context: Context, process: tuple[int, int]
) -> Iterator[str]:
    least = {"compute buffers": process[0]}
    ram = sum(plan.breakdown.values())
    least["runtime"] = process[1] + kernel_bytes(ram)
    for row, tier in (("host weights", HOST), ("pinned weights", RAM)):
        least[row] = sum(
            resident_bytes(t, tier) for t in catalog.tensors if plan.tiers[t.name] == tier
        )
    if not plan.n_gpu_layers:
        least["KV cache"] = sum(memory.kv_layer_bytes(catalog, context))
    for row, nbytes in least.items():
        if plan.breakdown[row] < nbytes:
            yield f"it counts {plan.breakdown[row]} bytes for {row}, which take {nbytes}"


def _areas(plan: Plan, catalog: Catalog, context: Context) -> Iterator[str]:
    row_only = costs.output_on_gpu(catalog.tensors, plan.tiers)
    streamed = [t for t in catalog.tensors if plan.tiers[t.name] == NVME]
    through = [t for t in streamed if costs.is_dense(t) and not (t.tied_output and row_only)]
    smallest = ring.ring_size(through, 0.0).smallest - ring.tied_rows_bytes(through)
    if plan.ring_bytes < smallest:
        yield f"the ring of {plan.ring_bytes} bytes is smaller than {smallest}"
    slab = ring.slab_bytes(through, plan.ring_bytes)
    if plan.slab_bytes != slab:
        yield f"the slabs of that ring have {slab} bytes, not {plan.slab_bytes}"
    scratch = [ring.tied_rows_bytes(through)]
    scratch += [
        ring.scratch_bytes(t, context.n_ubatch, row_only=row_only and t.tied_output)
        for t in streamed
    ]
    if plan.scratch_bytes < max(scratch):
        yield f"the scratch area of {plan.scratch_bytes} bytes is smaller than {max(scratch)}"
