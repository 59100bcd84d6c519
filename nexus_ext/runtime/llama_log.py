"""The log of llama.cpp: why a model could not be loaded is said there, and nowhere else.

llama-cpp-python, whose callback this listens beside, takes llama.cpp's levels for those of an older
version: without `verbose` it shows warnings and hides errors.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from nexus_ext.errors import FormatError

_log = logging.getLogger("nexus_ext.runtime")

_ERROR: Final = 4  # GGML_LOG_LEVEL_ERROR
_REASON: Final = re.compile(rb"error loading model: (.+)")
_lock = threading.Lock()  # guards what follows
_thread = threading.local()  # .reasons: what the load of this thread has been told
_n_loads = 0  # that listen now
_before: Any = None  # the callback that ours passes everything on to
_put_aside: list[Any] = []  # `_before` of earlier, while loads listen in front of another callback
_silenced = False


def silence_llama_log() -> None:
    """Let llama.cpp's errors be warnings of ours, and the rest unsaid, for good: where several
    threads run models.
    """
    global _silenced
    with _lock:
        if not _silenced:
            _silenced = True
            _put_aside.clear()  # loads that listen now leave it to us to listen on
            _listen()
    logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)


@contextmanager
def reasons_heard() -> Iterator[list[str]]:
    """Within the block: the reasons that llama.cpp gives for a load of this thread that fails."""
    global _n_loads, _before
    with _lock:
        before = _before
        if _listen():
            _put_aside.append(before)
        _n_loads += 1
    _thread.reasons = reasons = []  # type: ignore[var-annotated]
    try:
        yield reasons
    finally:
        _thread.reasons = None
        with _lock:
            _n_loads -= 1
            if not _n_loads and _put_aside:
                _listen_no_more()
                _before = _put_aside[0]
                _put_aside.clear()


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
        if _silenced and level == _ERROR and reasons is None and text:
            _log.warning("llama.cpp: %s", text.decode("utf-8", "replace").strip())
        if _before:
            _before(level, text, data)

    return bindings.llama_log_callback(hear)


def _current() -> tuple[Any, ctypes.c_void_p]:
    import llama_cpp.llama_cpp as bindings

    callback, data = bindings.llama_log_callback(), ctypes.c_void_p()
    bindings.llama_log_get(ctypes.byref(callback), ctypes.byref(data))
    return callback, data


def _is_ours(callback: Any) -> bool:
    ours = ctypes.cast(_callback(), ctypes.c_void_p).value
    return bool(ctypes.cast(callback, ctypes.c_void_p).value == ours)


def _listen() -> bool:
    """Put our callback in front of the one that is set; False when ours is set."""
    import llama_cpp.llama_cpp as bindings

    global _before
    callback, data = _current()
    if _is_ours(callback):
        return False
    _before = callback
    bindings.llama_log_set(_callback(), data)
    return True


def _listen_no_more() -> None:
    import llama_cpp.llama_cpp as bindings

    callback, data = _current()
    if _is_ours(callback):  # else somebody has set another
        bindings.llama_log_set(_before, data)
