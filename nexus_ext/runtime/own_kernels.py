"""Which weight types our own kernels compute with instead of ggml's.

Only ternary ones and their like, resident in memory. Results are the same bits as ggml's wherever
its x86 kernels are the usual ones; that is not taken on trust but tried, in the process and on the
CPU that will run the model.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable

from nexus_ext import core
from nexus_ext.errors import UsageError
from nexus_ext.runtime import backend
from nexus_ext.types import TensorInfo

TYPES = ("tq1_0", "tq2_0", "q2_0", "q1_0")
MODES = ("ggml", "auto", "nexus")
"""ggml: never ours. auto: where the results are the same bits. nexus: always."""


@functools.cache
def same_bits(type_name: str) -> bool | None:
    """Return whether our products are bit by bit those of ggml here; None: ours cannot be used.

    Registers the backend. Raises BackendUnavailable.
    """
    backend.register()
    probe = ctypes.CDLL(str(core.BACKEND_PATH)).nx_backend_same_bits
    probe.restype, probe.argtypes = ctypes.c_int, [ctypes.c_char_p]
    answer = int(probe(type_name.encode()))
    return None if answer < 0 else answer == 1


def own_types(resident: Iterable[TensorInfo], mode: str) -> tuple[str, ...]:
    """Return the types among these resident weights that our kernels are to compute with.

    UsageError for an unknown mode, or for "nexus" when this ggml leaves our kernels no place.
    """
    if mode not in MODES:
        raise UsageError(
            f"kernels are {mode!r}, which is not a choice", hint=f"use one of {', '.join(MODES)}"
        )
    if mode == "ggml":
        return ()
    found = {tensor.type_name.lower() for tensor in resident if len(tensor.shape) == 2}
    chosen = []
    for name in TYPES:
        if name not in found:
            continue
        same = same_bits(name)
        if same is None and mode == "nexus":
            raise UsageError(
                f"this ggml has no place for our kernels, or does not know {name}",
                hint='use kernels="ggml"',
            )
        if same or (mode == "nexus" and same is not None):
            chosen.append(name)
    return tuple(chosen)
