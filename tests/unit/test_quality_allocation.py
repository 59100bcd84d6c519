"""The knapsack of types: exact where it can be checked by trying everything."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_ext.errors import UsageError
from nexus_ext.quality.allocation import (
    Choice,
    Item,
    allocate,
    relaxed,
    smallest_nbytes,
    useful,
)

BITS = {"Q2_K": 2.625, "Q3_K": 3.4375, "Q4_K": 4.5, "Q6_K": 6.5625}


def menu(n_weights: int, sensitivity: float) -> tuple[Choice, ...]:
    return tuple(
        Choice(name, int(n_weights * bits / 8), sensitivity * 4**-bits)
        for name, bits in BITS.items()
    )


def by_trying(items: list[Item], budget: int) -> float:
    combinations = product(*(item.choices for item in items))
    return min(sum(c.loss for c in pick) for pick in combinations if fits(pick, budget))


def fits(pick: tuple[Choice, ...], budget: int) -> bool:
    return sum(c.nbytes for c in pick) <= budget


@given(
    st.lists(st.tuples(st.integers(1, 50), st.floats(1e-6, 10)), min_size=1, max_size=5),
    st.floats(0, 1.1),
)
@settings(max_examples=40, deadline=None)
def test_the_answer_is_that_of_trying_everything(
    tensors: list[tuple[int, float]], share: float
) -> None:
    items = [Item(str(i), menu(256 * n, s)) for i, (n, s) in enumerate(tensors)]
    least = smallest_nbytes(items)
    most = sum(max(c.nbytes for c in item.choices) for item in items)
    budget = least + int(share * (most - least))
    best = by_trying(items, budget)
    exact, quick = allocate(items, budget), relaxed(items, budget)
    for found in (exact, quick):
        assert found.nbytes <= budget
        assert found.types.keys() == {item.name for item in items}
        chosen = [c for i in items for c in i.choices if c.type_name == found.types[i.name]]
        assert found.nbytes == sum(c.nbytes for c in chosen)
        assert found.loss == pytest.approx(sum(c.loss for c in chosen))
    assert exact.loss <= best * (1 + 1e-4) + 1e-12
    assert exact.loss <= quick.loss


def test_the_relaxation_is_optimal_for_the_size_that_it_reaches() -> None:
    items = [Item(str(i), menu(256 * (1 + i % 3), 1.5**i)) for i in range(6)]
    least = smallest_nbytes(items)
    for extra in range(0, 3000, 100):
        quick = relaxed(items, least + extra)
        if quick.nbytes == least + extra:
            assert quick.loss == pytest.approx(by_trying(items, quick.nbytes))
    assert relaxed(items, 1 << 30).types == dict.fromkeys("012345", "Q6_K")


def test_many_tensors_are_solved_and_stay_within_a_step_of_the_relaxation() -> None:
    items = [Item(f"blk.{i}", menu(1 << 20, 1 + (i * 37 % 101) ** 2)) for i in range(300)]
    budget = int(300 * (1 << 20) * 4.0 / 8)
    exact, quick = allocate(items, budget), relaxed(items, budget)
    assert exact.nbytes <= budget and exact.loss <= quick.loss
    assert quick.loss <= exact.loss * 1.02
    sensitive = max(items, key=lambda item: item.choices[0].loss)
    robust = min(items, key=lambda item: item.choices[0].loss)
    order = list(BITS)
    assert order.index(exact.types[sensitive.name]) > order.index(exact.types[robust.name])


def test_what_never_pays_is_not_on_the_hull() -> None:
    good = Choice("a", 100, 1.0), Choice("c", 300, 0.1)
    assert useful([*good, Choice("larger and worse", 400, 0.2)]) == list(good)
    assert useful([*good, Choice("above the line", 200, 0.9)]) == list(good)
    below = Choice("below the line", 200, 0.3)
    assert useful([good[1], below, good[0]]) == [good[0], below, good[1]]


def test_a_budget_below_the_smallest_types_is_refused() -> None:
    items = [Item("w", menu(2560, 1.0))]
    for solve in (allocate, relaxed):
        with pytest.raises(UsageError, match="smallest types take 840 bytes, and 839 are allowed"):
            solve(items, 839)


def test_tensors_that_lose_nothing_do_not_trouble_the_solver() -> None:
    items = [Item("a", menu(2560, 0.0)), Item("b", menu(2560, 0.0))]
    assert allocate(items, 1 << 20).loss == 0
