"""Residuals from Python: shapes, errors, and the same numbers as numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_ext import kernels
from nexus_ext.errors import UsageError


@pytest.fixture(autouse=True)
def _isa() -> object:
    before = kernels.current_isa()
    yield
    kernels.use_isa(before)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 300), st.integers(1, 80), st.integers(0, 90), st.integers(0, 2**32))
def test_adds_what_numpy_adds(n_out: int, n_in: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    residual = kernels.encode_residual(rng.normal(size=(n_out, n_in)).astype(np.float32), 2)
    x = rng.normal(size=n_in).astype(np.float32)
    channels = kernels.select_channels(x, k)
    assert sorted(channels) == sorted(np.argsort(-np.abs(x), kind="stable")[:k])
    start = rng.normal(size=n_out).astype(np.float32)
    wanted = start + residual.decode()[:, channels].astype(np.float64) @ x[channels]
    for isa in kernels.usable_isas():
        kernels.use_isa(isa)
        y = start.copy()
        kernels.add_residual(residual, x, channels, y)
        np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)


def test_encoding_is_as_good_as_an_exhaustive_search() -> None:
    rng = np.random.default_rng(1)
    matrix = rng.normal(size=(5, 256)).astype(np.float32)
    error = np.square(kernels.encode_residual(matrix).decode() - matrix).sum(axis=1)
    for row, seen in zip(matrix, error, strict=True):
        top = np.abs(row).max() / 7
        candidates = np.linspace(top / 32, top, 32)[:, None]
        rounded = np.clip(np.rint(row / candidates), -7, 7) * candidates
        assert seen <= np.square(rounded - row).sum(axis=1).min() * 1.0001


def test_the_wrong_thing_is_refused() -> None:
    with pytest.raises(UsageError, match="float32 matrix"):
        kernels.encode_residual(np.zeros((3, 3)))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="not finite"):
        kernels.encode_residual(np.full((3, 3), np.inf, np.float32))
    residual = kernels.encode_residual(np.ones((3, 4), np.float32))
    x, y = np.zeros(4, np.float32), np.zeros(3, np.float32)
    with pytest.raises(UsageError, match="channel 4 does not exist"):
        kernels.add_residual(residual, x, np.array([4], np.uint32), y)
    with pytest.raises(UsageError, match="shape"):
        kernels.add_residual(residual, y, np.array([0], np.uint32), y)
    with pytest.raises(UsageError, match="cannot run on this machine"):
        kernels.use_isa("mmx")


def test_says_which_and_why() -> None:
    assert kernels.usable_isas()[0] == "reference"
    assert kernels.why().startswith(kernels.current_isa())
    kernels.use_isa("reference")
    assert kernels.why().startswith("reference")
