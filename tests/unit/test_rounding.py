"""Rounding with compensation, on a grid of integers: what it promises, without any block format."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from nexus_ext.quality.rounding import (
    DAMPING,
    SHRINKAGE,
    Codes,
    Floats,
    Grid,
    feedback,
    rounded,
)

LEVELS = np.arange(-8, 8, dtype=np.float32)


def inputs(n: int, n_vectors: int, seed: int = 1) -> Floats:
    """Vectors whose channels go together, as activations do."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(n_vectors, max(1, n // 4))) @ rng.normal(size=(max(1, n // 4), n))
    return (common + 0.3 * rng.normal(size=(n_vectors, n))).astype(np.float32)


def on_integers(
    w: Floats,
    gram: Floats,
    n_block: int,
    levels: Floats = LEVELS,
    sweeps: int = 0,
    scales: tuple[float, ...] = (1.0,),
) -> Floats:
    """Round W (n_out, n_in) on grids that have one of these scales."""
    found = np.zeros_like(w.T)

    def propose(begin: int, targets: Floats) -> list[Grid]:
        ones = np.ones_like(targets)
        return [Grid(0 * ones, scale * ones, ones.astype(np.uint8)) for scale in scales]

    def put(begin: int, pick: npt.NDArray[np.intp], codes: Codes) -> None:
        found[begin : begin + len(codes)] = levels[codes] * np.array(scales, np.float32)[pick]

    known = feedback(gram, n_block)
    rounded(np.ascontiguousarray(w.T), known, n_block, levels, propose, put, sweeps)
    return found.T


def weights(n_out: int, n_in: int, seed: int) -> Floats:
    return np.random.default_rng(seed).normal(0, 2, (n_out, n_in)).astype(np.float32)


def cost(errors: npt.NDArray[np.float32], gram: Floats) -> float:
    e = errors.astype(np.float64)
    return float(np.einsum("ri,ij,rj->", e, gram.astype(np.float64), e))


def damped(gram: Floats) -> Floats:
    diagonal = gram.diagonal()
    return gram + np.diag(SHRINKAGE * diagonal + DAMPING * diagonal.mean()).astype(np.float32)


def products(n: int, n_vectors: int = 300) -> Floats:
    x = inputs(n, n_vectors)
    x *= np.random.default_rng(9).uniform(0.5, 2, n).astype(np.float32)
    gram: Floats = x.T @ x
    return gram


def test_feedback_splits_the_cost_of_errors_into_squares() -> None:
    gram = products(24)
    known = feedback(gram, 8)
    e = weights(5, 24, 2)
    there = e[:, known.order]
    terms = np.square(there + there @ known.weights) * known.remaining
    assert terms.sum() == pytest.approx(cost(e, damped(gram)), rel=1e-4)
    assert not np.tril(known.weights).any()


def test_large_inputs_come_first_but_blocks_stay_together() -> None:
    known = feedback(np.diag(np.array([1, 2, 9, 3, 5, 6], np.float32)), 2)
    assert known.order.tolist() == [2, 3, 5, 4, 1, 0]
    np.testing.assert_array_equal(known.products.argmax(axis=1), np.arange(6))


def test_channels_that_have_nothing_in_common_are_rounded_to_nearest() -> None:
    w = 2 * weights(7, 32, 3)
    for gram in (np.eye(32), np.diag(np.arange(1.0, 33.0)), np.zeros((32, 32))):
        for sweeps in (0, 2):
            found = on_integers(w, gram.astype(np.float32), 8, sweeps=sweeps)
            np.testing.assert_array_equal(found, np.clip(np.rint(w), -8, 7))


@pytest.mark.parametrize("n_block", [8, 32, 64])
def test_compensation_costs_less_than_nearest_and_sweeps_less_again(n_block: int) -> None:
    w, gram = weights(20, 64, 4), products(64)
    costs = [cost(w - np.rint(w), damped(gram))]
    for sweeps in range(4):
        costs.append(cost(w - on_integers(w, gram, n_block, sweeps=sweeps), damped(gram)))
    assert costs[1] < 0.6 * costs[0]
    assert costs[4] <= costs[3] <= costs[2] < costs[1]


def test_each_column_is_the_best_answer_to_the_errors_before_it() -> None:
    w, gram = weights(1, 6, 5), products(6, 50)
    known = feedback(gram, 6)
    found = on_integers(w, gram, 6)
    e = (w - found)[:, known.order]
    for j, column in enumerate(known.order):
        # What column j costs when all later columns adapt as if they were not rounded.
        costs = [abs(w[0, column] - level + e[0, :j] @ known.weights[:j, j]) for level in LEVELS]
        assert LEVELS[int(np.argmin(costs))] == found[0, column]


def test_after_sweeps_no_single_column_could_do_better() -> None:
    w, gram = weights(6, 32, 6), products(32)
    found = on_integers(w, gram, 16, sweeps=50)
    least = [cost(row, damped(gram)) for row in (w - found)[:, None]]
    for column in range(32):
        for move in (-1, 1):
            tried = found.copy()
            tried[:, column] = np.clip(tried[:, column] + move, -8, 7)
            for row, before in zip((w - tried)[:, None], least, strict=True):
                assert cost(row, damped(gram)) >= before * (1 - 1e-5)


def test_each_row_takes_the_proposal_that_suits_it() -> None:
    gram = products(32)
    w = np.concatenate([weights(8, 32, 7), 0.2 * weights(8, 32, 8)])
    fine, coarse, both = (
        np.array([cost(row, damped(gram)) for row in (w - found)[:, None]])
        for found in (
            on_integers(w, gram, 32, scales=scales) for scales in ((0.1,), (1.0,), (0.1, 1.0))
        )
    )
    np.testing.assert_allclose(both, np.minimum(fine, coarse), rtol=1e-4)
    assert (coarse < fine)[:8].all() and (fine < coarse)[8:].all()


def test_uneven_levels_are_rounded_to_the_nearest_of_them() -> None:
    levels = np.array([-9, -2, 0, 1, 5], np.float32)
    w = 2.5 * weights(9, 16, 6)
    found = on_integers(w, np.eye(16, dtype=np.float32), 16, levels, sweeps=1)
    nearest = levels[np.abs(w[..., None] - levels).argmin(axis=-1)]
    np.testing.assert_array_equal(found, nearest)


def test_a_block_without_a_step_keeps_the_codes_it_had() -> None:
    codes = np.arange(32, dtype=np.uint8).reshape(8, 4) % 16
    seen = []

    def propose(begin: int, targets: Floats) -> list[Grid]:
        zeros = np.zeros_like(targets)
        return [Grid(zeros, zeros, codes)]

    gram = np.diag(np.arange(1, 9)).astype(np.float32)
    rounded(
        np.ones((8, 4), np.float32),
        feedback(gram, 8),
        8,
        LEVELS,
        propose,
        lambda begin, pick, found: seen.append(found),
    )
    np.testing.assert_array_equal(seen[0], codes)
