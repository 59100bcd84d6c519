"""The arithmetic of perplexity and divergence, against the definitions written out in float64."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_ext.errors import UsageError
from nexus_ext.quality import metrics
from nexus_ext.quality.report import summarize
from nexus_ext.quality.text import windows


def made(
    n: int, n_vocab: int, seed: int, spread: float = 4.0
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, spread, (n, n_vocab)).astype(np.float32)
    other = logits + rng.normal(0, 0.3, (n, n_vocab)).astype(np.float32)
    return logits, other, rng.integers(0, n_vocab, n)


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    x = logits.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(axis=1, keepdims=True)))


@given(st.integers(1, 20), st.integers(2, 300), st.integers(0, 99), st.floats(0.01, 30))
@settings(max_examples=60, deadline=None)
def test_nll_and_divergence_are_those_of_the_definition(
    n: int, n_vocab: int, seed: int, spread: float
) -> None:
    reference, model, targets = made(n, n_vocab, seed, spread)
    p, q = log_softmax(reference), log_softmax(model)
    rows = np.arange(n)
    scores = metrics.compare(model, targets, metrics.reference_of(reference, targets))
    np.testing.assert_allclose(scores.nll, -q[rows, targets], atol=1e-4, rtol=1e-5)
    np.testing.assert_allclose(scores.nll_reference, -p[rows, targets], atol=1e-4, rtol=1e-5)
    kl = (np.exp(p) * (p - q)).sum(axis=1)
    # 16-bit steps over at most 16 nats, and the tail below exp(-16) left out
    np.testing.assert_allclose(scores.kl, kl, atol=3e-4, rtol=1e-3)
    np.testing.assert_array_equal(scores.same_top, reference.argmax(axis=1) == model.argmax(axis=1))


def test_a_model_is_no_distance_from_itself() -> None:
    logits, _, targets = made(300, 1000, 1)
    scores = metrics.compare(logits, targets, metrics.reference_of(logits, targets))
    assert abs(scores.kl.mean()) < 1e-5
    assert scores.same_top.all()
    np.testing.assert_array_equal(scores.nll, scores.nll_reference)
    ratio = metrics.log_ratio(scores)
    assert ratio.value == 0 and ratio.error == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("value", [0.0, -7.5])
def test_equal_logits_are_a_uniform_distribution(value: float) -> None:
    logits = np.full((3, 64), value, np.float32)
    targets = np.array([0, 31, 63])
    reference = metrics.reference_of(logits, targets)
    assert (reference.step == 0).all()
    scores = metrics.compare(logits, targets, reference)
    np.testing.assert_allclose(scores.nll, math.log(64), rtol=1e-6)
    np.testing.assert_allclose(scores.kl, 0, atol=1e-6)


def test_a_token_that_the_reference_rules_out_has_its_exact_likelihood() -> None:
    logits = np.zeros((1, 8), np.float32)
    logits[0, 3] = 100.0
    reference = metrics.reference_of(logits, np.array([5]))
    assert reference.nll[0] == pytest.approx(100.0)
    assert reference.kept.sum() == 1  # nothing else is above exp(-16)


def test_uncertainties_are_those_of_the_mean_of_a_sample() -> None:
    values = np.random.default_rng(3).normal(2.0, 0.5, 400)
    found = metrics.mean(values)
    assert found.value == pytest.approx(values.mean())
    assert found.error == pytest.approx(values.std(ddof=1) / math.sqrt(400), rel=1e-9)
    ppl = metrics.perplexity(values)
    assert ppl.value == pytest.approx(math.exp(values.mean()))
    assert ppl.error == pytest.approx(ppl.value * found.error)
    flags = np.arange(400) < 100
    assert metrics.share(flags).value == 0.25
    assert metrics.share(flags).error == pytest.approx(math.sqrt(0.25 * 0.75 / 399))


def test_the_error_of_a_ratio_is_that_of_the_differences() -> None:
    rng = np.random.default_rng(4)
    base = rng.exponential(2.0, 1000)
    nll = base + rng.normal(0.01, 0.05, 1000)
    scores = metrics.Scores(nll, base, np.zeros(1000), np.ones(1000, np.bool_))
    ratio = metrics.log_ratio(scores)
    difference = nll - base
    assert ratio.value == pytest.approx(difference.mean())
    assert ratio.error == pytest.approx(difference.std(ddof=1) / math.sqrt(1000), rel=1e-6)


def test_drawing_windows_sees_what_tokens_of_a_window_have_in_common() -> None:
    rng = np.random.default_rng(5)
    n_windows, n = 40, 50
    alone = rng.normal(0, 1, n_windows * n)
    together = np.repeat(rng.normal(0, 1, n_windows), n)

    def width(values: npt.NDArray[np.float64]) -> float:
        low, high = metrics.bootstrap(values, n_windows, lambda v: float(np.mean(v)))
        return high - low

    assert width(alone) == pytest.approx(2 * 1.96 / math.sqrt(n_windows * n), rel=0.3)
    assert width(together) == pytest.approx(2 * 1.96 / math.sqrt(n_windows), rel=0.3)


def test_a_report_has_every_figure_in_its_interval() -> None:
    reference, model, targets = made(400, 200, 6)
    scores = metrics.compare(model, targets, metrics.reference_of(reference, targets))
    report = summarize(scores, n_windows=8, n_ctx=102)
    for e in (report.perplexity, report.kl_mean, report.kl_p99, report.same_top):
        assert e.low is not None and e.high is not None
        assert e.low <= e.value <= e.high
    assert report.kl_mean.value < report.kl_p99.value < report.kl_max
    assert report.kl_percentiles["99"] == report.kl_p99.value
    assert report.n_predictions == 400
    assert summarize(scores, n_windows=1, n_ctx=802).kl_mean.low is None


@pytest.mark.parametrize("n_ctx", [4, 5, 512])
def test_windows_are_cut_as_llama_cpp_cuts_them(n_ctx: int) -> None:
    tokens = list(range(10, 10 + 3 * n_ctx + 2))
    found = windows(tokens, n_ctx, bos=1)
    assert len(found) == 3
    for i, window in enumerate(found):
        assert window.tokens == (1, *tokens[i * n_ctx + 1 : (i + 1) * n_ctx])
        assert window.first == n_ctx // 2
        assert window.n_scored == len(window.targets) == n_ctx - 1 - n_ctx // 2
    assert windows(tokens, n_ctx, bos=None)[1].tokens[0] == tokens[n_ctx]
    assert len(windows(tokens, n_ctx, bos=1, most=2)) == 2


def test_a_text_that_is_too_short_is_refused() -> None:
    with pytest.raises(UsageError, match="has 1023 tokens, and windows of 512 need at least 1024"):
        windows(list(range(1023)), 512, bos=1)
    with pytest.raises(UsageError, match="leaves nothing to score"):
        windows(list(range(1023)), 3, bos=1)
