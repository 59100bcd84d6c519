"""`Llama`: llama-cpp-python's class, with weights that need not fit in memory.

Everything of `llama_cpp.Llama` works as it does there. When the plan streams nothing, this is
llama.cpp as it comes, with nothing of ours in its way.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import llama_cpp
import llama_cpp.llama_cpp as bindings

from nexus_ext import core
from nexus_ext.errors import FormatError, Interrupted, ModelClosed, UsageError
from nexus_ext.formats.residuals import holds_residuals, read_residuals
from nexus_ext.placement import Pin, Plan, PlanRequest
from nexus_ext.plugins import plugins
from nexus_ext.policies import ModelInfo
from nexus_ext.runtime import plugin_kernels
from nexus_ext.runtime.amx import amx_works
from nexus_ext.runtime.interrupts import interrupts_kept
from nexus_ext.runtime.llama_log import load_failed, reasons_heard
from nexus_ext.runtime.loading import loads
from nexus_ext.runtime.manifest import manifest
from nexus_ext.runtime.own_kernels import in_reach, own_types, usable_mode
from nexus_ext.runtime.paged import PagedModel
from nexus_ext.runtime.pinning import pin_threads
from nexus_ext.runtime.planning import Planned
from nexus_ext.runtime.popularity import WarmStart, wanted
from nexus_ext.runtime.residual import Residuals, plan_with_room
from nexus_ext.runtime.stats import RunStats
from nexus_ext.runtime.watching import RequestWatch, RouterWatch, watch_routers
from nexus_ext.units import parse_bytes

if TYPE_CHECKING:
    from nexus_ext.hardware import HardwareProfile

_log = logging.getLogger("nexus_ext.runtime")

_KV_TYPES = {
    getattr(bindings, f"GGML_TYPE_{name.upper()}"): name
    for name in ("f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl")
    if hasattr(bindings, f"GGML_TYPE_{name.upper()}")
}


class NexusHandle:
    """What nexus_ext does for one `Llama`: `llm.nexus`."""

    def __init__(
        self,
        path: str,
        planned: Planned,
        paged: PagedModel | None,
    ) -> None:
        self.catalog = planned.catalog
        self.hardware = planned.hardware
        self.plan = planned.plan
        self.io_mode = planned.io_mode
        self.paged = paged
        self.router_watch: RouterWatch | None = None
        self.pinning = ""  # a sentence about `pin_cores`
        self.info = ModelInfo(
            path=path,
            fingerprint=self.catalog.fingerprint,
            architecture=self.catalog.shape.architecture,
            resident_bytes=self.plan.weights_bytes,
            streamed_bytes_per_token=self.plan.streamed_bytes_per_token,
            io_mode=planned.io_mode if paged else None,
        )

    @property
    def active(self) -> bool:
        """Whether weights are paged (or ours to compute with); False: llama.cpp runs alone."""
        return self.paged is not None

    @property
    def model(self) -> core.Model | None:
        return self.paged.core if self.paged is not None else None

    @property
    def own_kernels(self) -> tuple[str, ...]:
        """Types of weights that our kernels compute with."""
        return self.paged.own_kernels if self.paged is not None else ()

    @property
    def residuals(self) -> Residuals | None:
        return self.paged.residuals if self.paged is not None else None

    @property
    def warm_start(self) -> WarmStart | None:
        return self.paged.warm_start if self.paged is not None else None

    def stats(self) -> RunStats:
        """Return the accounting since the model was opened or `reset_stats` was called.

        Raises UsageError when nothing is paged, ModelClosed after `close`.
        """
        return self._paged().stats(self.hardware.disk.sequential_bytes_s)

    def reset_stats(self) -> None:
        self._paged().core.reset_stats()

    def _paged(self) -> PagedModel:
        if self.paged is None:
            raise UsageError(
                "everything fits, so nothing is paged and there is nothing to account for",
                hint="look at `llm.nexus.active` first",
            )
        return self.paged


class _Closed:
    """Stands where a model and its context were."""

    def __getattr__(self, name: str) -> Any:
        raise ModelClosed(f"the model is closed ({name} was asked of it)", hint="open it again")


def _size(value: int | str | None, what: str) -> int | None:
    if isinstance(value, str):
        return parse_bytes(value, what=what)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise UsageError(
            f"{what} is {value!r}, neither a whole number of bytes nor a text",
            hint='write for instance "4G", "1.5G" or 4 << 30',
        )
    return value


def _request(arguments: dict[str, Any], **budget: Any) -> PlanRequest:
    """What the arguments of `llama_cpp.Llama` mean for memory."""

    def kv_type(name: str) -> str:
        value = arguments.get(name)
        if value is not None and value not in _KV_TYPES:
            known = ", ".join(f"{number} ({kind})" for number, kind in sorted(_KV_TYPES.items()))
            raise UsageError(
                f"{name} is {value!r}, which is no type of a KV cache",
                hint=f"use one of the numbers {known}, or leave it out",
            )
        return "f16" if value is None else _KV_TYPES[value]

    embedding = bool(arguments.get("embedding", False))
    n_ctx = arguments.get("n_ctx", 512)
    n_batch = arguments.get("n_batch", 512)
    if n_ctx:
        n_batch = min(n_ctx, n_batch)
    return PlanRequest(
        n_ctx=n_ctx,
        n_batch=n_batch,
        n_ubatch=min(n_batch, arguments.get("n_ubatch", 512)),
        kv_type_k=kv_type("type_k"),
        kv_type_v=kv_type("type_v"),
        flash_attn=bool(arguments.get("flash_attn", False)),
        logits_all=bool(arguments.get("logits_all", False)),
        n_threads=arguments.get("n_threads") or 0,
        n_seq_max=n_batch if embedding else 1,  # as llama_cpp.Llama does for embeddings
        kv_unified=embedding,
        **budget,
    )


class Llama(llama_cpp.Llama):
    """`llama_cpp.Llama` for models larger than memory. Bit-identical to an unmodified run.

    `model_path` is a GGUF or an NXF.

    Arguments beyond those of `llama_cpp.Llama`:
        ram: everything that the process may touch ("4G" or bytes); None: 80 % of what is free.
        weights: resident weights, their pools and residuals only (for small models and tests).
        plan: a `Plan`, or the file that `nexus plan -o` wrote, instead of a new one.
        policy: how streamed weights are read: "auto", "direct" or "buffered".
        pins: (regex, tier) pairs, or `Pin`s: tensors that the plan must not move.
        hardware: a profile to plan for; None: this machine, measured once and remembered.
        kernels: who multiplies by ternary weights (TQ1_0, TQ2_0, Q2_0, Q1_0): "ggml", "nexus"
            (ours, faster), "auto": ours where a trial shows the same bits as ggml's, or "opencl":
            resident ones on an OpenCL device; without one as "auto", with a warning.
        pin_cores: bind each thread that computes to a processor of its own, physical cores first;
            without effect where a system binds no threads (macOS).
        progress: called with (done, total) bytes while resident weights are read; True stops.
        warm_start: remember which experts a mixture uses most, and have them read before the first
            request; None: unless NEXUS_WARM_START is 0.
        residual: a file that `nexus quantize --residual` made for this model: while decoding, part
            of what quantization lost is added back, which changes what the model says. True: an
            NXF's own. Its size counts against `ram` and `weights`; without room for it nothing is
            corrected, and a `plan` without is refused.
        residual_share: part of the input channels to correct; None: as many as slow a token down
            by 5 %, measured when the model is opened.

    `n_gpu_layers=None` (the default) lets the plan decide; a number is obeyed.

    Raises DoesNotFit, FormatError, ReadFailed, ModelChanged, BackendUnavailable, OutOfMemory,
    and Interrupted when `progress` stopped the load.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        ram: int | str | None = None,
        weights: int | str | None = None,
        plan: Plan | str | os.PathLike[str] | None = None,
        policy: str = "auto",
        pins: Iterable[Pin | tuple[str, str]] = (),
        hardware: HardwareProfile | None = None,
        kernels: str = "auto",
        pin_cores: bool = False,
        progress: core.Progress | None = None,
        warm_start: bool | None = None,
        residual: str | os.PathLike[str] | bool | None = None,
        residual_share: float | None = None,
        n_gpu_layers: int | None = None,
        **arguments: Any,
    ) -> None:
        path = os.fsdecode(model_path)
        self._wishes = {
            "ram": ram,
            "weights": weights,
            "plan": plan,
            "policy": policy,
            "pins": (pins := tuple(pins)),
            "hardware": hardware,
            "kernels": kernels,
            "pin_cores": pin_cores,
            "warm_start": warm_start,
            "residual": residual,
            "residual_share": residual_share,
        }
        self._nexus: NexusHandle | None = None
        self._stack = contextlib.ExitStack()  # what close() unwinds, also if we fail before super
        request = _request(
            arguments,
            ram_bytes=_size(ram, "ram"),
            weights_bytes=_size(weights, "weights"),
            io_mode=policy,
            pins=tuple(p if isinstance(p, Pin) else Pin(*p) for p in pins),
            gpu_bytes=0 if n_gpu_layers == 0 else None,
        )
        table = read_residuals(path if residual is True else residual) if residual else None
        planned, table = plan_with_room(path, request, table, hardware=hardware, plan=plan)
        if residual is None and holds_residuals(planned.catalog):
            _log.info("%s holds residuals: residual=True adds them (other answers)", path)
        layers = planned.plan.n_gpu_layers if n_gpu_layers is None else n_gpu_layers
        paged = None
        catalog, tiers = planned.catalog, planned.plan.tiers
        kernels = usable_mode(kernels)
        ours = own_types(in_reach(catalog, planned.plan), kernels)
        # llama.cpp alone opens nothing but GGUF, whatever fits.
        alone = planned.plan.everything_fits and catalog.container == "gguf"
        claimed = plugin_kernels.claims(catalog, tiers, kernels, ours)
        if ours or claimed or table or pin_cores or not alone:
            device = kernels == "opencl"
            paged = PagedModel(
                catalog,
                manifest(catalog, planned.plan, planned.io_mode, ours, opencl=device),
                cache_slots=[cache.slots for cache in planned.plan.expert_caches],
                own_kernels=ours,
            )
            arguments.setdefault("offload_kqv", layers != 0)
        model = paged.core if paged is not None else None
        handle = NexusHandle(path, planned, paged)
        try:
            if model is not None:
                plugin_kernels.attach(model, catalog, claimed, kernels)
            extra = model is None and amx_works() is not False
            # Without us llama.cpp opens a split model by its first part only.
            first = path if model is not None else catalog.files[0].path
            with loads(model, extra_buffers=extra), interrupts_kept(), reasons_heard() as reasons:
                try:
                    super().__init__(first, n_gpu_layers=layers, **arguments)
                except ValueError as error:
                    named = model.take_error("loading the model") if model else None
                    raise named or load_failed(path, reasons, str(error)) from error
            adapter: Any = self._lora_adapter
            if adapter is not None and not adapter:
                # A null pointer, which llama-cpp-python takes for an adapter.
                raise FormatError(
                    f"llama.cpp cannot load {self.lora_path} as a LoRA adapter of {path}",
                    hint="verbose=True shows what it says",
                )
            self._nexus = handle
            if model is not None and pin_cores:
                handle.pinning = pin_threads(model, max(self.n_threads, self.n_threads_batch))
            if model is not None:
                model.finish_load(progress)
            self._watch_context()
            if paged is not None and table is not None:
                residuals = paged.attach(table, lambda name: tiers.get(name) in ("ram", "nvme"))
                residuals.start(self, residual_share)
            if paged is not None and planned.plan.expert_caches and wanted(warm_start):
                paged.start_warm()
            if model is not None and catalog.shape.n_experts:
                handle.router_watch = watch_routers(model, catalog, handle.info, self.n_batch)
        except BaseException:
            self._nexus = None  # nobody was told of it: nobody is told that it is closed
            self._free(paged)
            raise
        plugins().model_loaded(handle.info)

    @property
    def nexus(self) -> NexusHandle:
        if self._nexus is None:
            raise ModelClosed("the model is closed", hint="open it again")
        return self._nexus

    def __getstate__(self) -> dict[str, Any]:
        """What opens an equal model: the arguments of `llama_cpp.Llama`, and ours."""
        known: Any = super()
        return {**known.__getstate__(), **self._wishes}

    def _watch_context(self) -> None:
        """Give errors of this context their names, and let Ctrl-C stop it within a token."""
        context: Any = self._ctx  # whose methods are replaced
        callback = ctypes.cast(core.interrupted_callback(), bindings.ggml_abort_callback)
        bindings.llama_set_abort_callback(context.ctx, callback, None)
        context.decode = self._guarded(context.decode)
        context.encode = self._guarded(context.encode)

    def _guarded(self, call: Callable[..., None]) -> Callable[..., None]:
        def guarded(batch: Any) -> None:
            with core.interruptible(), interrupts_kept():
                try:
                    call(batch)
                except RuntimeError as error:
                    stopped = core.lib.nx_interrupted()
                    model = self.nexus.model
                    named = model.take_error("decoding") if model else None
                    if stopped:
                        raise _interruption() from error
                    if named is not None:
                        raise named from error
                    raise
            watch = self._nexus.router_watch if self._nexus is not None else None
            if watch is not None:
                watch.tell()

        return guarded

    def generate(
        self, tokens: Sequence[int], *args: Any, **kwargs: Any
    ) -> Generator[int, Sequence[int] | None, None]:
        """As `llama_cpp.Llama.generate`; tells the plugins when the request starts and ends."""
        handle = self.nexus
        read_bytes = handle.model.stats().bytes_read if handle.model else 0
        watch = RequestWatch(handle.info, len(tokens), read_bytes)
        inner = super().generate(tokens, *args, **kwargs)
        failure: BaseException | None = None
        try:
            token = next(inner, None)
            watch.first_ns = time.perf_counter_ns()
            while token is not None:
                watch.n_tokens += 1
                sent = yield token
                token = next(inner, None) if sent is None else inner.send(sent)
        except (StopIteration, GeneratorExit):  # no more, or no more are wanted
            return
        except BaseException as error:
            failure = error
            raise
        finally:
            inner.close()
            # The model may have been closed while the generator was suspended.
            if handle.paged is not None:
                handle.paged.tell_failures()
            read_bytes = handle.model.stats().bytes_read if handle.model else watch.read_before
            watch.end(read_bytes, failure)

    def close(self) -> None:
        """Give back every byte. The object cannot be used any more."""
        handle, self._nexus = self._nexus, None
        self._free(handle.paged if handle else None)
        if handle is not None:
            handle.paged = None
            plugins().model_closed(handle.info)

    def _free(self, paged: PagedModel | None) -> None:
        if paged is not None:
            paged.stop_warm()  # it looks at the model that goes
        super().close()
        closed: Any = _Closed()
        self._ctx = self._model = self._batch = self.tokenizer_ = closed
        if paged is not None:
            paged.close()

    def __del__(self) -> None:
        # An interpreter that shuts down has no modules left to close with.
        with contextlib.suppress(Exception):
            self.close()


def _interruption() -> BaseException:
    """What Ctrl-C raises. Python's own KeyboardInterrupt may have been lost in a log callback."""
    main = threading.current_thread() is threading.main_thread()
    if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        return KeyboardInterrupt()
    return Interrupted("the computation was interrupted")
