"""What readers of GGUF refuse is not written."""

from __future__ import annotations

import pytest

from nexus_ext.formats.ggml_types import ggml_types
from nexus_ext.formats.gguf_encode import TensorSpec, encode_header, encode_value


def test_what_readers_refuse_is_not_encoded() -> None:
    f32, q8 = ggml_types()[0], ggml_types()[8]
    for bad, message in (
        (TensorSpec("", (4,), f32), "empty"),
        (TensorSpec("x" * 64, (4,), f32), "too long"),
        (TensorSpec("x", (), f32), "0 dimensions"),
        (TensorSpec("x", (1,) * 5, f32), "5 dimensions"),
        (TensorSpec("x", (33,), q8), "do not fill blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            encode_header({}, [bad])
    with pytest.raises(ValueError, match="twice"):
        encode_header({}, [TensorSpec("x", (4,), f32)] * 2)
    with pytest.raises(TypeError, match="mixes"):
        encode_value([1, "a"])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="dict has no place"):
        encode_value([{}])  # type: ignore[list-item]
