"""The comparison of logits finds every bit that differs, and says where."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus_ext.errors import UsageError
from nexus_ext.runtime.verify import Comparison, compare_logits

N_VOCAB, N_PROMPT, N_TOKENS = 8, 3, 5
Rows = npt.NDArray[np.float32]


@pytest.fixture
def rows() -> Rows:
    return np.arange(N_TOKENS * N_VOCAB, dtype=np.float32).reshape(N_TOKENS, N_VOCAB)


def compare(directory: Path, a: Rows, b: Rows) -> Comparison:
    for name, data in (("a", a), ("b", b)):
        data.tofile(directory / name)
    tokens = tuple(range(100, 100 + N_TOKENS))
    return compare_logits(
        directory / "a", directory / "b", n_vocab=N_VOCAB, n_prompt=N_PROMPT, tokens=tokens
    )


def test_equal_files_are_identical(tmp_path: Path, rows: Rows) -> None:
    found = compare(tmp_path, rows, rows)
    assert found.identical
    assert (found.n_positions, found.n_values) == (N_TOKENS, N_TOKENS * N_VOCAB)
    assert found.n_values_different == 0


@given(position=st.integers(0, N_TOKENS - 1), value=st.integers(0, N_VOCAB - 1))
def test_one_bit_is_found_wherever_it_is(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    a = np.ones((N_TOKENS, N_VOCAB), np.float32)
    b = a.copy()
    b.view(np.uint32)[position, value] ^= 1
    found = compare(tmp_path_factory.mktemp("bits"), a, b)
    assert found.first is not None
    assert found.first.position == position
    assert found.first.token == 100 + position
    assert found.first.phase == ("prompt" if position < N_PROMPT else "decode")
    assert found.first.n_different == found.n_values_different == 1
    assert 0 < found.max_abs_diff < 1e-6


def test_the_first_difference_and_all_of_them_are_told_apart(tmp_path: Path, rows: Rows) -> None:
    other = rows.copy()
    other[1, 2:4] += 1
    other[4, 0] -= 8
    found = compare(tmp_path, rows, other)
    assert found.first is not None
    assert (found.first.position, found.first.n_different, found.first.max_abs_diff) == (1, 2, 1.0)
    assert (found.n_positions_different, found.n_values_different) == (2, 3)
    assert found.max_abs_diff == 8.0


def test_a_sign_of_zero_is_a_difference_and_an_equal_nan_is_none(
    tmp_path: Path, rows: Rows
) -> None:
    rows[0, 0], rows[2, 2] = 0.0, np.nan
    other = rows.copy()
    assert compare(tmp_path, rows, other).identical
    other[0, 0] = -0.0
    assert not compare(tmp_path, rows, other).identical


def test_a_nan_on_one_side_is_not_hidden_by_a_later_number(tmp_path: Path, rows: Rows) -> None:
    other = rows.copy()
    other[0, 0], other[1, 1] = np.nan, 5.0
    found = compare(tmp_path, rows, other)
    assert found.n_values_different == 2
    assert math.isnan(found.max_abs_diff)


def test_files_of_another_size_are_refused(tmp_path: Path, rows: Rows) -> None:
    with pytest.raises(UsageError, match="not 5 rows of 8 logits"):
        compare(tmp_path, rows, rows[:-1])
