"""Kernels of plugins, given to a model of the core: native/include/nexus_plugin.h, `nxp_kernel`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import nexus_ext._native as _native
from nexus_ext.core_errors import text_of
from nexus_ext.errors import OutOfMemory, PluginError

ffi = _native.ffi
lib = _native.lib

_HINT = "see plugins/docs/c-policies.md"


def kernel_type(name: str, address: int) -> str:
    """Return the type of weights that the struct at `address` multiplies by, in lower case.

    PluginError when it is not a kernel of this version.
    """
    copy, error = ffi.new("nxp_kernel *"), ffi.new("nx_error *")
    status = lib.nx_kernel_check(_struct(address), copy, error)
    if status != lib.NX_OK:
        raise PluginError(f"kernel {name!r}: {text_of(error.text)}", hint=_HINT)
    return text_of(copy.type).lower()


def use_kernel(model: Any, name: str, address: int, tensors: Sequence[int]) -> int:
    """Let it multiply by these tensors (their numbers), resident matrices, of an `nx_model`.

    Returns how many of them it took. To be called before the first graph; the struct must stay
    until the model is freed. PluginError when it cannot be used.
    """
    taken, error = ffi.new("uint32_t *"), ffi.new("nx_error *")
    numbers = ffi.new("uint32_t[]", list(tensors))
    status = lib.nx_model_use_kernel(model, _struct(address), numbers, len(numbers), taken, error)
    if status == lib.NX_E_NOMEM:
        raise OutOfMemory(f"kernel {name!r}: {text_of(error.text)}")
    if status != lib.NX_OK:
        raise PluginError(f"kernel {name!r}: {text_of(error.text)}", hint=_HINT)
    return int(taken[0])


def stored_rows(model: Any, tensor: int, nbytes: int) -> bytes | None:
    """Return the first bytes of a tensor, from its file; None when they cannot be read."""
    out = ffi.new("uint8_t[]", nbytes)
    extent = lib.nx_model_extent(model, tensor)
    if lib.nx_model_read(model, extent, 0, out, nbytes) != lib.NX_OK:
        lib.nx_model_clear_error(model)
        return None
    return bytes(ffi.buffer(out, nbytes))


def _struct(address: int) -> Any:
    return ffi.cast("const nxp_kernel *", address)
