"""Eviction keeps its promises in every state: it is a function, so states are drawn at random."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_ext.multiplexer.eviction import Holder, Memory, activate, apply, make_room


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
    )


@st.composite
def memories(draw: st.DrawFn) -> Memory:
    names = "abcdef"[: draw(st.integers(1, 6))]
    found = tuple(draw(holders(name)) for name in names)
    used = sum(holder.held_bytes for holder in found)
    other = draw(st.integers(0, 20))
    return Memory(used + other + draw(st.integers(0, 100)), found, other)


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
    kept = sum(h.held_bytes for h in idle.holders if h.name != "a" and (h.pinned or h.share_bytes))
    if not target.loaded and idle.other_bytes + kept + target.fixed_bytes <= idle.budget_bytes:
        assert activate(idle, "a") is not None


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
