"""Which weight types our own kernels compute with instead of ggml's.

Only ternary ones and their like. Resident matrices are packed; streamed ones and experts are
multiplied by as they are stored. Results are the same bits as ggml's wherever its x86 kernels are
the usual ones; that is not taken on trust but tried, in the process and on the CPU that will run
the model.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Iterable, Iterator

from nexus_ext import core, kernels
from nexus_ext.errors import UsageError
from nexus_ext.placement import Plan
from nexus_ext.runtime import backend
from nexus_ext.types import Catalog, TensorInfo

_log = logging.getLogger("nexus_ext.runtime")

TYPES = ("tq1_0", "tq2_0", "q2_0", "q1_0")
MODES = ("ggml", "auto", "nexus", "opencl")
"""ggml: never ours. auto: where the results are the same bits, and the CPU has instructions that
make ours faster. nexus: always. opencl: on a device, as far as there is one."""
_PAGED_TIERS = ("ram", "host", "nvme")


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


def own_types(weights: Iterable[TensorInfo], mode: str) -> tuple[str, ...]:
    """Return the types among these weights that our kernels are to compute with.

    UsageError for an unknown mode, or for "nexus" when this ggml leaves our kernels no place.
    """
    if mode not in MODES:
        raise UsageError(
            f"kernels are {mode!r}, which is not a choice", hint=f"use one of {', '.join(MODES)}"
        )
    if mode == "ggml" or (mode == "auto" and kernels.current_isa() == "reference"):
        return ()
    found = {
        tensor.type_name.lower()
        for tensor in weights
        if len(tensor.shape) in (2, 3) and tensor.name != "token_embd.weight"
    }
    chosen = []
    for name in TYPES:
        if name not in found:
            continue
        same = same_bits(name)
        if same is None and mode in ("nexus", "opencl"):
            raise UsageError(
                f"this ggml has no place for our kernels, or does not know {name}",
                hint='use kernels="ggml"',
            )
        if same or (mode in ("nexus", "opencl") and same is not None):
            chosen.append(name)
    return tuple(chosen)


def in_reach(catalog: Catalog, plan: Plan) -> Iterator[TensorInfo]:
    """Yield the weights that our kernels could compute with: those that no GPU has."""
    return (t for t in catalog.tensors if plan.tiers.get(t.name) in _PAGED_TIERS)


def takes_over(catalog: Catalog, plan: Plan) -> bool:
    """Return whether `Llama` computes with some of these weights by our kernels by itself."""
    return bool(own_types(in_reach(catalog, plan), "auto"))


def usable_mode(mode: str) -> str:
    """Return `mode`, or "auto" for "opencl" where no device is found, which is logged."""
    if mode != "opencl":
        return mode
    usable, why = kernels.open_opencl()
    if usable:
        return mode
    _log.warning("%s; the CPU computes", why)
    return "auto"


def describe(types: tuple[str, ...], mode: str) -> str:
    """Return one sentence: whose kernels compute with which weights, and why."""
    fallback = ""
    if mode == "opencl":
        usable, why = kernels.open_opencl()
        if usable and types:
            return f"kernels for {', '.join(types)}: {why}; streamed weights: {kernels.why()}"
        fallback = "" if usable else f" ({why})"
    if not types:
        return f"kernels: ggml's, there are no weights that ours are for{fallback}"
    return f"kernels for {', '.join(types)}: {kernels.why()}{fallback}"
