"""Rounding with compensation, on a grid of integers: what it promises, without any block format."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from nexus_ext.quality.rounding import Codes, Feedback, Floats, Grid, feedback, rounded

LEVELS = np.arange(-8, 8, dtype=np.float32)


def inputs(n: int, n_vectors: int, seed: int = 1) -> Floats:
    """Vectors whose channels go together, as activations do."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(n_vectors, max(1, n // 4))) @ rng.normal(size=(max(1, n // 4), n))
    return (common + 0.3 * rng.normal(size=(n_vectors, n))).astype(np.float32)


def on_integers(w: Floats, order: Feedback, n_block: int, levels: Floats = LEVELS) -> Floats:
    """Round W (n_out, n_in) on a grid whose scales are all 1."""
    found = np.zeros_like(w.T)

    def grid(begin: int, targets: Floats) -> Grid:
        ones = np.ones_like(targets)
        return Grid(0 * ones, ones, np.zeros(targets.shape, np.uint8))

    def put(begin: int, codes: Codes) -> None:
        found[begin : begin + len(codes)] = levels[codes]

    rounded(np.ascontiguousarray(w.T), order, n_block, levels, grid, put)
    return found.T


def cost(errors: npt.NDArray[np.float32], gram: Floats) -> float:
    e = errors.astype(np.float64)
    return float(np.einsum("ri,ij,rj->", e, gram.astype(np.float64), e))


def test_feedback_splits_the_cost_of_errors_into_squares() -> None:
    x = inputs(24, 200)
    gram = x.T @ x
    order = feedback(gram, damping=0.01)
    damped = gram + 0.01 * gram.diagonal().mean() * np.eye(24)
    e = np.random.default_rng(2).normal(size=(5, 24)).astype(np.float32)
    terms = np.square(e + e @ order.weights) * order.remaining
    assert terms.sum() == pytest.approx(cost(e, damped), rel=1e-4)
    assert not np.tril(order.weights).any()


def test_channels_that_have_nothing_in_common_are_rounded_to_nearest() -> None:
    w = np.random.default_rng(3).normal(0, 3, (7, 32)).astype(np.float32)
    for gram in (np.eye(32), np.diag(np.arange(1.0, 33.0)), np.zeros((32, 32))):
        found = on_integers(w, feedback(gram.astype(np.float32)), 8)
        np.testing.assert_array_equal(found, np.clip(np.rint(w), -8, 7))


@pytest.mark.parametrize("n_block", [8, 32, 64])
def test_compensation_costs_less_than_nearest_and_blocks_do_not_matter(n_block: int) -> None:
    w = np.random.default_rng(4).normal(0, 2, (20, 64)).astype(np.float32)
    x = inputs(64, 300)
    gram = x.T @ x
    found = on_integers(w, feedback(gram), n_block)
    assert cost(w - found, gram) < 0.5 * cost(w - np.rint(w), gram)
    np.testing.assert_array_equal(found, on_integers(w, feedback(gram), 16))


def test_each_column_is_the_best_answer_to_the_errors_before_it() -> None:
    w = np.random.default_rng(5).normal(0, 2, (1, 6)).astype(np.float32)
    x = inputs(6, 50)
    order = feedback(x.T @ x)
    found = on_integers(w, order, 6)
    e = w - found
    for j in range(6):
        costs = []
        for level in LEVELS:
            tried = e.copy()
            tried[0, j] = w[0, j] - level
            # What column j costs when all later columns adapt as if they were not rounded.
            costs.append(abs(tried[0, j] + tried[0, :j] @ order.weights[:j, j]))
        assert LEVELS[int(np.argmin(costs))] == found[0, j]


def test_uneven_levels_are_rounded_to_the_nearest_of_them() -> None:
    levels = np.array([-9, -2, 0, 1, 5], np.float32)
    w = np.random.default_rng(6).normal(0, 5, (9, 16)).astype(np.float32)
    found = on_integers(w, feedback(np.eye(16, dtype=np.float32)), 16, levels)
    nearest = levels[np.abs(w[..., None] - levels).argmin(axis=-1)]
    np.testing.assert_array_equal(found, nearest)


def test_a_block_without_a_step_keeps_the_codes_it_had() -> None:
    codes = np.arange(32, dtype=np.uint8).reshape(8, 4) % 16
    seen = []

    def grid(begin: int, targets: Floats) -> Grid:
        zeros = np.zeros_like(targets)
        return Grid(zeros, zeros, codes)

    w = np.ones((8, 4), np.float32)
    gram = np.eye(8, dtype=np.float32)
    rounded(w, feedback(gram), 8, LEVELS, grid, lambda begin, found: seen.append(found))
    np.testing.assert_array_equal(seen[0], codes)
