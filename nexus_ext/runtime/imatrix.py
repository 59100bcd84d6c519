"""The importance matrix of a model: collected from a calibration text, saved, and loaded.

llama.cpp's scheduler calls a function in C for the nodes of its graph (cb_eval), which adds up the
squares of what goes into each weight; Python is not involved while a graph is computed. The model
may be larger than memory. Files are GGUF in the layout of llama.cpp's imatrix tool, so either
program reads those of the other.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from nexus_ext import core
from nexus_ext.errors import FormatError, NexusError
from nexus_ext.formats.gguf_header import read_header
from nexus_ext.formats.new_file import NewFile
from nexus_ext.formats.sections import read_section
from nexus_ext.quality.importance import Importance, ImportanceMatrix
from nexus_ext.runtime import backend
from nexus_ext.runtime.predictions import evaluate, opened, text_windows

if TYPE_CHECKING:
    from nexus_ext.placement import PlanRequest
    from nexus_ext.runtime.planning import Planned

SECTION = "salience"  # of an NXF
_SUMS, _COUNTS = ".in_sum2", ".counts"
_thread = threading.local()
_install_lock = threading.Lock()


class Observer(Protocol):
    """Something in C that sees what a model computes, through a callback of our backend."""

    callback: str  # name of the function in the backend

    @property
    def address(self) -> int:
        """What the function is called with."""


class Collector:
    """Sums in C; `address` is what the callback is called with."""

    callback = "nx_imatrix_observe"

    def __init__(self) -> None:
        out = core.ffi.new("nx_imatrix **")
        core.check(core.lib.nx_imatrix_create(out), "an importance matrix")
        self._imatrix = out[0]

    def __enter__(self) -> Collector:
        return self

    def __exit__(self, *_: object) -> None:
        core.lib.nx_imatrix_free(self._imatrix)
        self._imatrix = None

    @property
    def address(self) -> int:
        return int(core.ffi.cast("uintptr_t", self._imatrix))

    def take(self, n_tokens: int) -> ImportanceMatrix:
        """Return what was collected. NexusError when an activation was not a number."""
        if core.lib.nx_imatrix_status(self._imatrix) != core.lib.NX_OK:
            raise NexusError(
                "the model computes values that are not finite for this text",
                hint="`nexus verify` tells whether the file is damaged; try another text",
            )
        ffi = core.ffi
        name = ffi.new("char[]", core.lib.NX_IMATRIX_NAME)
        sizes = ffi.new("uint32_t *"), ffi.new("uint32_t *")
        sums, counts = ffi.new("double const **"), ffi.new("uint64_t const **")
        entries = {}
        for i in range(core.lib.nx_imatrix_count(self._imatrix)):
            status = core.lib.nx_imatrix_at(self._imatrix, i, name, *sizes, sums, counts)
            core.check(status, "an importance matrix")
            n_channels, n_matrices = sizes[0][0], sizes[1][0]
            n_bytes = 8 * n_channels * n_matrices
            entries[ffi.string(name).decode("utf-8", "replace")] = Importance(
                sums=np.frombuffer(ffi.buffer(sums[0], n_bytes), np.float64)
                .reshape(n_matrices, n_channels)
                .copy(),
                counts=np.frombuffer(ffi.buffer(counts[0], 8 * n_matrices), np.uint64).copy(),
            )
        return ImportanceMatrix(entries, n_tokens)


def _install() -> None:
    """Wrap the function through which `llama_cpp.Llama` makes its context, once."""
    import llama_cpp.llama_cpp as bindings

    with _install_lock:
        stock = bindings.llama_init_from_model
        if getattr(stock, "nexus_ext_observed", False):
            return

        @functools.wraps(stock)
        def init(model: Any, params: Any) -> Any:
            observer: tuple[int, int] | None = getattr(_thread, "observer", None)
            if observer is not None:
                params.cb_eval = bindings.ggml_backend_sched_eval_callback(observer[0])
                params.cb_eval_user_data = observer[1]
            return stock(model, params)

        init.nexus_ext_observed = True  # type: ignore[attr-defined]
        bindings.llama_init_from_model = init


@contextlib.contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """Within the block, contexts that this thread creates are seen by `observer`.

    They must be closed before it is. Raises BackendUnavailable.
    """
    backend.register()  # the callback is part of it: it has checked how tensors are laid out
    _install()
    function = ctypes.CDLL(str(core.BACKEND_PATH))[observer.callback]
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    _thread.observer = (address, observer.address)
    try:
        yield
    finally:
        _thread.observer = None


def collect_imatrix(
    model: str,
    text: bytes,
    planned: Planned,
    request: PlanRequest,
    *,
    n_ctx: int,
    most: int | None = None,
    tick: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> ImportanceMatrix:
    """Evaluate a text in windows of `n_ctx` tokens and return the importance of every channel.

    Computes on the CPU. Raises UsageError when the text is too short, and what a run may raise.
    """
    with Collector() as collector:
        n_tokens = 0
        with observed(collector), opened(model, planned, request) as llm:
            parts = text_windows(llm, text, n_ctx, most)
            for number, window in enumerate(parts):
                tick("calibration", number, len(parts))
                for _ in evaluate(llm, window.tokens, 0):
                    pass  # what is predicted does not matter, only what it is computed from
                n_tokens += len(window.tokens)
        return collector.take(n_tokens)


def save_imatrix(path: str, imatrix: ImportanceMatrix, *, overwrite: bool = False) -> None:
    """Write an importance matrix as llama.cpp's tool does. Raises WriteFailed or UsageError."""
    import gguf

    nbytes = sum(4 * (e.sums.size + e.counts.size) for e in imatrix.entries.values())
    with NewFile(path, expected_nbytes=nbytes, overwrite=overwrite) as file:
        writer = gguf.GGUFWriter(None, arch="", use_temp_file=False)
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", ["calibration"])
        writer.add_uint32("imatrix.chunk_count", max(1, imatrix.n_tokens // 512))
        writer.add_uint32("imatrix.chunk_size", 512)
        for name in sorted(imatrix.entries):
            entry = imatrix.entries[name]
            writer.add_tensor(name + _SUMS, entry.sums.astype(np.float32))
            writer.add_tensor(name + _COUNTS, entry.counts.astype(np.float32)[:, None])
        part = Path(file.part_path)
        writer.write_header_to_file(part)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        file.commit()


def load_imatrix(path: str) -> ImportanceMatrix:
    """Read a file of `save_imatrix` or of llama.cpp's tool, or the section of an NXF.

    Raises FormatError, ReadFailed.
    """
    section = read_section(path, SECTION)
    if section is not None:
        with tempfile.TemporaryDirectory(prefix="nexus-") as folder:
            copy = os.path.join(folder, "salience.gguf")
            Path(copy).write_bytes(section)
            return load_imatrix(copy)
    header = read_header(path)
    if header.metadata.get("general.type") != "imatrix":
        raise FormatError(
            f"{path}: is a GGUF of type {header.metadata.get('general.type')!r}, not an imatrix",
            hint="make one with `nexus quantize --calibrate TEXT --save-imatrix FILE`",
        )
    tensors = {t.name: t for t in header.tensors}
    entries = {}
    with open(path, "rb") as file:

        def values(name: str) -> Any:
            raw = tensors.get(name)
            if raw is None or raw.type.name != "F32":
                raise FormatError(f"{path}: has no F32 tensor {name!r}", hint="make it anew")
            file.seek(raw.offset)
            found = np.frombuffer(file.read(raw.nbytes), np.float32)
            if not np.isfinite(found).all() or (found < 0).any():
                raise FormatError(
                    f"{path}: {name!r} holds values that are no sums of squares",
                    hint="make it anew",
                )
            return found.astype(np.float64)

        for name in tensors:
            if not name.endswith(_SUMS):
                continue
            weight = name.removesuffix(_SUMS)
            sums, counts = values(name), values(weight + _COUNTS)
            if counts.size == 0 or sums.size % counts.size:
                raise FormatError(
                    f"{path}: {sums.size} sums and {counts.size} counts of {weight!r} do not match",
                    hint="make it anew",
                )
            entries[weight] = Importance(
                sums.reshape(counts.size, -1), np.rint(counts).astype(np.uint64)
            )
    chunks, size = (header.metadata.get(f"imatrix.{k}") for k in ("chunk_count", "chunk_size"))
    n_tokens = chunks * size if isinstance(chunks, int) and isinstance(size, int) else 0
    return ImportanceMatrix(entries, n_tokens)
