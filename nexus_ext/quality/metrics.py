"""Perplexity, KL divergence and agreement of two models, from logits, with their uncertainties.

A prediction is one row of logits and the token that followed. Everything is natural logarithms
(nats) and float64 sums of float32 exponentials, as in llama.cpp's perplexity tool, whose figures
these reproduce: the standard error of a mean of n values is sqrt((E[x^2] - E[x]^2) / (n - 1)), that
of a perplexity is the perplexity times the error of its logarithm.

Neighbouring predictions of one window are not independent, which makes these standard errors too
small; the bootstrap here draws whole windows and gives the more careful interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

# A reference probability below exp(-16) adds nothing that is seen to a divergence: 150,000 of them
# add up to less than 2 % of probability. llama.cpp draws the line at the same place.
LOG_FLOOR = -16.0
_LEVELS = 65535


@dataclass(frozen=True, slots=True)
class Reference:
    """The distributions of one block of predictions of the reference model, to be compared with.

    Log-probabilities above the floor are kept as 16-bit steps between the smallest and the largest
    of a row: at most 0.00013 from the value.
    """

    nll: Doubles  # (n,) of the tokens that followed, exact
    top: npt.NDArray[np.int64]  # (n,) most likely token
    lowest: Floats  # (n,) log-probability of code 0
    step: Floats  # (n,)
    kept: npt.NDArray[np.bool_]  # (n, n_vocab) above the floor
    codes: npt.NDArray[np.uint16]  # (number of kept,) row by row


def log_normalizers(logits: Floats) -> tuple[Floats, Doubles]:
    """Return (largest logit, log of the sum of exp(logit - largest)) for each row of (n, vocab)."""
    largest = logits.max(axis=1)
    sums = np.exp(logits - largest[:, None]).sum(axis=1, dtype=np.float64)
    return largest, np.log(sums)


def negative_log_likelihoods(logits: Floats, targets: npt.NDArray[np.int64]) -> Doubles:
    """Return -log p(target), shape (n,), for logits (n, n_vocab) and targets (n,)."""
    largest, log_sums = log_normalizers(logits)
    chosen = logits[np.arange(len(targets)), targets]
    return log_sums - (chosen - largest).astype(np.float64)


def reference_of(logits: Floats, targets: npt.NDArray[np.int64]) -> Reference:
    """Return what comparing with these predictions needs. Arguments as above."""
    largest, log_sums = log_normalizers(logits)
    rows = np.arange(len(targets))
    log_p = logits - (largest + log_sums.astype(np.float32))[:, None]
    nll = log_sums - (logits[rows, targets] - largest).astype(np.float64)
    kept = log_p > LOG_FLOOR
    high = -log_sums.astype(np.float32)
    lowest = np.where(kept, log_p, high[:, None]).min(axis=1)
    step = (high - lowest) / np.float32(_LEVELS)
    safe = np.where(step > 0, step, np.float32(1))
    codes = np.rint((log_p - lowest[:, None]) / safe[:, None])[kept]
    return Reference(
        nll=nll,
        top=logits.argmax(axis=1),
        lowest=lowest,
        step=step,
        kept=kept,
        codes=np.clip(codes, 0, _LEVELS).astype(np.uint16),
    )


@dataclass(frozen=True, slots=True)
class Scores:
    """One value for each prediction, in the order of the text; (n,) arrays."""

    nll: Doubles  # of the model
    nll_reference: Doubles
    kl: Doubles  # KL(reference || model)
    same_top: npt.NDArray[np.bool_]

    @property
    def p_difference(self) -> Doubles:
        """Probability of the token that followed: model minus reference."""
        return np.exp(-self.nll) - np.exp(-self.nll_reference)

    @staticmethod
    def joined(parts: list[Scores]) -> Scores:
        return Scores(
            nll=np.concatenate([p.nll for p in parts]),
            nll_reference=np.concatenate([p.nll_reference for p in parts]),
            kl=np.concatenate([p.kl for p in parts]),
            same_top=np.concatenate([p.same_top for p in parts]),
        )


def compare(logits: Floats, targets: npt.NDArray[np.int64], reference: Reference) -> Scores:
    """Score a block of predictions of the model against those of the reference.

    KL(P || Q) = sum of P (log P - log Q) over the tokens above the floor of P.
    """
    largest, log_sums = log_normalizers(logits)
    rows = np.arange(len(targets))
    nll = log_sums - (logits[rows, targets] - largest).astype(np.float64)
    owner = np.nonzero(reference.kept)[0]
    log_p = reference.step[owner] * reference.codes + reference.lowest[owner]
    log_q = logits[reference.kept] - (largest + log_sums.astype(np.float32))[owner]
    terms = np.exp(log_p) * (log_p - log_q)
    kl: Doubles = np.bincount(owner, weights=terms, minlength=len(targets)).astype(np.float64)
    return Scores(nll, reference.nll, kl, logits.argmax(axis=1) == reference.top)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number and its standard error; `low` and `high` are a 95 % bootstrap interval if made."""

    value: float
    error: float
    low: float | None = None
    high: float | None = None


def mean(values: npt.NDArray[np.floating]) -> Estimate:
    """Return the mean and its standard error (0 for ten values or fewer, as llama.cpp says)."""
    n = len(values)
    average = float(np.mean(values, dtype=np.float64))
    variance = float(np.mean(np.square(values, dtype=np.float64))) - average * average
    return Estimate(average, math.sqrt(variance / (n - 1)) if n > 10 and variance > 0 else 0.0)


def perplexity(nll: Doubles) -> Estimate:
    """Return exp(mean nll) and its standard error."""
    log = mean(nll)
    value = math.exp(log.value)
    return Estimate(value, value * log.error)


def log_ratio(scores: Scores) -> Estimate:
    """Return ln(perplexity / reference's), whose errors partly cancel: both read one text."""
    a, b = mean(scores.nll), mean(scores.nll_reference)
    n = len(scores.nll)
    together = float(np.mean(scores.nll * scores.nll_reference)) - a.value * b.value
    variance = a.error**2 + b.error**2 - 2 * together / (n - 1) if n > 10 else 0.0
    return Estimate(a.value - b.value, math.sqrt(max(variance, 0.0)))


def share(flags: npt.NDArray[np.bool_]) -> Estimate:
    """Return the share of true ones, and its binomial standard error."""
    p, n = float(np.mean(flags)), len(flags)
    return Estimate(p, math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else 0.0)


def bootstrap(
    values: npt.NDArray[np.floating],
    n_windows: int,
    statistic: Callable[[npt.NDArray[np.floating]], float],
    *,
    n_draws: int = 500,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the 95 % percentile interval of a statistic, drawing whole windows.

    `values` has the same number of entries for each window, window by window.
    """
    blocks = values.reshape(n_windows, -1)
    draws = np.random.default_rng(seed).integers(0, n_windows, (n_draws, n_windows))
    found = [statistic(blocks[draw].ravel()) for draw in draws]
    return float(np.quantile(found, 0.025)), float(np.quantile(found, 0.975))
