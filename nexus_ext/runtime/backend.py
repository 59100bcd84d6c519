"""Put the NEXUS backend into llama-cpp-python's ggml, once for each process."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import threading
from collections.abc import Iterator

from nexus_ext import core
from nexus_ext.errors import BackendUnavailable
from nexus_ext.runtime import ggml

_log = logging.getLogger("nexus_ext.runtime")
_lock = threading.Lock()

TESTED_VERSIONS = {"0.3.36": "0.25.3"}
"""llama-cpp-python -> the ggml in it, as far as the whole test suite has passed with them."""


def llama_cpp_version() -> str:
    import llama_cpp

    return str(llama_cpp.__version__)


def is_registered() -> bool:
    """Whether libllama's own registry has the NEXUS device."""
    by_name = ggml.function("ggml_backend_dev_by_name", ctypes.c_void_p, ctypes.c_char_p)
    return bool(by_name(b"NEXUS"))


def register() -> None:
    """Register the backend with libllama's ggml, if it is not there yet.

    Raises BackendUnavailable with the reason when this ggml is not compatible.
    """
    with _lock:
        if is_registered():
            return
        installed, version = llama_cpp_version(), ggml.version()
        if TESTED_VERSIONS.get(installed) != version:
            _log.warning(
                "llama-cpp-python %s with ggml %s is not among the tested versions (%s); every "
                "struct that the backend reads is compared with this library before it is used",
                installed,
                version,
                ", ".join(TESTED_VERSIONS),
            )
        load = ggml.function("ggml_backend_load", ctypes.c_void_p, ctypes.c_char_p)
        with quiet_llama_log():
            loaded = load(str(core.BACKEND_PATH).encode())
        if not loaded:
            raise BackendUnavailable(
                f"llama-cpp-python {installed} (ggml {version}) does not take the NEXUS backend: "
                f"{_refusal()}",
                hint=f"install a tested version: {', '.join(TESTED_VERSIONS)}",
            )
        if not is_registered():
            raise BackendUnavailable(
                "the backend was loaded, but the registry that libllama uses does not have it",
                hint="run `nexus doctor`",
            )


def batch_kernels() -> tuple[str, ...]:
    """Types of experts whose products with a prompt our kernels compute, with this ggml's bits.

    Empty before `register`, without AVX2, and with NEXUS_BATCH_KERNELS=0.
    """
    types = _library().nx_backend_batch_types
    types.restype = ctypes.c_char_p
    text: bytes = types()
    return tuple(text.decode().split())


def n_batch_products() -> int:
    """How many products these kernels have computed in this process."""
    count = _library().nx_backend_batch_products
    count.restype = ctypes.c_uint64
    return int(count())


def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(core.BACKEND_PATH))


def _refusal() -> str:
    if not core.BACKEND_PATH.exists():
        return f"{core.BACKEND_PATH} is missing"
    refusal = _library().nx_backend_refusal
    refusal.restype = ctypes.c_char_p
    text: bytes = refusal()
    return text.decode() or "ggml gave no reason"


@contextlib.contextmanager
def quiet_llama_log() -> Iterator[None]:
    """Let llama.cpp log errors only for a moment (its logger belongs to llama-cpp-python)."""
    logger = logging.getLogger("llama-cpp-python")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
