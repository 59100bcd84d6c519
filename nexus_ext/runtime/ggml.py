"""The ggml library that llama-cpp-python itself uses, and what it knows.

The wheel holds several byte copies of libggml. Opening one of them by its path gives a second
registry of devices that libllama never looks at, so every symbol here is taken through the handle
of libllama.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

from nexus_ext.errors import BackendUnavailable

_GPU_TYPES = {1: False, 2: True}  # ggml_backend_dev_type -> shares main memory


@dataclass(frozen=True, slots=True)
class Device:
    """One device of ggml's registry."""

    name: str
    description: str
    type: int
    free_bytes: int
    total_bytes: int


@functools.cache
def library() -> Any:
    """Return the ctypes library through which ggml's symbols are found.

    Raises BackendUnavailable when llama-cpp-python cannot be imported.
    """
    try:
        import llama_cpp.llama_cpp as bindings
    except Exception as error:  # the wheel may be missing or built for another machine
        raise BackendUnavailable(
            f"llama-cpp-python cannot be imported: {error}",
            hint="pip install llama-cpp-python",
        ) from error
    return bindings._lib


def function(name: str, result: Any, *arguments: Any) -> Any:
    """Return ggml's function `name`; BackendUnavailable when this build does not have it."""
    try:
        found = library()[name]
    except AttributeError as error:
        raise BackendUnavailable(
            f"this llama-cpp-python has no function {name}",
            hint="install a version that `nexus doctor` calls tested",
        ) from error
    found.restype, found.argtypes = result, arguments
    return found


def version() -> str:
    raw: bytes = function("ggml_version", ctypes.c_char_p)()
    return raw.decode()


def devices() -> list[Device]:
    """Return all devices that this ggml has registered, in its order."""
    get = function("ggml_backend_dev_get", ctypes.c_void_p, ctypes.c_size_t)
    name = function("ggml_backend_dev_name", ctypes.c_char_p, ctypes.c_void_p)
    description = function("ggml_backend_dev_description", ctypes.c_char_p, ctypes.c_void_p)
    kind = function("ggml_backend_dev_type", ctypes.c_int, ctypes.c_void_p)
    size = ctypes.POINTER(ctypes.c_size_t)
    memory = function("ggml_backend_dev_memory", None, ctypes.c_void_p, size, size)
    found = []
    for i in range(function("ggml_backend_dev_count", ctypes.c_size_t)()):
        device = get(i)
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        memory(device, ctypes.byref(free), ctypes.byref(total))
        found.append(
            Device(
                name=name(device).decode(),
                description=description(device).decode("utf-8", "replace"),
                type=kind(device),
                free_bytes=free.value,
                total_bytes=total.value,
            )
        )
    return found


def gpus() -> list[tuple[Device, bool]]:
    """Return the GPUs that llama.cpp can use, each with whether it shares main memory."""
    return [(d, _GPU_TYPES[d.type]) for d in devices() if d.type in _GPU_TYPES]
