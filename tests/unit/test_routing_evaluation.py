"""Rankings of experts are compared by numbers that can be counted by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus_ext.errors import UsageError
from nexus_ext.routing import (
    RoutingTrace,
    TracedLayer,
    compare,
    decisions,
    follows,
    joined,
    mean_score,
    rank_popular,
    rank_previous,
    read_ahead,
    replay,
    score,
    split,
)

ROWS = [[0, 1], [1, 2], [2, 1], [0, 3], [3, 3]]  # the last token uses one expert


def trace_of(
    *layers: list[list[int]], n_experts: int = 4, passes: tuple[int, ...] = ()
) -> RoutingTrace:
    made = tuple(
        TracedLayer(i, n_experts, len(rows[0]), 100, 128, bytes(e for row in rows for e in row))
        for i, rows in enumerate(layers)
    )
    return RoutingTrace("f", "test", passes or (1,) * len(layers[0]), made)


TRACE = trace_of(ROWS)


def ranking(*rows: list[int]) -> np.ndarray:
    return np.array(rows)[:, None]


def test_slots_exact_sets_and_recall_are_counted_over_the_tokens_that_something_was_said_of() -> (
    None
):
    ranked = ranking([1, 0, 2], [1, 0, 2], [-1, -1, -1], [0, 1, 3], [3, 0, 1])
    [one] = score("mine", TRACE, ranked)
    assert (one.predictor, one.layer, one.n_tokens) == ("mine", 0, 4)
    assert one.slots == (2 + 1 + 1 + 1) / 7
    assert one.exact == 2 / 4  # the first token; and the last, whose only expert was among them
    assert one.recall == ((1 + 1 + 1 + 1) / 7, 5 / 7, 7 / 7)


def test_nothing_said_is_no_score() -> None:
    nothing = np.full((5, 1, 2), -1)
    assert score("mine", TRACE, nothing) == []
    with pytest.raises(UsageError, match="nothing was predicted"):
        mean_score([])


def test_the_mean_is_over_layers() -> None:
    two = trace_of(ROWS, ROWS)
    ranked = np.concatenate([decisions(TRACE), np.full((5, 1, 2), 2)], axis=1)
    ranked[:, 1, 1] = 0
    a, b = score("mine", two, ranked)
    mean = mean_score([a, b])
    assert mean.slots == (a.slots + b.slots) / 2 and mean.layer == -1
    assert a.exact == 1.0 and a.slots == 1.0


def test_previous_says_nothing_where_a_text_begins() -> None:
    trace = replace(TRACE, passes=(2, 3))
    assert follows(trace).tolist() == [False, True, False, True, True]
    assert rank_previous(trace)[:, 0].tolist() == [[-1, -1], [0, 1], [-1, -1], [2, 1], [0, 3]]
    assert follows(TRACE).tolist() == [False, True, True, True, True]


def test_popular_is_learned_elsewhere() -> None:
    learned = trace_of([[2, 3], [2, 0], [2, 3]])
    assert rank_popular(learned, TRACE)[:, 0].tolist() == [[2, 3, 0, 1]] * 5


def test_a_trace_is_split_and_joined_again() -> None:
    trace = replace(trace_of(ROWS, ROWS), passes=(2, 3))
    a, b = split(trace, 0.4)
    assert (a.passes, b.passes) == ((2, 1), (2,))
    assert np.array_equal(np.concatenate([decisions(a), decisions(b)]), decisions(trace))
    assert joined([a, b]).layers == trace.layers
    assert joined([a, b]).passes == (2, 1, 2)
    for share in (0.0, 1.0):
        a, b = split(trace, share)
        assert a.n_tokens and b.n_tokens
    with pytest.raises(UsageError, match="cannot be split"):
        split(trace_of([[0]]), 0.5)


def test_traces_of_several_models_are_not_joined() -> None:
    for other in (
        replace(TRACE, fingerprint="g"),
        trace_of(ROWS, ROWS),
        trace_of(ROWS, n_experts=5),
    ):
        with pytest.raises(UsageError, match="two models"):
            joined([TRACE, other])
    with pytest.raises(UsageError, match="no trace"):
        joined([])


def test_reading_ahead_by_what_comes_true_leaves_no_miss_and_wastes_nothing() -> None:
    run = read_ahead("sure", TRACE, decisions(TRACE), slots=3)
    assert (run.uses, run.misses, run.wasted) == (9, 0, 0)
    assert run.hit_rate == 1.0 and run.useful > 0
    assert run.read_bytes == 100 * run.useful


def test_reading_ahead_what_is_not_used_is_wasted_and_evicted_first() -> None:
    rows = [[0], [1], [0], [1]]
    trace = trace_of(rows)
    wrong = ranking([3], [3], [3], [3])
    run = read_ahead("wrong", trace, wrong, slots=3)
    assert (run.useful, run.misses, run.wasted) == (0, 2, 1)  # 3 stays, for there is room
    full = read_ahead("wrong", trace, wrong, slots=1)
    assert (full.useful, full.misses, full.wasted) == (0, 4, 4)
    assert full.wasted_bytes == 400 and full.read_bytes == 800


def test_the_limit_is_of_each_layer_and_token() -> None:
    ranked = np.tile(np.array([0, 1, 2, 3]), (5, 1, 1))
    trace = trace_of([[0, 1, 2, 3]] * 5)
    assert read_ahead("all", trace, ranked, 4, limit=1).useful == 1
    assert read_ahead("all", trace, ranked, 4, limit=3).useful == 3
    assert read_ahead("all", trace, ranked, 4, limit=0).useful == 0


@given(st.lists(st.integers(0, 7), min_size=1), st.integers(1, 8))
def test_without_a_ranking_it_is_a_replay_of_lru(experts: list[int], slots: int) -> None:
    trace = trace_of([[expert] for expert in experts], n_experts=8)
    run = read_ahead("none", trace, None, slots)
    [[expected]] = replay(trace, ["lru"], [(slots,)])
    assert (run.misses, run.read_bytes) == (sum(expected.misses), expected.read_bytes)


def test_rankings_of_another_shape_and_too_few_slots_are_refused() -> None:
    for wrong in (np.zeros((5, 2, 2), int), np.zeros((4, 1, 2), int), np.zeros((5, 1), int)):
        with pytest.raises(UsageError, match="shape"):
            score("mine", TRACE, wrong)
        with pytest.raises(UsageError, match="shape"):
            read_ahead("mine", TRACE, wrong, 4)
    with pytest.raises(UsageError, match="1 slots"):
        read_ahead("none", TRACE, None, 1)


def test_a_comparison_says_all_of_it_as_text_and_as_json() -> None:
    compared = compare(TRACE, {"sure": decisions(TRACE), "previous": rank_previous(TRACE)})
    assert list(compared.ahead) == ["none", "sure", "previous"] and compared.slots == 2
    text = "\n".join(compared.lines())
    assert "100.0%" in text and "previous" in text and "LRU of 2 experts" in text
    document = compared.to_dict()
    assert {one["predictor"] for one in document["scores"]} == {"sure", "previous"}
    assert document["read_ahead"][0]["useful"] == 0
