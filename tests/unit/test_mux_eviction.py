"""Eviction keeps its promises in every state: it is a function, so states are drawn at random."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_ext.multiplexer.eviction import (
    Activation,
    Holder,
    Memory,
    Step,
    activate,
    apply,
    faults_of_activation,
    faults_of_steps,
    make_room,
)


@st.composite
def holders(draw: st.DrawFn, name: str) -> Holder:
    units = tuple(draw(st.lists(st.integers(1, 50), max_size=6)))
    loaded = draw(st.booleans())
    return Holder(
        name=name,
        fixed_bytes=draw(st.integers(0, 60)),
        units=units,
        loaded=loaded,
        resident=draw(st.integers(0, len(units))) if loaded else 0,
        in_use=loaded and draw(st.booleans()),
        pinned=draw(st.integers(0, 4)) == 0,
        priority=draw(st.integers(0, 2)),
        share_bytes=draw(st.sampled_from((0, 0, 40))),
        last_used_ns=draw(st.integers(0, 5)),
        gpu_bytes=tuple(draw(st.lists(st.sampled_from((0, 0, 10, 30)), max_size=2))),
    )


@st.composite
def memories(draw: st.DrawFn) -> Memory:
    names = "abcdef"[: draw(st.integers(1, 6))]
    found = tuple(draw(holders(name)) for name in names)
    used = sum(holder.held_bytes for holder in found)
    other = draw(st.integers(0, 20))
    on_gpus = [sum(h.on_gpu(i) for h in found if h.loaded) for i in range(2)]
    budgets = tuple(n + draw(st.integers(0, 40)) for n in on_gpus)
    return Memory(used + other + draw(st.integers(0, 100)), found, other, budgets)


@settings(max_examples=400, deadline=None)
@given(memories())
def test_an_activation_keeps_the_budget_and_what_must_be_kept(memory: Memory) -> None:
    found = activate(memory, "a")
    if found is None:
        return
    after = apply(memory, found.steps)
    target = replace(after.holder("a"), loaded=True, resident=found.resident)
    after = after.with_holder(target)
    assert after.used_bytes <= after.budget_bytes
    assert all(free >= 0 for free in after.gpu_free)
    for step in found.steps:
        before, now = memory.holder(step.name), after.holder(step.name)
        assert step.name != "a" and before.loaded
        assert not before.in_use and not before.pinned
        assert step.freed_bytes == before.held_bytes - now.held_bytes > 0
        if before.share_bytes:
            assert now.held_bytes >= min(before.held_bytes, before.share_bytes)
    assert found.resident >= memory.holder("a").resident


@settings(max_examples=400, deadline=None)
@given(memories(), st.integers(0, 300))
def test_room_is_made_in_order_and_no_more_than_needed(memory: Memory, wanted: int) -> None:
    steps = make_room(memory, wanted, "a")
    if steps is None:
        return
    after = apply(memory, steps)
    assert after.free_bytes >= wanted
    for step in steps:  # none of it could have stayed
        before = memory.holder(step.name)
        least = step.freed_bytes if step.resident is None else before.units[step.resident]
        assert after.free_bytes - least < wanted
    order = [
        (memory.holder(s.name).priority, memory.holder(s.name).last_used_ns, s.name) for s in steps
    ]
    if all(step.resident is not None for step in steps):
        assert order == sorted(order)


@settings(max_examples=300, deadline=None)
@given(memories())
def test_nobody_starves(memory: Memory) -> None:
    """Once nobody else is in use, a model whose fixed part can fit at all gets it."""
    idle = replace(memory, holders=tuple(replace(h, in_use=False) for h in memory.holders))
    target = idle.holder("a")
    stay = [h for h in idle.holders if h.name != "a" and h.loaded and (h.pinned or h.share_bytes)]
    kept = sum(h.held_bytes for h in stay)
    fits = idle.other_bytes + kept + target.fixed_bytes <= idle.budget_bytes
    fits_gpus = all(
        sum(h.on_gpu(i) for h in stay) + target.on_gpu(i) <= budget
        for i, budget in enumerate(idle.gpu_budgets)
    )
    if not target.loaded and fits:
        assert (activate(idle, "a") is not None) == fits_gpus


@settings(max_examples=400, deadline=None)
@given(memories())
def test_models_go_for_a_gpu_in_order_and_no_more_than_needed(memory: Memory) -> None:
    roomy = replace(memory, budget_bytes=10**6)  # main memory is no reason to evict anybody
    target = replace(roomy.holder("a"), loaded=False, resident=0, in_use=False)
    roomy = roomy.with_holder(target)
    found = activate(roomy, "a")
    if found is None:
        return
    for step in found.steps:
        assert step.resident is None and any(roomy.holder(step.name).gpu_bytes)
        without = apply(roomy, tuple(s for s in found.steps if s is not step))
        short = [i for i, free in enumerate(without.gpu_free) if free < target.on_gpu(i)]
        assert short, "it could have stayed"
        holder = roomy.holder(step.name)
        for other in roomy.holders:  # nobody older has stayed who would have been enough alone
            able = other.loaded and not (other.in_use or other.pinned or other.share_bytes)
            older = (other.priority, other.last_used_ns) < (holder.priority, holder.last_used_ns)
            if able and older and other.name != "a" and other not in _gone(roomy, found.steps):
                assert any(without.gpu_free[i] + other.on_gpu(i) < target.on_gpu(i) for i in short)


def _gone(memory: Memory, steps: tuple[Step, ...]) -> list[Holder]:
    return [memory.holder(step.name) for step in steps]


def test_a_model_goes_for_the_gpu_that_is_short() -> None:
    first = Holder("first", 10, (), loaded=True, last_used_ns=1, gpu_bytes=(8,))
    second = Holder("second", 10, (), loaded=True, last_used_ns=2, gpu_bytes=(0, 8))
    target = Holder("x", 10, (20,), gpu_bytes=(0, 6))
    found = activate(Memory(1000, (first, second, target), gpu_budgets=(10, 10)), "x")
    assert found is not None and found.resident == 1
    assert [(s.name, s.resident, s.freed_bytes) for s in found.steps] == [("second", None, 10)]
    in_use = replace(second, in_use=True)
    assert activate(Memory(1000, (first, in_use, target), gpu_budgets=(10, 10)), "x") is None
    nowhere = Holder("x", 10, (), gpu_bytes=(0, 0, 6))
    assert activate(Memory(1000, (nowhere,), gpu_budgets=(10, 10)), "x") is None


@settings(max_examples=300, deadline=None)
@given(memories())
def test_units_go_before_models(memory: Memory) -> None:
    wanted = 40
    steps = make_room(memory, wanted, "a") or ()
    if any(step.resident is None for step in steps):
        assert make_room(memory, wanted, "a", unload=False) is None


def test_the_model_used_longest_ago_gives_up_just_enough() -> None:
    old = Holder("old", 10, (20, 20, 20), loaded=True, resident=3, last_used_ns=1)
    new = Holder("new", 10, (20, 20, 20), loaded=True, resident=3, last_used_ns=2)
    target = Holder("x", 10, (20, 20))
    memory = Memory(150, (new, old, target))
    found = activate(memory, "x")
    assert found is not None
    assert [(s.name, s.resident, s.freed_bytes) for s in found.steps] == [("old", 1, 40)]
    assert found.resident == 2


def test_a_model_larger_than_the_budget_gets_what_there_is() -> None:
    target = Holder("x", 30, (20,) * 10)
    found = activate(Memory(100, (target,)), "x")
    assert found is not None and found.resident == 3


def test_a_pinned_neighbour_can_make_it_impossible() -> None:
    pinned = Holder("p", 60, (20,), loaded=True, resident=1, pinned=True)
    assert activate(Memory(100, (pinned, Holder("x", 30, ()))), "x") is None


@settings(max_examples=400, deadline=None)
@given(memories(), st.integers(0, 200), st.booleans())
def test_what_is_decided_here_passes_as_somebody_elses(
    memory: Memory, wanted: int, unload: bool
) -> None:
    found = activate(memory, "a")
    assert found is None or not faults_of_activation(memory, found, "a")
    steps = make_room(memory, wanted, "a", unload=unload)
    assert steps is None or not faults_of_steps(memory, steps, wanted, "a", unload=unload)


STATE = Memory(
    200,
    (
        Holder("a", 10, (10, 10), loaded=True, resident=1),
        Holder("b", 10, (20, 20), loaded=True, resident=2),
        Holder("shared", 10, (20, 20), loaded=True, resident=2, share_bytes=30),
        Holder("pinned", 10, (20,), loaded=True, resident=1, pinned=True),
        Holder("busy", 10, (20,), loaded=True, resident=1, in_use=True),
        Holder("gone", 10, (20,)),
    ),
)
BAD_STEPS: dict[str, tuple[object, ...] | object] = {
    "instead of a tuple": [Step("b", 1, 20)],
    "among the steps": ("b",),
    "which holds nothing": (Step("gone", 0, 20),),
    "which holds nothing ": (Step("nobody", 0, 20),),
    "takes from a what is for a": (Step("a", 0, 10),),
    "which is pinned": (Step("pinned", None, 30),),
    "which is in use": (Step("busy", 0, 20),),
    "which must stay loaded": (Step("shared", None, 50),),
    "a part of its share": (Step("shared", 0, 40),),
    "leaves b 2 units": (Step("b", 2, 0),),
    "leaves b -1 units": (Step("b", -1, 60),),
    "leaves b True units": (Step("b", True, 20),),  # type: ignore[arg-type]
    "which are 20": (Step("b", 1, 40),),
    "twice": (Step("b", 1, 20), Step("b", 0, 40)),
    "frees 40 bytes, 50 are wanted": (Step("b", 1, 20),),
}


@pytest.mark.parametrize("what", BAD_STEPS)
def test_steps_that_break_a_rule_are_found_out(what: str) -> None:
    assert STATE.free_bytes == 20
    assert what.strip() in faults_of_steps(STATE, BAD_STEPS[what], 50, "a")


def test_activations_that_break_a_rule_are_found_out() -> None:
    assert not faults_of_activation(STATE, Activation((), 2), "a")
    for activation, what in (
        (None, "instead of an Activation"),
        (Activation((), 3), "gives a 3 of 2 units"),
        (Activation((), 0), "gives a 0 of 2 units"),
        (Activation((Step("b", None, 50),), 2), "which must stay loaded"),
        (Activation((), 1.0), "gives a 1.0 of"),  # type: ignore[arg-type]
    ):
        assert what in faults_of_activation(STATE, activation, "a")
    tight = replace(STATE, budget_bytes=180)
    assert "frees 0 bytes, 10 are wanted" in faults_of_activation(tight, Activation((), 2), "a")
    assert not faults_of_activation(tight, Activation((Step("b", 1, 20),), 2), "a")
