"""The solver's own plans pass the check of plans that others make, on every machine."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings

from nexus_ext.hardware.profile import Gpu, HardwareProfile
from nexus_ext.placement import PlanRequest, solve
from nexus_ext.placement.check import faults, missing_bytes
from nexus_ext.placement.plan import Pin
from nexus_ext.types import Catalog
from tests.unit.test_placement_builders import GIB, MIB, gpu, large_model, large_moe, machine, model
from tests.unit.test_placement_solver import budget_of, machines, models, shares


@given(models, machines, shares)
@settings(max_examples=100, deadline=None)
def test_a_plan_of_the_solver_has_no_faults(
    catalog: Catalog, hardware: HardwareProfile, share: float
) -> None:
    request = PlanRequest(weights_bytes=budget_of(catalog, share))
    assert faults(solve(catalog, hardware, request), catalog, hardware, request) == ""


@pytest.mark.parametrize(
    ("catalog", "hardware", "request_"),
    [
        (large_model(), machine(), PlanRequest(ram_bytes=4 * GIB, flash_attn=True)),
        (large_model(), machine(gpus=(gpu(12 * GIB),)), PlanRequest(ram_bytes=4 * GIB)),
        (large_model(), machine(gpus=(gpu(4 * GIB),)), PlanRequest(ram_bytes=4 * GIB, n_ctx=64)),
        (large_model(), machine(gpus=(gpu(4 * GIB),)), PlanRequest(ram_bytes=GIB * 6, gpu_bytes=0)),
        (large_moe(), machine(), PlanRequest(ram_bytes=6 * GIB)),
        (model(tied=True), machine(), PlanRequest(weights_bytes=2 * MIB, io_mode="direct")),
        (model(), machine(), PlanRequest(weights_bytes=2 * MIB, pins=(Pin("attn_q", "nvme"),))),
        (model(), machine(), PlanRequest()),
    ],
)
def test_plans_of_all_kinds_have_no_faults(
    catalog: Catalog, hardware: HardwareProfile, request_: PlanRequest
) -> None:
    assert faults(solve(catalog, hardware, request_), catalog, hardware, request_) == ""


def test_a_plan_that_moves_what_is_pinned_is_found_out() -> None:
    pinned = PlanRequest(weights_bytes=2 * MIB, pins=(Pin("attn_q", "nvme"),))
    free = PlanRequest(weights_bytes=2 * MIB, pins=(Pin("attn_q", "ram"),))
    plan = solve(model(), machine(), free)
    assert "pin 'attn_q' wants it on nvme" in faults(plan, model(), machine(), pinned)


@pytest.mark.parametrize("gpus", [(), (gpu(4 * GIB),)])
def test_a_plan_has_room_for_the_context_that_it_was_made_for_and_what_is_free(
    gpus: tuple[Gpu, ...],
) -> None:
    catalog, hardware = large_model(), machine(gpus=gpus)
    request = PlanRequest(ram_bytes=4 * GIB, n_ctx=512, n_batch=64, n_ubatch=64)
    plan = solve(catalog, hardware, request)
    assert missing_bytes(plan, catalog, hardware, request) == 0
    longer = replace(request, n_ctx=1 << 20, n_batch=2048, n_ubatch=2048)
    missing = missing_bytes(plan, catalog, hardware, longer)
    assert missing > 0
    more = replace(plan, breakdown={**plan.breakdown, "free": plan.breakdown["free"] + missing})
    assert missing_bytes(more, catalog, hardware, longer) == 0
    # Without a budget for everything there is none that a context could exceed.
    weights = solve(catalog, hardware, PlanRequest(weights_bytes=4 * GIB))
    assert missing_bytes(weights, catalog, hardware, longer) == 0
