"""Plans for RAM and NVMe: what every plan keeps to, whatever the model and the budget."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_ext.errors import DoesNotFit, NexusError, UsageError
from nexus_ext.placement import Pin, Plan, PlanRequest, solve
from nexus_ext.placement.costs import is_dense, record_bytes
from nexus_ext.placement.plan import HOST, NVME, RAM
from nexus_ext.placement.problem import resident_bytes, spread
from nexus_ext.placement.ring import MAX_WAVE, SLACK
from nexus_ext.types import Catalog, Role
from tests.unit.test_placement_builders import GIB, MIB, large_model, large_moe, machine, model

PAGE = 4096
MATRICES = (Role.ATTENTION, Role.FFN, Role.OUTPUT, Role.EXPERT, Role.TOKEN_EMBEDDING)

models = st.builds(
    model,
    n_layers=st.integers(1, 9),
    n_embd=st.sampled_from((256, 512, 2048)),
    n_ff=st.sampled_from((256, 1024, 5632)),
    n_heads=st.sampled_from((4, 8)),
    n_heads_kv=st.sampled_from((2, 4)),
    n_vocab=st.sampled_from((512, 32000)),
    tied=st.booleans(),
    mixed=st.booleans(),
) | st.builds(
    model,
    n_layers=st.integers(1, 6),
    n_embd=st.sampled_from((256, 1024)),
    n_ff=st.sampled_from((256, 768)),
    n_vocab=st.sampled_from((512, 32000)),
    n_experts=st.sampled_from((4, 32)),
    n_used=st.sampled_from((2, 4)),
    tied=st.booleans(),
    mixed=st.booleans(),
)
machines = st.builds(
    machine,
    disk_bytes_s=st.sampled_from((None, 0.1e9, 2e9, 50e9)),
    random_bytes_s=st.sampled_from((0.05e9, 1e9, 5e9)),
    memory_bytes_s=st.sampled_from((1e9, 20e9, 200e9)),
)
shares = st.floats(0, 1.2)
pins = st.lists(
    st.builds(
        Pin,
        st.sampled_from(("ffn_down", r"blk\.0\.", "attn_q", "output", "token_embd", "_exps")),
        st.sampled_from((RAM, NVME, HOST)),
    ),
    max_size=3,
).map(tuple)


def smallest_of(catalog: Catalog, **kinds: int) -> int:
    """The smallest budget, as the refusal of none at all names it."""
    with pytest.raises(DoesNotFit) as refused:
        solve(catalog, machine(), PlanRequest(**kinds))  # type: ignore[arg-type]
    return refused.value.smallest_bytes


def budget_of(catalog: Catalog, share: float) -> int:
    """A weights budget between the smallest possible one and more than the model."""
    smallest = smallest_of(catalog, weights_bytes=0)
    return smallest + int(share * (catalog.nbytes + MIB))


def check(plan: Plan, catalog: Catalog, request: PlanRequest) -> None:
    """What must hold for every plan."""
    tensors = {tensor.name: tensor for tensor in catalog.tensors}
    assert plan.tiers.keys() == tensors.keys()
    resident = {
        tier: sum(resident_bytes(tensors[n], tier) for n, t in plan.tiers.items() if t == tier)
        for tier in (RAM, HOST)
    }
    assert plan.breakdown["pinned weights"] == resident[RAM]
    assert plan.breakdown["host weights"] == resident[HOST]
    assert all(size >= 0 for size in plan.breakdown.values())
    if request.weights_bytes is not None:
        assert plan.weights_bytes <= request.weights_bytes
    if request.ram_bytes is not None:
        assert sum(plan.breakdown.values()) == request.ram_bytes
    streamed = [tensors[n] for n, tier in plan.tiers.items() if tier == NVME]
    assert all(tensor.role in MATRICES for tensor in streamed)
    assert plan.everything_fits == (not streamed)
    dense = [tensor for tensor in streamed if is_dense(tensor)]
    if dense:
        widest = max(tensor.row_nbytes for tensor in dense)
        assert plan.slab_bytes % PAGE == 0
        assert widest <= plan.slab_bytes <= max(8 * MIB, widest + PAGE)
        assert plan.ring_bytes >= 3 * (plan.slab_bytes + SLACK)
    else:
        assert plan.ring_bytes == plan.slab_bytes == 0
    for tensor in streamed:
        if tensor.n_experts:
            wave = min(tensor.n_experts, MAX_WAVE)
            assert plan.scratch_bytes >= wave * (record_bytes(tensor) + SLACK)
        elif not is_dense(tensor):
            assert plan.scratch_bytes >= tensor.row_nbytes + SLACK
    assert plan.prediction.tok_s <= plan.prediction.bound_tok_s * (1 + 1e-9)
    assert math.isinf(plan.prediction.bound_tok_s) == plan.everything_fits


@given(models, machines, shares)
@settings(max_examples=150, deadline=None)
def test_no_plan_exceeds_its_budget(catalog: Catalog, hardware: object, share: float) -> None:
    request = PlanRequest(weights_bytes=budget_of(catalog, share))
    check(solve(catalog, hardware, request), catalog, request)  # type: ignore[arg-type]


@given(models, shares, shares)
@settings(max_examples=60, deadline=None)
def test_both_budgets_are_obeyed_when_both_are_given(
    catalog: Catalog, share: float, other: float
) -> None:
    ram = smallest_of(catalog, ram_bytes=0) + int(other * catalog.nbytes)
    request = PlanRequest(weights_bytes=budget_of(catalog, share), ram_bytes=ram)
    check(solve(catalog, machine(), request), catalog, request)


@given(models, machines, shares, shares)
@settings(max_examples=200, deadline=None)
def test_more_memory_is_never_predicted_slower(
    catalog: Catalog, hardware: object, share: float, other: float
) -> None:
    less, more = sorted((budget_of(catalog, share), budget_of(catalog, other)))
    slow, fast = (
        solve(catalog, hardware, PlanRequest(weights_bytes=size))  # type: ignore[arg-type]
        for size in (less, more)
    )
    assert fast.prediction.token_s <= slow.prediction.token_s * (1 + 1e-12)


@pytest.mark.parametrize("step", [1, PAGE, 100_003])
def test_more_memory_is_never_predicted_slower_step_by_step(step: int) -> None:
    catalog = model(n_layers=3, n_embd=512, n_ff=1024, n_vocab=2048)
    start = smallest_of(catalog, weights_bytes=0)
    plans = [
        solve(catalog, machine(), PlanRequest(weights_bytes=start + i * step)) for i in range(150)
    ]
    times = [plan.prediction.token_s for plan in plans]
    assert times == sorted(times, reverse=True)


@given(models, shares, pins)
@settings(max_examples=100, deadline=None)
def test_no_pin_is_ever_moved(catalog: Catalog, share: float, wanted: tuple[Pin, ...]) -> None:
    request = PlanRequest(weights_bytes=budget_of(catalog, share), pins=wanted)
    try:
        plan = solve(catalog, machine(), request)
    except (DoesNotFit, UsageError) as error:
        named = any(repr(pin.pattern) in str(error) for pin in wanted)
        assert named or isinstance(error, DoesNotFit)
        return
    check(plan, catalog, request)
    for tensor in catalog.tensors:
        first = next((pin for pin in wanted if re.search(pin.pattern, tensor.name)), None)
        if first is not None and tensor.role in MATRICES:
            assert plan.tiers[tensor.name] == first.tier


@given(models, st.sampled_from(("weights_bytes", "ram_bytes")), pins)
@settings(max_examples=80, deadline=None)
def test_the_smallest_budget_of_a_refusal_fits_and_a_page_less_does_not(
    catalog: Catalog, kind: str, wanted: tuple[Pin, ...]
) -> None:
    request: dict[str, object] = {"pins": wanted, kind: 0}
    try:
        solve(catalog, machine(), PlanRequest(**request))  # type: ignore[arg-type]
    except UsageError:
        return
    except DoesNotFit as error:
        smallest = error.smallest_bytes
    request[kind] = smallest
    solve(catalog, machine(), PlanRequest(**request))  # type: ignore[arg-type]
    request[kind] = smallest - 1
    with pytest.raises(DoesNotFit) as refused:
        solve(catalog, machine(), PlanRequest(**request))  # type: ignore[arg-type]
    assert refused.value.smallest_bytes == smallest
    assert refused.value.hint


@given(models, machines, shares)
@settings(max_examples=40, deadline=None)
def test_same_input_same_plan(catalog: Catalog, hardware: object, share: float) -> None:
    request = PlanRequest(weights_bytes=budget_of(catalog, share))
    first, second = (solve(catalog, hardware, request) for _ in range(2))  # type: ignore[arg-type]
    assert first.to_json() == second.to_json()


@given(models, shares)
@settings(max_examples=80, deadline=None)
def test_the_hole_is_smaller_than_any_dense_tensor_that_is_streamed(
    catalog: Catalog, share: float
) -> None:
    weights = budget_of(catalog, share)
    plan = solve(catalog, machine(), PlanRequest(weights_bytes=weights))
    left = [t for t in catalog.tensors if plan.tiers[t.name] == NVME and is_dense(t)]
    if left:
        hole = weights - plan.weights_bytes
        # What is left over when every layer's cache of experts gets the same number of slots.
        uneven = sum(cache.nbytes // cache.slots for cache in plan.expert_caches)
        assert hole < min(resident_bytes(tensor, RAM) for tensor in left) + uneven


@given(st.integers(1, 200), st.data())
@settings(deadline=None)
def test_pinned_tensors_are_spread_over_the_depth(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    tensors = [t for t in model(n_layers=n).tensors if t.name.endswith("ffn_up.weight")]
    layers = [tensor.layer for tensor in spread(tensors, k) if tensor.layer is not None]
    assert len(layers) == k
    # Reading ahead goes on over the end of a token, so the last gap runs on into the first.
    gaps = [after - before for before, after in pairwise([*layers, *(n + i for i in layers[:1])])]
    assert not gaps or (n // k <= min(gaps) and max(gaps) <= -(-n // k))


def test_plans_pin_over_all_of_the_depth_and_no_prefix() -> None:
    catalog = large_model()
    plan = solve(catalog, machine(), PlanRequest(ram_bytes=3 * GIB))
    names = [f"blk.{i}.ffn_{part}.weight" for i in range(32) for part in ("gate", "up")]
    tiers = [plan.tiers[name] for name in names]
    assert 8 < tiers.count(RAM) < 56
    halves = tiers[:32].count(RAM), tiers[32:].count(RAM)
    assert abs(halves[0] - halves[1]) <= 1


def test_the_untied_embedding_is_the_last_to_deserve_ram() -> None:
    catalog = large_model()
    plan = solve(catalog, machine(), PlanRequest(ram_bytes=4 * GIB))
    assert plan.tiers["token_embd.weight"] == NVME
    tied = model(n_layers=32, n_embd=4096, n_ff=14336, n_vocab=128256, tied=True)
    assert solve(tied, machine(), PlanRequest(ram_bytes=4 * GIB)).tiers["token_embd.weight"] == RAM


def test_dense_weights_are_pinned_before_experts_while_they_are_what_a_token_waits_for() -> None:
    catalog = large_moe()
    plan = solve(
        catalog,
        machine(random_bytes_s=2e9, memory_bytes_s=500e9),
        PlanRequest(ram_bytes=4 * GIB, n_threads=64, flash_attn=True),
    )
    tiers = {t.role: set() for t in catalog.tensors}  # type: dict[Role, set[str]]
    for tensor in catalog.tensors:
        tiers[tensor.role].add(plan.tiers[tensor.name])
    assert plan.prediction.read_s > plan.prediction.compute_s
    assert tiers[Role.EXPERT] == {NVME} or tiers[Role.EXPERT] == {NVME, RAM}
    dense = sum(t.nbytes for t in catalog.tensors if t.role in (Role.ATTENTION, Role.OUTPUT))
    pinned = sum(
        t.nbytes
        for t in catalog.tensors
        if plan.tiers[t.name] == RAM and t.role in (Role.ATTENTION, Role.OUTPUT)
    )
    assert pinned > 0.9 * dense


def test_a_model_of_2000_tensors_is_planned_like_any_other() -> None:
    catalog = model(n_layers=222, n_embd=1024, n_ff=4096, n_heads=16, n_vocab=32000)
    assert len(catalog.tensors) > 2000
    request = PlanRequest(weights_bytes=catalog.nbytes // 2)
    check(solve(catalog, machine(), request), catalog, request)


def test_small_tensors_cannot_be_pinned_to_nvme() -> None:
    with pytest.raises(UsageError, match=r"attn_norm.*always resident"):
        solve(model(), machine(), PlanRequest(pins=(Pin("attn_", NVME),)))


@pytest.mark.parametrize(
    ("pin", "message"),
    [
        (Pin("(", RAM), "regular expression"),
        (Pin("ffn", "disk"), "'disk'"),
        (Pin("fnn_down", RAM), "'fnn_down' is found in none"),
    ],
)
def test_pins_that_mean_nothing_are_refused(pin: Pin, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        solve(model(), machine(), PlanRequest(pins=(pin,)))


def test_a_pin_that_makes_a_plan_impossible_is_named() -> None:
    catalog = large_model()
    with pytest.raises(DoesNotFit, match="pin 'ffn_'") as refused:
        solve(catalog, machine(), PlanRequest(ram_bytes=2 * GIB, pins=(Pin("ffn_", RAM),)))
    assert refused.value.smallest_bytes > 2 * GIB


def test_the_first_pin_that_matches_wins() -> None:
    wanted = (Pin(r"blk\.1\.", NVME), Pin("ffn_up", RAM))
    with pytest.raises(UsageError):
        solve(model(), machine(), PlanRequest(pins=wanted))
    wanted = (Pin(r"blk\.1\.ffn_(up|down)", NVME), Pin("ffn_up", RAM))
    plan = solve(model(), machine(), PlanRequest(pins=wanted))
    assert plan.tiers["blk.1.ffn_up.weight"] == NVME
    assert plan.tiers["blk.2.ffn_up.weight"] == RAM
    assert not plan.everything_fits


def test_without_a_budget_four_fifths_of_what_is_available_are_used() -> None:
    plan = solve(large_model(), machine(available=4 * GIB), PlanRequest())
    assert sum(plan.breakdown.values()) == 4 * GIB * 4 // 5 == plan.budget.ram_bytes
    limited = solve(large_model(), machine(limit=3 * GIB), PlanRequest())
    assert limited.budget.ram_bytes == 3 * GIB * 4 // 5
    assert any("80 %" in note for note in limited.notes)


def test_a_weights_budget_alone_does_not_limit_the_process() -> None:
    plan = solve(model(), machine(), PlanRequest(weights_bytes=2 * MIB))
    assert plan.weights_bytes <= 2 * MIB < plan.ram_bytes
    assert plan.budget.ram_bytes is None
    assert plan.breakdown["free"] == 2 * MIB - plan.weights_bytes


def test_a_disk_that_was_not_measured_is_assumed_and_said_so() -> None:
    plan = solve(large_model(), machine(disk_bytes_s=None), PlanRequest(ram_bytes=3 * GIB))
    assert any("1.5 GB/s are assumed" in note for note in plan.notes)
    assert plan.prediction.tok_s > 0


def test_nothing_is_streamed_when_everything_fits() -> None:
    plan = solve(large_model(), machine(), PlanRequest(ram_bytes=12 * GIB))
    assert plan.everything_fits
    assert plan.ring_bytes == plan.scratch_bytes == plan.streamed_bytes_per_token == 0
    assert plan.breakdown["free"] > 4 * GIB


def test_the_ring_is_a_small_part_of_a_small_budget() -> None:
    catalog = large_model()
    for ram in (2, 3, 4):
        plan = solve(catalog, machine(), PlanRequest(ram_bytes=ram * GIB))
        assert 64 * MIB <= plan.ring_bytes <= 256 * MIB
    small = model(n_layers=8, n_embd=512, n_ff=2048)
    weights = smallest_of(small, weights_bytes=0) + 3 * MIB
    plan = solve(small, machine(), PlanRequest(weights_bytes=weights))
    assert plan.ring_bytes <= weights // 4 + 3 * MIB // 4


@pytest.mark.parametrize(
    "wrong",
    [
        {"n_ctx": -1},
        {"n_batch": 0},
        {"n_seq_max": 0},
        {"ram_bytes": -1},
        {"io_mode": "mmap"},
        {"gpu_bytes": 1},
    ],
)
def test_requests_that_no_machine_could_meet_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(NexusError) as refused:
        solve(model(), machine(), PlanRequest(**wrong))  # type: ignore[arg-type]
    assert refused.value.hint
