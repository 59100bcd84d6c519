"""How llama-cpp-python loads a model while nexus_ext has something to say about it.

`llama_cpp.Llama` builds its model through one function of the bindings. That function is wrapped
once; a thread that asked for something special (a paged model, or a stock model with plain CPU
buffers) gets it, every other load goes through unchanged.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nexus_ext import core


@dataclass(slots=True)
class _Request:
    model: core.Model | None  # None: llama.cpp's own loader
    paged: bool  # False: llama.cpp reads all weights of `model` into buffers of its own
    extra_buffers: bool  # repacked weights of the CPU backend, which round differently


_thread = threading.local()
_install_lock = threading.Lock()


def _install() -> None:
    import llama_cpp.llama_cpp as bindings

    with _install_lock:
        stock = bindings.llama_model_load_from_file
        if getattr(stock, "nexus_ext", False):
            return

        @functools.wraps(stock)
        def load(path: bytes, params: Any) -> Any:
            request: _Request | None = getattr(_thread, "request", None)
            if request is None:
                return stock(path, params)
            params.use_extra_bufts = params.use_extra_bufts and request.extra_buffers
            if request.model is None:
                return stock(path, params)
            return load_paged(request.model, params, paged=request.paged)

        load.nexus_ext = True  # type: ignore[attr-defined]
        bindings.llama_model_load_from_file = load


def load_paged(model: core.Model, params: Any, *, paged: bool = True) -> Any:
    """Let llama.cpp load from the core's stream; paged tensors cost it nothing.

    Not `paged`: it reads every tensor, and nothing of ours is in its way afterwards.
    """
    import llama_cpp.llama_cpp as bindings

    params.use_extra_bufts = False  # our buffers come first, and a mix would round differently
    with model.stream() as (stream, can_map):
        params.load_mode = (
            bindings.LLAMA_LOAD_MODE_MMAP if can_map and paged else bindings.LLAMA_LOAD_MODE_NONE
        )
        model.set_loading(paged)
        try:
            return bindings.llama_model_load_from_file_ptr(ctypes.c_void_p(stream), params)
        finally:
            model.set_loading(False)


@contextlib.contextmanager
def loads(model: core.Model | None, *, extra_buffers: bool, paged: bool = True) -> Iterator[None]:
    """Within the block, models that this thread creates are loaded like this."""
    _install()
    _thread.request = _Request(model, paged, extra_buffers)
    try:
        yield
    finally:
        _thread.request = None
