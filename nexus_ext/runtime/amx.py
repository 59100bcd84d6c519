"""Does the AMX code of this llama.cpp work? Asked of a child process, because it may die of it.

llama.cpp puts quantized weights into AMX buffers when the processor has AMX and the build knows it.
Two things make that a crash at the first product: a virtual machine that announces AMX without
permitting it, and a compiler that leaves half of the tile configuration out (GCC before 11.5, 12.4
and 13.3: its `_tile_loadconfig` declared 8 of the 64 bytes as read; GCC bug 114098). Neither can be
seen from outside, so one product of zeros is computed.
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
import sys
import tempfile
from typing import Final

from nexus_ext.runtime import ggml

_Q8_0: Final = 8
_F32: Final = 0
_CPU: Final = 0
_N: Final = 256  # columns and rows: whole tiles
_Q8_0_ROW_BYTES: Final = _N // 32 * 34
_TIMEOUT_S: Final = 60.0


class _InitParams(ctypes.Structure):
    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


def _amx_buffer_type() -> int | None:
    """Return ggml's AMX buffer type; None when this build or this processor has none."""
    pointer = ctypes.c_void_p
    by_type = ggml.function("ggml_backend_dev_by_type", pointer, ctypes.c_int)
    registry_of = ggml.function("ggml_backend_dev_backend_reg", pointer, pointer)
    address_of = ggml.function(
        "ggml_backend_reg_get_proc_address", pointer, pointer, ctypes.c_char_p
    )
    name_of = ggml.function("ggml_backend_buft_name", ctypes.c_char_p, pointer)
    device = by_type(_CPU)
    address = address_of(registry_of(device), b"ggml_backend_dev_get_extra_bufts")
    if not address:
        return None
    extra = ctypes.CFUNCTYPE(ctypes.POINTER(pointer), pointer)(address)(device)
    for i in range(64):  # the list ends with NULL
        if not extra or not extra[i]:
            return None
        if name_of(extra[i]) == b"AMX":
            return int(extra[i])
    return None


def _multiply(buffer_type: int) -> None:
    """Multiply zeros by zeros, with the weights in `buffer_type`."""
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    init = ggml.function("ggml_init", pointer, _InitParams)
    tensor = ggml.function(
        "ggml_new_tensor_2d", pointer, pointer, number, ctypes.c_int64, ctypes.c_int64
    )
    place = ggml.function("ggml_backend_alloc_ctx_tensors_from_buft", pointer, pointer, pointer)
    fill = ggml.function("ggml_backend_tensor_set", None, pointer, pointer, size, size)
    product = ggml.function("ggml_mul_mat", pointer, pointer, pointer, pointer)
    new_graph = ggml.function("ggml_new_graph", pointer, pointer)
    expand = ggml.function("ggml_build_forward_expand", None, pointer, pointer)
    by_type = ggml.function("ggml_backend_dev_by_type", pointer, number)
    start = ggml.function("ggml_backend_dev_init", pointer, pointer, ctypes.c_char_p)
    compute = ggml.function("ggml_backend_graph_compute", number, pointer, pointer)
    default = ggml.function("ggml_backend_dev_buffer_type", pointer, pointer)

    cpu = by_type(_CPU)
    params = _InitParams(mem_size=1 << 20, mem_buffer=None, no_alloc=True)
    weights, others = init(params), init(params)
    w = tensor(weights, _Q8_0, _N, _N)
    place(weights, buffer_type)
    zeros = bytes(_N * _Q8_0_ROW_BYTES)
    fill(w, zeros, 0, len(zeros))
    x = tensor(others, _F32, _N, 32)
    graph = new_graph(others)
    expand(graph, product(others, w, x))
    place(others, default(cpu))
    fill(x, bytes(_N * 32 * 4), 0, _N * 32 * 4)
    if compute(start(cpu, None), graph) != 0:
        raise SystemExit(1)


@functools.cache
def amx_works() -> bool | None:
    """Return whether weights may be put into AMX buffers; None when there are no such buffers."""
    if _amx_buffer_type() is None:
        return None
    command = [sys.executable, "-m", "nexus_ext.runtime.amx"]
    # A directory of its own: `-m` looks into the working directory for modules first.
    with tempfile.TemporaryDirectory(prefix="nexus-") as cwd:
        try:
            done = subprocess.run(
                command, cwd=cwd, capture_output=True, timeout=_TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 0


if __name__ == "__main__":
    found = _amx_buffer_type()
    if found is not None:
        _multiply(found)
