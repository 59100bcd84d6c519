"""Replays count what the policies would have hit, and nothing hits more than Belady's optimum."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_ext.errors import UsageError
from nexus_ext.routing import (
    NONE,
    POLICIES,
    Replay,
    RoutingTrace,
    TracedLayer,
    default_sizes,
    global_lru,
    repeats,
    replay,
    report,
    slots_of,
    slots_of_share,
)


def trace_of(*layers: list[list[int]], n_experts: int = 6, record_bytes: int = 10) -> RoutingTrace:
    """A trace whose layers used these experts, token by token."""
    traced = tuple(
        TracedLayer(
            layer=i,
            n_experts=n_experts,
            n_used=len(tokens[0]),
            record_bytes=record_bytes,
            slot_bytes=2 * record_bytes,
            experts=bytes(expert for token in tokens for expert in token),
        )
        for i, tokens in enumerate(layers)
    )
    return RoutingTrace("f", "test", (1,) * len(layers[0]), traced)


def misses(trace: RoutingTrace, policy: str, slots: int) -> int:
    [[result]] = replay(trace, [policy], [[slots] * len(trace.layers)])
    return sum(result.misses)


def one_by_one(text: str) -> RoutingTrace:
    return trace_of([[int(expert)] for expert in text])


@pytest.mark.parametrize(
    ("policy", "sequence", "expected"),
    [
        ("lru", "0120123", 7),  # each is evicted just before it is used
        ("lru", "0102010", 4),  # 0 hits three times, 1 makes room for 2 and comes back
        ("lru", "0000123012", 7),  # what was used often goes as any other
        ("lfu", "0000123012", 6),  # 0 stays whatever comes; the other slot changes each time
        ("lfru", "0000123012", 6),
        ("least-stale", "0120120", 7),  # with two slots one is stale: it goes
        ("belady", "0120123", 5),
        ("belady", "0102010", 4),
        (NONE, "0000", 4),
    ],
)
def test_policies_do_what_can_be_done_by_hand(policy: str, sequence: str, expected: int) -> None:
    assert misses(one_by_one(sequence), policy, 2) == expected


def test_least_stale_evicts_what_lies_first_of_all_that_is_stale() -> None:
    trace = one_by_one("21032")  # 3 takes the place of 1, where the oldest is 2
    assert (misses(trace, "least-stale", 3), misses(trace, "lru", 3)) == (4, 5)


def test_what_a_token_uses_is_held_before_anything_is_evicted() -> None:
    trace = trace_of([[0, 1], [2, 0], [0, 1]])
    assert misses(trace, "lru", 2) == 4  # 1 makes room for 2 although 0 is as old


def test_an_expert_that_a_token_uses_twice_counts_once() -> None:
    [[result]] = replay(trace_of([[1, 1], [1, 2]]), ["lru"], [[2]])
    assert (result.uses, result.misses, result.read_bytes) == ((3,), (2,), 20)


def test_repeats_are_counted_from_each_token_to_the_next() -> None:
    assert repeats(trace_of([[0, 1], [1, 0], [2, 1]], [[0, 0], [0, 3], [4, 5]])) == 4 / 8
    assert repeats(trace_of([[0, 1]])) == 0.0


def test_a_layer_with_too_few_slots_for_a_token_has_no_cache() -> None:
    [[result]] = replay(trace_of([[0, 1]] * 3, [[0, 1]] * 3), ["lru"], [[1, 2]])
    assert result.misses == (6, 2)


def test_a_layer_without_a_cache_holds_nothing_between_tokens_that_would_fit() -> None:
    # 2 slots for 3 picks: the second token names two experts only, and is read all the same.
    [found] = replay(trace_of([[0, 0, 3], [0, 1, 2], [0, 0, 3]]), [*POLICIES, NONE], [[2]])
    assert {result.misses for result in found} == {(7,)}


def test_a_popular_expert_outlives_a_scan_and_a_forgotten_one_goes() -> None:
    scan = "00000" + "".join(f"{1 + i % 4}0" for i in range(8))
    assert misses(one_by_one(scan), "lfru", 2) == 1 + 8  # 0 once, the scan each time
    # 0 was used often, long ago: by frequency alone it would keep its slot far longer.
    passed = one_by_one("0" * 8 + "12" * 60)
    assert misses(passed, "lfru", 2) < misses(passed, "lfu", 2)


def test_a_policy_without_a_formula_is_replayed_by_the_code_that_is_given() -> None:
    trace = one_by_one("0120123")
    with pytest.raises(UsageError, match="'adaptive' has no formula"):
        replay(trace, ["lru", "adaptive"], [[2]])

    def all_missed(trace: RoutingTrace, policy: str, slots: Sequence[int]) -> Replay:
        return Replay(policy, tuple(slots), (7,), (7,), 70, trace.n_tokens)

    found = replay(trace, ["lru", "adaptive", "belady"], [[2], [3]], by_code=all_missed)
    assert [[sum(one.misses) for one in of_size] for of_size in found] == [[7, 7, 5], [4, 7, 4]]
    assert [of_size[1].slots for of_size in found] == [(2,), (3,)]


def test_one_lru_for_all_layers_hits_nothing_below_a_tokens_cycle() -> None:
    n_layers, n_used = 4, 2
    trace = trace_of(*([[0, 1]] * 20 for _ in range(n_layers)))
    cycle = n_layers * n_used
    assert global_lru(trace, cycle - 1).hit_rate == 0.0
    assert global_lru(trace, cycle).hit_rate == 0.95
    # The same memory, some layers with slots of their own: those that fit hit.
    [[parts]] = replay(trace, ["lru"], [[n_used, n_used, n_used, 1]])
    assert sum(parts.slots) == cycle - 1
    assert parts.hit_rate == pytest.approx(0.95 * 3 / 4)


tokens = st.integers(1, 3).flatmap(
    lambda n_used: st.lists(
        st.lists(st.integers(0, 5), min_size=n_used, max_size=n_used), min_size=1, max_size=12
    )
)


@given(tokens, st.integers(1, 6), st.integers(0, 1 << 30))
@settings(deadline=None)
def test_no_policy_beats_belady(used: list[list[int]], slots: int, seed: int) -> None:
    trace = trace_of(used)
    [found] = replay(trace, [*POLICIES, NONE], [[slots]], seed=seed)
    by_policy = {result.policy: sum(result.misses) for result in found}
    assert by_policy["belady"] == min(by_policy.values())
    assert by_policy[NONE] == max(by_policy.values()) == sum(found[0].uses)


@given(tokens, st.integers(1, 4))
@settings(deadline=None)
def test_belady_is_the_optimum_that_trying_everything_finds(
    used: list[list[int]], slots: int
) -> None:
    sets = [frozenset(token) for token in used[:8]]
    slots = max(slots, len(used[0]))

    @cache
    def fewest(at: int, held: frozenset[int]) -> int:
        if at == len(sets):
            return 0
        missing = len(sets[at] - held)
        states = {held | sets[at]}
        while len(next(iter(states))) > slots:
            states = {state - {out} for state in states for out in state - sets[at]}
        return missing + min(fewest(at + 1, state) for state in states)

    assert misses(trace_of(used[:8]), "belady", slots) == fewest(0, frozenset())


@given(tokens, st.integers(1, 6))
@settings(deadline=None)
def test_sizes_replayed_together_are_those_replayed_alone(
    used: list[list[int]], slots: int
) -> None:
    trace = trace_of(used, [list(reversed(token)) for token in used])
    sizes = [[slots, slots], [6, slots], [6, 6]]
    names = [name for name in POLICIES if name != "random"]
    assert replay(trace, names, sizes) == [replay(trace, names, [size])[0] for size in sizes]


def test_sizes_are_those_that_the_planner_would_give() -> None:
    trace = trace_of([[0, 1]] * 2, [[0, 1]] * 2)
    assert slots_of(trace, 3 * 2 * 20 + 39) == (3, 3)
    assert slots_of(trace, 10**9) == (6, 6)
    assert slots_of(trace, 0) == (0, 0)
    assert slots_of_share(trace, 0.5) == (3, 3)
    assert default_sizes(trace)[0] == (2, 2) and default_sizes(trace)[-1] == (6, 6)


def test_a_row_adds_reading_and_computing() -> None:
    trace = trace_of([[0, 1]] * 4)
    rows = report(trace, ["lru", NONE], [[2]], disk_bytes_s=100.0, compute_s=0.3)
    assert [row.bytes_per_token for row in rows] == [5.0, 20.0]
    assert [row.tok_s for row in rows] == [pytest.approx(1 / 0.35), pytest.approx(2.0)]
    assert [row.below_belady for row in rows] == [0.0, 0.75]
    assert rows[0].cache_bytes == 40 and rows[0].share == pytest.approx(2 / 6)
    assert report(trace, ["lru"], [[2]])[0].tok_s is None
