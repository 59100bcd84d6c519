"""The unmodified class of llama-cpp-python, comparable bit by bit with a paged run."""

from __future__ import annotations

from typing import Any

from nexus_ext.runtime.loading import loads


def stock_llama(path: str, **arguments: Any) -> Any:
    """Return `llama_cpp.Llama(path, **arguments)` with weights in plain CPU buffers.

    By default llama.cpp may repack weights for the CPU at hand, and products of repacked weights
    round differently; everything else is as the user would get it.
    """
    import llama_cpp

    with loads(None, extra_buffers=False):
        return llama_cpp.Llama(path, **arguments)
