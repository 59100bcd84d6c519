"""Plans with a GPU: whole layers from the last one on, and never more than it can hold."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_ext.errors import DoesNotFit, UsageError
from nexus_ext.hardware.profile import HardwareProfile
from nexus_ext.placement import Pin, Plan, PlanRequest, closed_form, mip, solve
from nexus_ext.placement.costs import is_dense, rates_of
from nexus_ext.placement.plan import GPU, HOST, NVME, RAM
from nexus_ext.placement.problem import Problem, problem_of
from nexus_ext.types import Catalog, Role
from tests.unit.test_placement_builders import (
    GIB,
    MIB,
    gpu,
    large_model,
    large_moe,
    machine,
    model,
)

small_models = st.builds(
    model,
    n_layers=st.integers(1, 6),
    n_embd=st.sampled_from((512, 1024)),
    n_ff=st.sampled_from((1024, 4096)),
    n_vocab=st.sampled_from((512, 8192)),
    tied=st.booleans(),
    mixed=st.booleans(),
) | st.builds(
    model,
    n_layers=st.integers(1, 5),
    n_embd=st.just(512),
    n_ff=st.sampled_from((256, 512)),
    n_experts=st.sampled_from((4, 16)),
    n_used=st.just(2),
    tied=st.booleans(),
)
# Without the scores of attention the compute buffers stay below the sizes of these models.
FEW_TOKENS = {"n_ctx": 256, "n_batch": 16, "n_ubatch": 16, "flash_attn": True}


def with_gpu(size: int, *, unified: bool = False, bytes_s: float = 300e9) -> HardwareProfile:
    return machine(gpus=(gpu(size, unified=unified, bytes_s=bytes_s),))


def ask(catalog: Catalog, hardware: HardwareProfile, **kinds: int) -> Plan | int:
    """A plan, or the smallest budget that would do."""
    try:
        return solve(catalog, hardware, PlanRequest(**FEW_TOKENS, **kinds))  # type: ignore[arg-type]
    except DoesNotFit as error:
        return error.smallest_bytes


def check(plan: Plan, catalog: Catalog, gpu_bytes: int, *, unified: bool) -> None:
    assert sum(plan.gpu_breakdown.values()) <= gpu_bytes
    assert all(size >= 0 for size in (*plan.breakdown.values(), *plan.gpu_breakdown.values()))
    n_layers = catalog.shape.n_layers
    first = n_layers + 1 - plan.n_gpu_layers
    for tensor in catalog.tensors:
        slot = tensor.layer if tensor.layer is not None else n_layers
        if tensor.role is Role.TOKEN_EMBEDDING:
            assert plan.tiers[tensor.name] in (RAM, NVME)
        else:
            assert (plan.tiers[tensor.name] == GPU) == (slot >= first)
    used = sum(size for name, size in plan.gpu_breakdown.items() if name != "free")
    assert plan.breakdown["GPU (shared memory)"] == (used if unified else 0)


@given(small_models, st.floats(0, 1.5), st.floats(0, 1.2), st.booleans())
@settings(max_examples=60, deadline=None)
def test_gpu_holds_whole_layers_from_the_last_and_never_more_than_it_can(
    catalog: Catalog, gpu_share: float, share: float, unified: bool
) -> None:
    gpu_bytes = max(1, int(gpu_share * catalog.nbytes))
    hardware = with_gpu(gpu_bytes, unified=unified)
    smallest = ask(catalog, hardware, ram_bytes=0)
    assert isinstance(smallest, int)
    plan = ask(catalog, hardware, ram_bytes=smallest + int(share * catalog.nbytes))
    assert isinstance(plan, Plan)
    check(plan, catalog, gpu_bytes, unified=unified)


@given(small_models, st.floats(0, 1.5), st.floats(0, 1.2), st.floats(0, 1.2), st.booleans())
@settings(max_examples=60, deadline=None)
def test_more_ram_is_never_predicted_slower_beside_a_gpu(
    catalog: Catalog, gpu_share: float, share: float, other: float, unified: bool
) -> None:
    hardware = with_gpu(max(1, int(gpu_share * catalog.nbytes)), unified=unified)
    smallest = ask(catalog, hardware, ram_bytes=0)
    assert isinstance(smallest, int)
    slow, fast = (
        ask(catalog, hardware, ram_bytes=smallest + int(s * catalog.nbytes))
        for s in sorted((share, other))
    )
    assert isinstance(slow, Plan) and isinstance(fast, Plan)
    assert fast.prediction.token_s <= slow.prediction.token_s * (1 + 1e-6)


@given(small_models, st.floats(0, 1.5), st.floats(0, 1.5), st.floats(0, 1.2))
@settings(max_examples=60, deadline=None)
def test_more_gpu_memory_is_never_predicted_slower(
    catalog: Catalog, gpu_share: float, other: float, share: float
) -> None:
    smallest = ask(catalog, machine(), ram_bytes=0)
    assert isinstance(smallest, int)
    ram = smallest + int(share * catalog.nbytes)
    slow, fast = (
        ask(catalog, with_gpu(max(1, int(s * catalog.nbytes))), ram_bytes=ram)
        for s in sorted((gpu_share, other))
    )
    assert isinstance(slow, Plan) and isinstance(fast, Plan)
    assert fast.prediction.token_s <= slow.prediction.token_s * (1 + 1e-6)


@given(small_models, st.sampled_from(("weights_bytes", "ram_bytes")), st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_smallest_budget_beside_a_gpu_fits_and_a_byte_less_does_not(
    catalog: Catalog, kind: str, unified: bool
) -> None:
    hardware = with_gpu(catalog.nbytes // 2, unified=unified)
    smallest = ask(catalog, hardware, **{kind: 0})
    assert isinstance(smallest, int)
    assert isinstance(ask(catalog, hardware, **{kind: smallest}), Plan)
    assert ask(catalog, hardware, **{kind: smallest - 1}) == smallest


def both(catalog: Catalog, share: float) -> tuple[closed_form.Choice, closed_form.Choice, Problem]:
    """The answers of the closed form and of HiGHS for RAM against NVMe, with the same ring."""
    rates, _ = rates_of(catalog, machine(), None, 4)
    problem = problem_of(catalog, rates, 16, {})
    budget = closed_form.smallest_bytes(problem) + int(share * catalog.nbytes)
    closed = closed_form.choose(problem, budget)
    assert closed is not None
    slots = mip.slots_of(catalog, [0] * catalog.shape.n_layers)
    limits = mip.Limits(budget, None, 0, unified=False)
    offload = mip.Offload(catalog, slots, rates, limits, 16, 0, 0, 0)
    ring_bytes = closed.ring_bytes or problem.ring.smallest
    found = mip.solve(problem, offload, ring_bytes)
    assert found is not None and found.n_gpu == 0
    exact = closed_form.complete(problem, budget, found.dense, found.waited, ring_bytes)
    assert exact is not None
    return closed, exact, problem


@given(small_models, st.floats(0, 1.1))
@settings(max_examples=80, deadline=None)
def test_closed_form_and_highs_agree_within_what_one_tensor_saves(
    catalog: Catalog, share: float
) -> None:
    closed, exact, problem = both(catalog, share)
    one = max(group.saved_s for group in (*problem.dense, *problem.waited))
    assert abs(closed.token_s - exact.token_s) <= one


@given(small_models, st.floats(0.2, 1.2), st.floats(0, 1.0))
@settings(max_examples=40, deadline=None)
def test_highs_finds_no_worse_offload_than_trying_all_of_them(
    catalog: Catalog, gpu_share: float, share: float
) -> None:
    smallest = ask(catalog, machine(), weights_bytes=0)
    assert isinstance(smallest, int)
    weights = smallest + int(share * catalog.nbytes)
    gpu_bytes = int(gpu_share * catalog.nbytes)
    hardware = with_gpu(gpu_bytes)
    plan = ask(catalog, hardware, weights_bytes=weights)
    assert isinstance(plan, Plan)
    rates, _ = rates_of(catalog, hardware, hardware.gpus[0], 4)
    slots = mip.slots_of(catalog, [0] * catalog.shape.n_layers)
    limits = mip.Limits(weights, None, gpu_bytes, unified=False)
    offload = mip.Offload(catalog, slots, rates, limits, 16, 0, len(slots), 0)
    best, one = float("inf"), 0.0
    for n_gpu in range(plan.n_gpu_layers + 1):
        there = problem_of(catalog, rates, 16, {}, offload.names(n_gpu))
        choice = closed_form.choose(there, weights)
        best = min(best, choice.token_s if choice else best)
        groups = (*there.dense, *there.waited)
        one = max([one, *(group.saved_s for group in groups)])
        ring_s = there.ring.target / rates.disk_bytes_s
    # HiGHS is charged a longer ring than the closed form when only a little is missing.
    assert plan.prediction.token_s <= best + one + ring_s


def test_a_model_of_2000_tensors_is_planned_beside_a_gpu() -> None:
    catalog = model(n_layers=222, n_embd=1024, n_ff=4096, n_heads=16, n_vocab=32000)
    assert len(catalog.tensors) > 2000
    plan = solve(catalog, with_gpu(GIB), PlanRequest(weights_bytes=GIB, flash_attn=True))
    check(plan, catalog, GIB, unified=False)
    assert 0 < plan.n_gpu_layers < 223


def test_everything_goes_to_a_gpu_that_holds_it() -> None:
    plan = solve(large_model(), with_gpu(12 * GIB), PlanRequest(ram_bytes=4 * GIB))
    assert plan.n_gpu_layers == 33
    assert plan.everything_fits
    assert set(plan.tiers.values()) == {GPU, RAM}


def test_streamed_tensors_do_not_count_against_the_gpu() -> None:
    catalog = large_moe()
    plan = solve(catalog, with_gpu(4 * GIB), PlanRequest(ram_bytes=4 * GIB, flash_attn=True))
    on_gpu = sum(t.nbytes for t in catalog.tensors if plan.tiers[t.name] == GPU)
    assert plan.gpu_breakdown["weights"] == on_gpu
    assert 0 < on_gpu < 4 * GIB < plan.streamed_bytes_per_token * 8


def test_on_unified_memory_gpu_and_ram_share_the_budget() -> None:
    catalog = large_model()
    request = PlanRequest(ram_bytes=8 * GIB, flash_attn=True)
    plan = solve(catalog, with_gpu(4 * GIB, unified=True), request)
    assert plan.breakdown["GPU (shared memory)"] > 3 * GIB
    assert sum(plan.breakdown.values()) == 8 * GIB
    assert sum(plan.gpu_breakdown.values()) == 4 * GIB


def test_the_ring_beside_a_gpu_keeps_its_length() -> None:
    request = PlanRequest(ram_bytes=4 * GIB, n_ctx=4096)
    for unified in (False, True):
        plan = solve(large_moe(), with_gpu(8 * GIB, unified=unified), request)
        assert not plan.everything_fits
        dense = [t for t in large_moe().tensors if is_dense(t) and plan.tiers[t.name] == NVME]
        # Nothing is gained by a ring that holds more than all that passes through it.
        assert plan.ring_bytes >= min(32 * MIB, sum(t.nbytes for t in dense) // 2)


def test_no_gpu_is_used_when_none_is_wanted() -> None:
    request = PlanRequest(ram_bytes=4 * GIB, gpu_bytes=0)
    plan = solve(large_model(), with_gpu(12 * GIB), request)
    assert plan.n_gpu_layers == 0 and not plan.gpu_breakdown
    assert GPU not in plan.tiers.values()


def test_a_gpu_budget_below_the_working_set_is_obeyed() -> None:
    request = PlanRequest(ram_bytes=6 * GIB, gpu_bytes=2 * GIB, flash_attn=True)
    plan = solve(large_model(), with_gpu(12 * GIB), request)
    assert plan.budget.gpu_bytes == 2 * GIB == sum(plan.gpu_breakdown.values())
    assert 0 < plan.n_gpu_layers < 33


def test_pins_to_the_gpu_and_off_it_are_kept() -> None:
    catalog = model(n_layers=6)
    hardware = with_gpu(GIB)
    wanted = (Pin(r"blk\.2\.ffn_up", RAM),)
    plan = solve(catalog, hardware, PlanRequest(pins=wanted))
    assert plan.n_gpu_layers == 4 and plan.tiers["blk.2.ffn_up.weight"] == RAM
    slow = with_gpu(GIB, bytes_s=1e6)
    assert solve(catalog, slow, PlanRequest()).n_gpu_layers == 0
    wanted = (Pin(r"blk\.4\.ffn_up", GPU),)
    assert solve(catalog, slow, PlanRequest(pins=wanted)).n_gpu_layers == 3


@pytest.mark.parametrize(
    ("wanted", "size", "named"),
    [
        ((Pin("token_embd", GPU),), GIB, "token_embd"),
        ((Pin(r"blk\.0\.ffn_up", GPU), Pin("output", HOST)), GIB, "'output'"),
    ],
)
def test_pins_that_llama_cpp_cannot_follow_are_refused(
    wanted: tuple[Pin, ...], size: int, named: str
) -> None:
    with pytest.raises(UsageError, match=named):
        solve(model(), with_gpu(size), PlanRequest(pins=wanted))


def test_pins_to_the_gpu_need_one_and_its_memory() -> None:
    wanted = (Pin("ffn_up", GPU),)
    with pytest.raises(UsageError, match="none is used"):
        solve(model(), machine(), PlanRequest(pins=wanted))
    with pytest.raises(DoesNotFit, match="pin 'ffn_up'") as refused:
        solve(model(), with_gpu(MIB), PlanRequest(pins=wanted))
    need = refused.value.smallest_bytes
    assert solve(model(), with_gpu(need), PlanRequest(pins=wanted)).n_gpu_layers == 5


def test_an_unknown_gpu_bandwidth_is_assumed_and_said_so() -> None:
    hardware = machine(gpus=(gpu(GIB, bytes_s=None),))
    plan = solve(model(), hardware, PlanRequest())
    assert any("test GPU" in note for note in plan.notes)
