"""The figures of a comparison, from the scores of its predictions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from nexus_ext.quality.metrics import (
    Doubles,
    Estimate,
    Scores,
    bootstrap,
    log_ratio,
    mean,
    perplexity,
    share,
)

PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9)


@dataclass(frozen=True, slots=True)
class QualityReport:
    """How the predictions of a model differ from those of its reference on one text."""

    n_windows: int
    n_ctx: int
    n_predictions: int
    perplexity: Estimate
    reference_perplexity: Estimate
    log_perplexity_ratio: Estimate  # ln(model / reference)
    kl_mean: Estimate  # nats
    kl_p99: Estimate  # no standard error, an interval only
    kl_max: float
    kl_percentiles: dict[str, float]
    p_difference_rms: Estimate  # of the probability of the token that followed
    same_top: Estimate  # share of predictions with the same most likely token


def summarize(scores: Scores, *, n_windows: int, n_ctx: int, seed: int = 0) -> QualityReport:
    """Return the report; intervals come from drawing windows with replacement."""

    def interval(
        estimate: Estimate,
        values: npt.NDArray[np.floating],
        statistic: Callable[[npt.NDArray[np.floating]], float],
    ) -> Estimate:
        if n_windows < 2:
            return estimate
        low, high = bootstrap(values, n_windows, statistic, seed=seed)
        return replace(estimate, low=low, high=high)

    def average(values: npt.NDArray[np.floating]) -> float:
        return float(np.mean(values))

    def p99(values: npt.NDArray[np.floating]) -> float:
        return float(np.percentile(values, 99))

    def exp_mean(values: npt.NDArray[np.floating]) -> float:
        return math.exp(average(values))

    squared: Doubles = np.square(scores.p_difference)
    square = mean(squared)
    rms = math.sqrt(square.value)
    difference = scores.nll - scores.nll_reference
    agreement = scores.same_top.astype(np.float64)
    return QualityReport(
        n_windows=n_windows,
        n_ctx=n_ctx,
        n_predictions=len(scores.nll),
        perplexity=interval(perplexity(scores.nll), scores.nll, exp_mean),
        reference_perplexity=interval(
            perplexity(scores.nll_reference), scores.nll_reference, exp_mean
        ),
        log_perplexity_ratio=interval(log_ratio(scores), difference, average),
        kl_mean=interval(mean(scores.kl), scores.kl, average),
        kl_p99=interval(Estimate(p99(scores.kl), 0.0), scores.kl, p99),
        kl_max=float(scores.kl.max()),
        kl_percentiles={f"{p:g}": float(np.percentile(scores.kl, p)) for p in PERCENTILES},
        p_difference_rms=Estimate(rms, 0.5 * square.error / rms if rms > 0 else 0.0),
        same_top=interval(share(scores.same_top), agreement, average),
    )
