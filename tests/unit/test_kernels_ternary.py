"""Packed matrices from Python: the values of gguf's own decoder, ggml's bits, errors."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from nexus_ext import kernels
from nexus_ext.errors import UsageError


@pytest.mark.parametrize("type_name", ["tq1_0", "tq2_0"])
def test_values_are_those_of_the_format(type_name: str) -> None:
    kind = GGMLQuantizationType[type_name.upper()]
    rng = np.random.default_rng(5)
    nbytes = {"tq1_0": 54, "tq2_0": 66}[type_name]
    blocks = rng.integers(0, 256, (13, 3, nbytes), dtype=np.uint8)
    scales = rng.normal(size=(13, 3)).astype(np.float16)
    blocks[:, :, -2:] = scales.view(np.uint8).reshape(13, 3, 2)
    rows = blocks.reshape(13, -1)
    packed = kernels.PackedMatrix(type_name, rows, 768)
    np.testing.assert_array_equal(packed.unpack(), dequantize(rows, kind))


def test_products_are_close_to_those_of_the_unrounded() -> None:
    rng = np.random.default_rng(6)
    rows = rng.integers(0, 256, (70, 2 * 18), dtype=np.uint8)
    rows.reshape(70, 2, 18)[:, :, :2] = np.frombuffer(np.float16(0.5).tobytes(), np.uint8)
    packed = kernels.PackedMatrix("q2_0", rows, 128)
    x = rng.normal(size=(3, 128)).astype(np.float32)
    wanted = x @ packed.unpack().T
    assert np.abs(packed.multiply(x) - wanted).max() < 0.02 * np.abs(wanted).max()


def test_other_sizes_are_refused() -> None:
    with pytest.raises(UsageError, match="no tq2_0 matrix of 300 columns"):
        kernels.PackedMatrix("tq2_0", np.zeros((8, 66), np.uint8), 300)
    with pytest.raises(UsageError, match="no q4_0 matrix"):
        kernels.PackedMatrix("q4_0", np.zeros((8, 18), np.uint8), 32)


@pytest.mark.parametrize("type_name", list(kernels.TERNARY))
def test_rows_as_they_are_stored_give_the_same_bits(type_name: str) -> None:
    rng = np.random.default_rng(8)
    nbytes = {"tq1_0": 54, "tq2_0": 66, "q2_0": 18, "q1_0": 18}[type_name]
    rows = rng.integers(0, 256, (21, 512 // {66: 256, 54: 256}.get(nbytes, 128), nbytes), np.uint8)
    n_in = rows.shape[1] * {"tq1_0": 256, "tq2_0": 256, "q2_0": 64, "q1_0": 128}[type_name]
    at = -2 if type_name.startswith("tq") else 0
    rows[:, :, at : at + 2 or None] = np.frombuffer(np.float16(0.25).tobytes(), np.uint8)
    rows = rows.reshape(21, -1)
    x = rng.normal(size=(3, n_in)).astype(np.float32)
    packed, stored = (
        kernels.PackedMatrix(type_name, rows, n_in),
        kernels.StoredMatrix(type_name, rows, n_in),
    )
    seen = stored.multiply(x)
    assert np.array_equal(seen.view(np.uint32), packed.multiply(x).view(np.uint32))
    part = np.zeros_like(seen)
    stored.multiply_into(stored.activate(x), part, 3, 17)
    assert np.array_equal(part[:, 3:17], seen[:, 3:17]) and not part[:, :3].any()
    with pytest.raises(UsageError, match="matrix of 7 columns"):
        kernels.StoredMatrix(type_name, rows, 7)


def test_which_types_have_a_kernel_for_stored_rows() -> None:
    before = kernels.current_isa()
    try:
        kernels.use_isa("reference")
        assert all(kernels.stored_is_fast(name) for name in kernels.TERNARY)
        assert not kernels.stored_is_fast("q4_0")
    finally:
        kernels.use_isa(before)


def test_the_rate_of_dot_products_is_measured_where_it_is_known() -> None:
    before = kernels.current_isa()
    try:
        for isa in kernels.usable_isas():
            kernels.use_isa(isa)
            assert (kernels.dots_per_second() > 1e6) == (isa == "avx512-vnni")
    finally:
        kernels.use_isa(before)
