"""Why llama.cpp could not load a model: it says so in its log, and nowhere else."""

from __future__ import annotations

import ctypes
import functools
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from nexus_ext.errors import FormatError

_REASON: Final = re.compile(rb"error loading model: (.+)")
_lock = threading.Lock()
_thread = threading.local()  # .reasons: what the load of this thread has been told
_n_listening = 0
_before: Any = None  # the callback that was there, which hears everything as well


@contextmanager
def reasons_heard() -> Iterator[list[str]]:
    """Within the block: the reasons that llama.cpp gives for a load of this thread that fails."""
    global _n_listening
    with _lock:
        if not _n_listening:
            _listen()
        _n_listening += 1
    _thread.reasons = reasons = []  # type: ignore[var-annotated]
    try:
        yield reasons
    finally:
        _thread.reasons = None
        with _lock:
            _n_listening -= 1
            if not _n_listening:
                _listen_no_more()


def load_failed(path: str, reasons: list[str], otherwise: str) -> FormatError:
    """Return the error of a load: with llama.cpp's own reason, or what there is to say else."""
    return FormatError(
        f"llama.cpp cannot load {path}: {reasons[-1] if reasons else otherwise}",
        hint="a newer llama-cpp-python may know this model"
        if reasons
        else "verbose=True shows what it says; the model may need a newer llama-cpp-python",
    )


@functools.cache
def _callback() -> Any:
    """Our callback. Kept for good: when it is taken out, another thread may be inside of it."""
    import llama_cpp.llama_cpp as bindings

    def hear(level: int, text: bytes | None, data: Any) -> None:
        reasons: list[str] | None = getattr(_thread, "reasons", None)
        if reasons is not None and (match := _REASON.search(text or b"")):
            reasons.append(match[1].decode("utf-8", "replace").strip())
        if _before:
            _before(level, text, data)

    return bindings.llama_log_callback(hear)


def _current() -> tuple[Any, ctypes.c_void_p]:
    import llama_cpp.llama_cpp as bindings

    callback, data = bindings.llama_log_callback(), ctypes.c_void_p()
    bindings.llama_log_get(ctypes.byref(callback), ctypes.byref(data))
    return callback, data


def _listen() -> None:
    import llama_cpp.llama_cpp as bindings

    global _before
    _before, data = _current()
    bindings.llama_log_set(_callback(), data)


def _listen_no_more() -> None:
    import llama_cpp.llama_cpp as bindings

    callback, data = _current()
    ours = ctypes.cast(_callback(), ctypes.c_void_p).value
    if ctypes.cast(callback, ctypes.c_void_p).value == ours:  # else somebody has set another
        bindings.llama_log_set(_before, data)
