"""Sizes: what people write is read as memory tools mean it, and printed so that it reads back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus_ext.errors import UsageError
from nexus_ext.units import GIB, KIB, MAX_BYTES, MIB, TIB, format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("4G", 4 * GIB),
        ("4g", 4 * GIB),
        ("4GB", 4 * GIB),
        ("4 GiB", 4 * GIB),
        ("512M", 512 * MIB),
        ("1.5GiB", 3 * GIB // 2),
        ("64k", 64 * KIB),
        ("2T", 2 * TIB),
        ("1048576", MIB),
        ("12B", 12),
        ("0", 0),
        (" 7 ", 7),
        ("0.1K", 102),
        (str(MAX_BYTES), MAX_BYTES),
    ],
)
def test_sizes_are_binary_in_every_spelling(text: str, n_bytes: int) -> None:
    assert parse_bytes(text) == n_bytes


@pytest.mark.parametrize(
    "text",
    ["", " ", "G", "4X", "-1G", "+1", "1e9", "nan", "inf", "1,5G", "1.G", ".5G", "4GG", "4 G B",
     "0x10", "1_000", "\u0664G", "4\u212a", "1" * 30, "9223372036854775808", "8388608T", "4iB"],
)  # fmt: skip
def test_what_is_no_size_is_refused_by_name(text: str) -> None:
    with pytest.raises(UsageError, match="--ram is"):
        parse_bytes(text, what="--ram")


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (MIB - 1, "1.0 MiB"),
        (GIB - 1, "1.0 GiB"),
        (3 * GIB // 2, "1.5 GiB"),
        (2000 * TIB, "2000.0 TiB"),
        (-MIB, "-1.0 MiB"),
        (1023.7, "1.0 KiB"),
    ],
)
def test_sizes_are_printed_in_the_largest_unit_that_fits(n_bytes: float, text: str) -> None:
    assert format_bytes(n_bytes) == text


@given(st.integers(0, 1 << 50))
def test_a_printed_size_reads_back_to_within_its_decimal(n_bytes: int) -> None:
    assert abs(parse_bytes(format_bytes(n_bytes)) - n_bytes) <= 0.05 * max(n_bytes, 20)


@given(st.text(max_size=12))
def test_any_text_is_a_size_or_a_usage_error(text: str) -> None:
    try:
        assert 0 <= parse_bytes(text) <= MAX_BYTES
    except UsageError as error:
        assert error.hint
