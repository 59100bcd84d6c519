"""Accuracy of predictors: the two numbers that papers mix, on cases that can be counted by hand."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nexus_ext.routing.prediction import (
    CONTROL,
    GATE,
    accuracies,
    accuracy,
    popular,
    previous,
)

DECISIONS = [[0, 1], [1, 2], [2, 1], [0, 3]]


def test_previous_is_what_the_token_before_used() -> None:
    found = accuracy("previous", 5, previous(DECISIONS), DECISIONS)
    assert found is not None
    assert (found.layer, found.n_tokens) == (5, 3)
    assert found.slots == (1 + 2 + 0) / 6
    assert found.exact == 1 / 3


def test_popular_is_what_was_used_most_before_the_token() -> None:
    assert popular(DECISIONS, 4) == [(), [0, 1], [1, 0], [1, 2]]


def test_predictions_that_are_missing_are_not_compared() -> None:
    assert accuracy("gate", 0, DECISIONS[:-1], DECISIONS) is None
    assert accuracy("gate", 0, [[]] * 4, DECISIONS) is None
    assert accuracies(0, 4, [], {}) == []


@given(st.lists(st.lists(st.integers(0, 7), min_size=2, max_size=2, unique=True), min_size=2))
def test_a_control_is_always_right_and_shares_are_shares(decisions: list[list[int]]) -> None:
    wrong = [[8, 9] for _ in decisions]
    found = {a.predictor: a for a in accuracies(1, 8, decisions, {CONTROL: decisions, GATE: wrong})}
    assert (found[CONTROL].slots, found[CONTROL].exact) == (1.0, 1.0)
    assert (found[GATE].slots, found[GATE].exact) == (0.0, 0.0)
    assert all(0 <= a.exact <= a.slots <= 1 for a in found.values())
