"""Plugins in C, compiled by a test against the header that is installed."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest

import nexus_ext
from nexus_ext.policies import NativePolicy

LRU = """
static int victims(void *state, const nxp_cache_ask *ask, int32_t *out) {
    (void)state;
    for (uint32_t k = 0; k < ask->n_wanted; k++) {
        uint32_t oldest = ask->n_candidates;
        for (uint32_t i = 0; i < ask->n_candidates; i++) {
            int taken = 0;
            for (uint32_t j = 0; j < k; j++) taken |= out[j] == ask->experts[i];
            if (taken) continue;
            if (oldest == ask->n_candidates || ask->ages[i] > ask->ages[oldest]) oldest = i;
        }
        out[k] = ask->experts[oldest];
    }
    return 0;
}
nxp_cache_policy policy = {
    .head = NXP_HEAD(nxp_cache_policy, NXP_CACHE_POLICY, "my-lru"),
    .victims = victims,
};
"""


def compiled(directory: Path, code: str, name: str = "plugin") -> ctypes.CDLL:
    """Compile a plugin with all warnings as errors and load it."""
    compiler = os.environ.get("CC") or shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    source, library = directory / f"{name}.c", directory / f"{name}.so"
    source.write_text(f"#include <nexus_plugin.h>\n{code}", encoding="utf-8")
    flags = ["-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run(
        [compiler, *flags, f"-I{nexus_ext.get_include()}", str(source), "-o", str(library), "-lm"],
        check=True,
    )
    return ctypes.CDLL(str(library))


def native(library: ctypes.CDLL, symbol: str = "policy", **options: bool) -> NativePolicy:
    """Return the struct of this name, as a plugin would."""
    address = ctypes.addressof(ctypes.c_char.in_dll(library, symbol))
    return NativePolicy(symbol, address, library, **options)
