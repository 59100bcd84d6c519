"""Kernels of ours compute only what comes out as in ggml: where tests may do without them."""

from __future__ import annotations

import pytest

from nexus_ext import kernels
from nexus_ext.runtime import backend, ggml


def needs_same_bits(same: object, what: str) -> None:
    """Skip a test where ggml sums in another order, or this CPU has no kernels of ours.

    With a tested version of ggml on x86 ours have had its bits: then it fails, since a kernel that
    has become wrong looks just like a ggml that is different.
    """
    if same:
        return
    installed = backend.llama_cpp_version()
    tested = backend.TESTED_VERSIONS.get(installed) == ggml.version()
    if tested and kernels.current_isa().startswith("avx"):
        pytest.fail(f"{what} has lost the bits of ggml {ggml.version()}")
    pytest.skip(f"{what}: this ggml sums in another order, or {kernels.why()}")
