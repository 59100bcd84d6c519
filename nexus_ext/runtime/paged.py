"""A model of the core with all that belongs to it: opened the same way by whoever opens one.

The core reads and pages; here it gets what plugins decide (which expert is evicted, how experts are
predicted), residuals, and the popularity of its experts, and gives an account of itself. Where its
weights are to be, and which llama.cpp context computes with it, is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nexus_ext import core, kernels
from nexus_ext.formats.residuals import ResidualTable
from nexus_ext.plugins import CACHE_HOOK, PREDICTOR_HOOK, plugins
from nexus_ext.policies import CacheInfo
from nexus_ext.runtime import backend
from nexus_ext.runtime.popularity import WarmStart
from nexus_ext.runtime.residual import Residuals
from nexus_ext.runtime.stats import RunStats, run_stats
from nexus_ext.types import Catalog


class PagedModel:
    """An open model of the core. `close` gives back every byte."""

    def __init__(
        self,
        catalog: Catalog,
        manifest: str,
        *,
        cache_slots: Sequence[int] = (),
        own_kernels: tuple[str, ...] = (),
    ) -> None:
        """Open the files and reserve memory; llama.cpp and `finish_load` read.

        cache_slots: the slots of each cache of experts, at most. Raises BackendUnavailable,
        ReadFailed, ModelChanged, OutOfMemory, FormatError, or PluginError.
        """
        backend.register()
        self.catalog = catalog
        self.own_kernels = own_kernels  # types of weights that our kernels compute with
        self.residuals: Residuals | None = None
        self.warm_start: WarmStart | None = None
        self._plugins = plugins()  # who chose is told of failures, whoever is asked by then
        self._told: set[tuple[str, str, str]] = set()  # (plugin, hook, why)
        self.core = core.Model(manifest, catalog.header)
        if not cache_slots:
            return
        shape = catalog.shape
        cached = [catalog.tensors[extent].layer for extent in self.core.popularity()]
        info = CacheInfo(
            len(cache_slots),
            shape.n_experts,
            shape.n_experts_used,
            cache_slots[0],
            fingerprint=catalog.fingerprint,
            layers=tuple(layer for layer in cached if layer is not None),
        )
        try:
            self._plugins.choose_cache(info, self.core.set_cache_policy)
            self._plugins.choose_predictor(info, self.core.set_predictor)
        except BaseException:
            self.close()
            raise

    def attach(self, table: ResidualTable, is_ours: Callable[[str], bool]) -> Residuals:
        """Read the residuals of those matrices that the CPU multiplies by; see `Residuals`.

        Nothing is corrected before a share is set. Raises FormatError or OutOfMemory.
        """
        self.residuals = Residuals(table, self.core, is_ours)
        return self.residuals

    def start_warm(self) -> None:
        """Read the experts that were used most into empty slots, until the first graph runs."""
        self.warm_start = WarmStart(self.core, self.catalog)
        self.warm_start.start()

    def stats(self, disk_bytes_s: float) -> RunStats:
        """Return the accounting since the model was opened or its statistics were reset.

        disk_bytes_s: what the disk gives, for the bound. Raises ModelClosed after `close`.
        """
        model = self.core
        file = model.file_io()
        told = {(name, hook) for name, hook, _ in self._told}  # of these the core says itself why
        failed = [
            f"{name}: {why}"
            for name, hook, why in self._plugins.disabled()
            if (name, hook) not in told
        ]
        return run_stats(
            model.stats(),
            disk_bytes_s,
            io_engine=model.io_engine(),
            io_mode="direct" if file.direct else "buffered",
            direct_reason=file.reason,
            prediction=model.prediction(),
            cache_policy=model.cache_policy(),
            predictor=model.predictor_plugin(),
            failed=tuple(failed),
            kernels=kernels.current_isa() if self.own_kernels else "ggml",
            products=model.own_products(),
        )

    def tell_failures(self) -> None:
        """Log the policies of plugins that the core has disabled since it was last asked."""
        for hook, use in (
            (CACHE_HOOK, self.core.cache_policy()),
            (PREDICTOR_HOOK, self.core.predictor_plugin()),
        ):
            if use.why and (use.plugin, hook, use.why) not in self._told:
                self._told.add((use.plugin, hook, use.why))
                what = f"{use.name!r} was disabled: {use.why}"
                self._plugins.failed_while_running(use.plugin, hook, what)

    def stop_warm(self) -> None:
        """Read no more ahead, and remember what experts were used."""
        warm_start, self.warm_start = self.warm_start, None
        if warm_start is not None:
            warm_start.stop()

    def close(self) -> None:
        """Give back every byte."""
        self.stop_warm()
        if self.core.is_open:
            self.tell_failures()
        self.core.release()
