"""The native core, as Python sees it: models, statistics, disk and memory measurements.

It turns C structs into values; it knows nothing of llama.cpp, plans or catalogs beyond the text of
a manifest. What went wrong is said by `nexus_ext.core_errors`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import nexus_ext._native as _native
from nexus_ext import native_plugins
from nexus_ext.core_errors import check as check
from nexus_ext.core_errors import error_of as error_of
from nexus_ext.core_errors import text_of as _text
from nexus_ext.core_values import Event as Event
from nexus_ext.core_values import FileIo as FileIo
from nexus_ext.core_values import ModelStats as ModelStats
from nexus_ext.core_values import Prediction as Prediction
from nexus_ext.errors import (
    ModelClosed,
    NexusError,
    OutOfMemory,
    ReadFailed,
    UsageError,
)
from nexus_ext.native_plugins import PluginUse as PluginUse

ffi = _native.ffi
lib = _native.lib

_SUFFIX = ".dylib" if os.uname().sysname == "Darwin" else ".so"
BACKEND_PATH = Path(_native.__file__).parent / f"libggml-nexus{_SUFFIX}"

Progress = Callable[[int, int], bool | None]
"""Called with (done, total) bytes; returning True stops the load."""

_EVENTS = {
    getattr(lib, name): name.removeprefix("NX_EVENT_").lower()
    for name in dir(lib)
    if name.startswith("NX_EVENT_")
}


_CONTROL = {
    getattr(lib, name): name.removeprefix("NX_CONTROL_").lower()
    for name in dir(lib)
    if name.startswith("NX_CONTROL_")
}

GATE_ROUTED, CONTROL_ROUTED = 1 << 24, 2 << 24  # as in routing.c


@ffi.def_extern(onerror=lambda *_: None)  # type: ignore[untyped-decorator]
def nx_python_progress(handle: Any, done: int, total: int) -> int:
    """Relay progress of a load; an exception in the callback stops the load and is kept."""
    state = ffi.from_handle(handle)
    try:
        return 1 if state["progress"](done, total) else 0
    except BaseException as error:  # must not unwind through C: raised again by finish_load
        state["error"] = error
        return 1


def _file_io(info: Any) -> FileIo:
    return FileIo(bool(info.direct), _text(info.reason), info.offset_align, info.mem_align)


class Model:
    """A model of the core: owns files, pinned memory, ring and scratch until `release`."""

    def __init__(self, manifest: str, header: bytes = b"") -> None:
        """Open the files and reserve the memory that `manifest` speaks of; read nothing.

        Raises ReadFailed, ModelChanged, OutOfMemory or FormatError.
        """
        text = manifest.encode("utf-8", "surrogateescape")  # paths need not be UTF-8
        out, error = ffi.new("nx_model **"), ffi.new("nx_error *")
        status = lib.nx_model_create(text, len(text), header, len(header), out, error)
        if status != lib.NX_OK:
            raise error_of(error, "the model cannot be opened")
        self._model = out[0]
        self._kept: dict[str, object] = {}  # what plugins point to
        self._chosen_by = {"cache": "", "predictor": ""}  # names of plugins

    @property
    def is_open(self) -> bool:
        return self._model is not None

    @property
    def pointer(self) -> Any:
        if self._model is None:
            raise ModelClosed("the model is closed", hint="open it again")
        return self._model

    @contextlib.contextmanager
    def stream(self) -> Iterator[tuple[int, bool]]:
        """Within the block: the address of a C FILE that serves the model to llama.cpp's loader.

        The second value says whether it may be loaded from in mmap mode, which copies nothing.
        """
        has_descriptor = ffi.new("int *")
        stream = lib.nx_model_stream(self.pointer, has_descriptor)
        if stream == ffi.NULL:
            raise self.take_error() or OutOfMemory("no memory for the stream of the model")
        try:
            yield int(ffi.cast("uintptr_t", stream)), bool(has_descriptor[0])
        finally:
            lib.nx_model_stream_close(stream)

    def set_loading(self, on: bool) -> None:
        """Let tensors that this thread creates belong to the model, or no longer."""
        lib.nx_loading_set(self.pointer if on else ffi.NULL)

    def finish_load(self, progress: Progress | None = None) -> None:
        """Wait until everything resident is read.

        Raises ReadFailed, ModelChanged or Interrupted; what `progress` raises is passed on.
        """
        state: dict[str, Any] = {"progress": progress, "error": None}
        handle = ffi.new_handle(state)
        callback = lib.nx_python_progress if progress else ffi.NULL
        status = lib.nx_model_finish_load(self.pointer, callback, handle)
        if state["error"] is not None:
            self.take_error()
            raise state["error"]
        if status != lib.NX_OK:
            error = self.take_error()
            if error is None:
                check(status, "loading the model")
            else:
                raise error

    def take_error(self, what: str = "reading weights") -> NexusError | None:
        """Return the last error of a load or of a graph, and forget it."""
        error = ffi.new("nx_error *")
        lib.nx_model_last_error(self.pointer, error)
        lib.nx_model_clear_error(self.pointer)
        return None if error.status == lib.NX_OK else error_of(error, what)

    def stats(self) -> ModelStats:
        out = ffi.new("nx_stats *")
        lib.nx_model_get_stats(self.pointer, out)
        return ModelStats(**{f.name: int(getattr(out, f.name)) for f in fields(ModelStats)})

    def reset_stats(self) -> None:
        lib.nx_model_reset_stats(self.pointer)

    def io_engine(self) -> str:
        return _text(lib.nx_model_io_engine(self.pointer))

    def file_io(self, index: int = 0) -> FileIo:
        out = ffi.new("nx_file_info *")
        check(lib.nx_model_file_info(self.pointer, index, out), f"file {index} of the model")
        return _file_io(out)

    def trace(self, on: bool) -> None:
        lib.nx_model_trace(self.pointer, int(on))

    def events(self, most: int = 4096) -> list[Event]:
        """Return the newest events of the trace, oldest first."""
        out = ffi.new("nx_event[]", most)
        n = lib.nx_model_events(self.pointer, out, most)
        return [Event(e.t_ns, _EVENTS.get(e.kind, "?"), e.a, e.b) for e in out[0:n]]

    def set_cache_policy(self, policy: native_plugins.CachePolicyLike, plugin: str = "") -> None:
        """Choose which expert is evicted: a built-in by name, or a plugin's.

        plugin: the one that chose it. Raises UsageError for an unknown name, PluginError for a
        struct of another version.
        """
        self._kept["cache"] = native_plugins.use_cache_policy(self.pointer, policy)
        self._chosen_by["cache"] = plugin

    def cache_policy(self) -> PluginUse:
        """Return what evicts experts, and whether it was disabled."""
        use = native_plugins.cache_policy(self.pointer)
        return replace(use, plugin=self._chosen_by["cache"])

    def set_predictor(self, predictor: native_plugins.PredictorLike, plugin: str = "") -> None:
        """Choose what predicts experts: "none", "gate", "previous", "popular", "auto", or a plugin.

        plugin: the one that chose it. Raises UsageError for an unknown name, PluginError for a
        struct of another version.
        """
        if isinstance(predictor, str):
            what = f"expert predictor {predictor!r}"
            check(lib.nx_predict_set(self.pointer, predictor.encode()), what)
        else:
            self._kept["predictor"] = native_plugins.use_predictor(self.pointer, predictor)
            self._chosen_by["predictor"] = plugin

    def predictor_plugin(self) -> PluginUse:
        """Return the plugin that predicts experts (name "": none was given), as `cache_policy`."""
        use = native_plugins.predictor_use(self.pointer)
        return replace(use, plugin=self._chosen_by["predictor"])

    def prediction(self) -> Prediction:
        """Return whether experts are predicted, and why."""
        out = ffi.new("nx_prediction *")
        lib.nx_predict_get(self.pointer, out)
        return Prediction(
            state=_CONTROL[out.state],
            on=bool(out.on),
            trials=out.trials,
            switches=out.switches,
            idle=out.idle,
            stall=out.stall,
            on_s=out.on_ns / 1e9,
            off_s=out.off_ns / 1e9,
        )

    def popularity(self) -> dict[int, list[int]]:
        """Return how often each expert was chosen since the model was opened.

        The keys are the numbers of the first tensor of each group of cached experts.
        """
        counts = {}
        for group in range(lib.nx_model_n_groups(self.pointer)):
            tensor = ffi.new("uint32_t *")
            n = lib.nx_group_experts(self.pointer, group, tensor)
            out = ffi.new("uint64_t[]", n)
            lib.nx_popularity_get(self.pointer, group, out)
            counts[int(tensor[0])] = [int(c) for c in out]
        return counts

    def set_popularity(self, counts: Mapping[int, Sequence[int]]) -> None:
        """Say what earlier sessions counted; of groups with other sizes nothing is taken."""
        for group in range(lib.nx_model_n_groups(self.pointer)):
            tensor = ffi.new("uint32_t *")
            n = lib.nx_group_experts(self.pointer, group, tensor)
            of_group = counts.get(int(tensor[0]), ())
            if len(of_group) == n:
                lib.nx_popularity_set(self.pointer, group, ffi.new("uint64_t[]", list(of_group)))

    def preload(self, seconds: float) -> bool:
        """Read popular experts into empty slots for so long; False when there is no more to do.

        Gives way to the first graph, and does nothing after it.
        """
        more = lib.nx_cache_preload(self.pointer, int(seconds * 1e9))
        if more < 0:
            raise self.take_error("reading experts ahead") or OutOfMemory("no memory")
        return bool(more)

    def record_routing(self, on: bool, predictions: bool = False) -> None:
        """Keep what the routers decide until `take_routing` asks for it, or no longer.

        With `predictions`, also what the gates would have decided one layer earlier.
        """
        lib.nx_routing_record(self.pointer, (2 if predictions else 1) if on else 0)

    def take_routing(self, most: int = 1 << 20) -> list[tuple[int, list[list[int]]]]:
        """Return and forget decisions: (tensor number, experts of each token), oldest first.

        One entry for each product with streamed experts; products of one cache record share one.
        Predictions have their kind added to the number: GATE_ROUTED, CONTROL_ROUTED.
        """
        out = ffi.new("int32_t[]", most)
        n = lib.nx_routing_take(self.pointer, out, most)
        numbers: list[int] = ffi.unpack(out, n) if n else []
        entries, at = [], 0
        while at < n:
            extent, n_tokens, n_used = numbers[at : at + 3]
            at += 3
            entries.append(
                (
                    extent,
                    [numbers[at + i * n_used : at + (i + 1) * n_used] for i in range(n_tokens)],
                )
            )
            at += n_tokens * n_used
        return entries

    # -- how much of it is in memory: nexus_residency.h --------------------------

    def promote(self, extents: Sequence[int], stop: StopFlag | None = None) -> int:
        """Read elastic extents (numbers in the manifest's order) into memory; return bytes read.

        Raises ReadFailed, ModelChanged, OutOfMemory, or Interrupted when `stop` was set; what was
        complete by then stays.
        """
        array, done = ffi.new("uint32_t[]", list(extents)), ffi.new("uint64_t *")
        abort = ffi.addressof(lib, "nx_flag_stop") if stop is not None else ffi.NULL
        context = ffi.cast("void *", stop.address) if stop is not None else ffi.NULL
        status = lib.nx_promote(self.pointer, array, len(array), abort, context, done)
        if status != lib.NX_OK:
            named = None if status == lib.NX_E_ABORTED else self.take_error("reading weights back")
            if named is not None:
                raise named
            check(status, "reading weights back")
        return int(done[0])

    def demote(self, extents: Sequence[int]) -> int:
        """Give the memory of elastic extents back; return how many bytes of weights went."""
        array, done = ffi.new("uint32_t[]", list(extents)), ffi.new("uint64_t *")
        check(lib.nx_demote(self.pointer, array, len(array), done), "evicting weights")
        return int(done[0])

    def resize_cache(self, group: int, n_slots: int) -> None:
        """Let expert cache `group` have `n_slots` slots, at most as many as the manifest says."""
        check(lib.nx_group_resize(self.pointer, group, n_slots), f"expert cache {group}")

    def slot_bytes(self, group: int) -> int:
        return int(lib.nx_group_slot_bytes(self.pointer, group))

    def resident_bytes(self) -> int:
        """Return the memory of promoted extents, the slack of direct reads included."""
        return int(lib.nx_resident_bytes(self.pointer))

    def extent_bytes(self, extent: int) -> int:
        """Return the memory that promoting an extent takes; 0 for one that is not elastic."""
        return int(lib.nx_extent_span(self.pointer, extent))

    def is_resident(self, extent: int) -> bool:
        return bool(lib.nx_extent_is_resident(self.pointer, extent))

    def set_columns(self, on: bool) -> None:
        """Compute products with several columns so that each comes out as if it were alone."""
        lib.nx_model_set_columns(self.pointer, int(on))

    def attach_residual(self, tensor: str, codes: Any, scales: Any, k: int) -> None:
        """Correct the products of `tensor` with a single column in its `k` largest input channels.

        codes, scales: contiguous buffers of uint8 and float32, as `kernels.Residual` has them; they
        are copied. Changes what the model says. UsageError when they do not fit the tensor or it
        has a residual already.
        """
        error = ffi.new("nx_error *")
        nibbles, factors = ffi.from_buffer(codes), ffi.from_buffer("float[]", scales)
        status = lib.nx_model_attach_residual(
            self.pointer, tensor.encode(), nibbles, len(nibbles), factors, len(factors), k, error
        )
        if status in (lib.NX_E_INVALID, lib.NX_E_BUSY):
            raise UsageError(_text(error.text), hint="encode it from this tensor, attach it once")
        if status != lib.NX_OK:
            raise error_of(error, "attaching a residual")

    def set_residual_k(self, tensor: str, k: int) -> None:
        """Correct `k` input channels of `tensor` from the next graph on; 0: none.

        UsageError when the tensor has no residual.
        """
        if lib.nx_model_set_residual_k(self.pointer, tensor.encode(), k) != lib.NX_OK:
            raise UsageError(f"tensor {tensor} has no residual", hint="attach one first")

    def set_cores(self, cpus: Sequence[int]) -> None:
        """Bind thread i of this model's computations to processor cpus[i]; empty: bind none.

        UsageError for processors that cannot be named, or a system that binds no threads.
        """
        status = lib.nx_model_set_cores(self.pointer, ffi.new("uint32_t[]", list(cpus)), len(cpus))
        if status in (lib.NX_E_INVALID, lib.NX_E_UNSUPPORTED):
            raise UsageError(
                f"threads cannot be bound to the processors {list(cpus)} on this system",
                hint="leave out pin_cores",
            )
        check(status, "binding threads to processors")

    def cores(self) -> list[int]:
        """Return what `set_cores` was given last."""
        cpus = ffi.new("uint32_t[]", int(lib.NX_MAX_CORES))
        return [int(cpus[i]) for i in range(lib.nx_model_cores(self.pointer, cpus))]

    def own_products(self) -> dict[str, int]:
        """Return how many products our kernels have computed, by what they were given; plugins'."""
        kinds = ("packed", "stored", "opencl", "plugin")
        numbers = (lib.NX_OWN_PACKED, lib.NX_OWN_STORED, lib.NX_OWN_OPENCL, lib.NX_OWN_PLUGIN)
        counts = (int(lib.nx_model_n_own(self.pointer, number)) for number in numbers)
        return dict(zip(kinds, counts, strict=True))

    def n_packed(self) -> int:
        """Return how many weights were packed for our own kernels."""
        return int(lib.nx_model_n_packed(self.pointer))

    def attached_bytes(self) -> int:
        """Return the memory that what was attached takes."""
        return int(lib.nx_model_attached_bytes(self.pointer))

    def inject(self, kind: str, begin: int = 0, end: int = 2**63, count: int = -1) -> None:
        """For tests: let reads of [begin, end) fail as `kind` ("eio", "short", "eof") says."""
        fault = ffi.new("nx_fault *")
        fault.offset_begin, fault.offset_end, fault.count = begin, end, count
        fault.kind = getattr(lib, f"NX_FAULT_{kind.upper()}")
        check(lib.nx_model_inject(self.pointer, fault), f"fault {kind}")

    def clear_faults(self) -> None:
        lib.nx_model_clear_faults(self.pointer)

    def release(self) -> None:
        """End running graphs and give up this reference; memory goes with the last one."""
        if self._model is not None:
            lib.nx_model_close(self._model)  # no plugin is called after this
            lib.nx_model_release(self._model)
            self._model = None
            self._kept.clear()


class StopFlag:
    """A flag that native computations look at: `callback` is an abort callback of ggml's shape."""

    def __init__(self) -> None:
        self._flag = ffi.new("int *")
        self.address = int(ffi.cast("uintptr_t", self._flag))
        self.callback = int(ffi.cast("uintptr_t", ffi.addressof(lib, "nx_flag_callback")))

    def set(self) -> None:
        self._flag[0] = 1

    def clear(self) -> bool:
        """Forget it; return whether it was set."""
        was = bool(self._flag[0])
        self._flag[0] = 0
        return was

    def __bool__(self) -> bool:
        return bool(self._flag[0])


class interruptible:
    """While entered, Ctrl-C stops native computations at once (and is raised as usual after)."""

    def __enter__(self) -> None:
        lib.nx_interrupt_arm()

    def __exit__(self, *_: object) -> None:
        lib.nx_interrupt_disarm()


def interrupted_callback() -> int:
    """Return the address of an abort callback of ggml's shape: true after Ctrl-C."""
    return int(ffi.cast("uintptr_t", ffi.addressof(lib, "nx_interrupted_callback")))


def read_disk(
    path: str, block_bytes: int, depth: int, random: bool, max_bytes: int, max_ns: int
) -> tuple[int, int, bool, str]:
    """Measure cold reads of a file: (bytes, ns, direct, engine). See `nx_io_probe`."""
    options, out = ffi.new("nx_probe_options *"), ffi.new("nx_probe_result *")
    options.block_bytes, options.depth, options.random = block_bytes, depth, int(random)
    options.max_bytes, options.max_ns = max_bytes, max_ns
    options.seed = int.from_bytes(os.urandom(7), "little") + 1
    status = lib.nx_io_probe(os.fsencode(path), options, out)
    if status != lib.NX_OK:
        reason = os.strerror(out.sys_errno) if out.sys_errno else _text(lib.nx_status_text(status))
        raise ReadFailed(
            f"{path} cannot be measured: {reason}",
            hint="name another file on the same disk",
            path=path,
            errno=int(out.sys_errno),
        )
    engine = "io_uring" if out.engine == lib.NX_IO_ENGINE_URING else "threads"
    return int(out.bytes), int(out.ns), bool(out.direct), engine


def direct_io(path: str) -> FileIo:
    """Return whether and how a file can be read around the page cache."""
    out, info = ffi.new("nx_file **"), ffi.new("nx_file_info *")
    check(lib.nx_file_open(os.fsencode(path), lib.NX_IO_DIRECT, out), f"{path} cannot be opened")
    lib.nx_file_get_info(out[0], info)
    lib.nx_file_close(out[0])
    return _file_io(info)


def memory_bandwidth(n_threads: int, buffer_bytes: int) -> float:
    """Measure how fast `n_threads` threads together read memory, in bytes per second."""
    options, out = ffi.new("nx_membench_options *"), ffi.new("nx_membench_result *")
    options.n_threads, options.buffer_bytes = n_threads, buffer_bytes
    check(lib.nx_membench_read(options, out), "measuring memory bandwidth")
    return float(out.bytes_s)
