"""Residual correction from files: made from a model and its original, attached when it is opened.

A residual lies in memory as a whole and costs about four bits a weight there; a token uses a few
per cent of it. The kernels and the method are those of nexus_residual.h (DecDEC, OSDI 2025).
Products of one column are corrected: decoding, not prompts. It changes what the model says.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from nexus_ext import core, kernels
from nexus_ext.errors import DoesNotFit, FormatError, UsageError
from nexus_ext.formats import open_gguf
from nexus_ext.formats.residuals import (
    ResidualTable,
    read_residual,
    row_nbytes,
    write_residuals,
)
from nexus_ext.placement import Plan, PlanRequest
from nexus_ext.runtime.planning import Planned, hardware_profile, plan_model
from nexus_ext.runtime.weights import Weights
from nexus_ext.types import Catalog, Role, TensorInfo
from nexus_ext.units import format_bytes

if TYPE_CHECKING:
    from nexus_ext.hardware import HardwareProfile

_log = logging.getLogger("nexus_ext.runtime")

SUFFIX = ".nxr"
_FLOATS = ("F32", "F16", "BF16")
# Shares of the input channels that are tried, the largest that keeps to the time wins.
SHARES = (0.01, 0.02, 0.03, 0.06, 0.12, 0.25)
_TIMED_TOKENS = 24
DEFAULT_SLOWDOWN = 0.05


def correctable(catalog: Catalog) -> list[TensorInfo]:
    """Return the quantized matrices that are multiplied by: no experts, no embedding rows."""
    return [
        t
        for t in catalog.tensors
        if len(t.shape) == 2
        and t.type_name not in _FLOATS
        and t.name.endswith(".weight")
        and (t.role is not Role.TOKEN_EMBEDDING or t.tied_output)
    ]


def identity(weights: Weights) -> str:
    """Return what names a model here: its header, and the beginning of every quantized matrix.

    Two models with the same header and other weights must not pass for one another.
    """
    digest = xxhash.xxh3_128(weights.catalog.fingerprint.encode())
    for tensor in correctable(weights.catalog):
        digest.update(weights.first_row(tensor))
    return digest.hexdigest()


def make_residuals(
    source: str,
    quantized: str,
    target: str | None = None,
    *,
    only: str = "",
    n_threads: int = 0,
    overwrite: bool = False,
    progress: Callable[[str, int, int], None] = lambda tensor, done, total: None,
) -> ResidualTable:
    """Write what `quantized` lost against `source` (F16, BF16 or F32) beside it.

    `only` is a regular expression for names of tensors. One matrix is in memory at a time. Raises
    UsageError when the two do not belong together.
    """
    catalog = open_gguf(quantized)
    exact, rough = Weights(open_gguf(source)), Weights(catalog)
    tensors = [t for t in correctable(catalog) if re.search(only, t.name)]
    if not tensors:
        raise UsageError(
            f"{quantized} has no quantized matrix that a residual could correct",
            hint="experts are not corrected; quantize a dense model first",
        )
    for tensor in tensors:
        original = exact.tensors.get(tensor.name)
        if original is None or original.shape != tensor.shape or original.type_name not in _FLOATS:
            found = "missing" if original is None else f"{original.type_name} of {original.shape}"
            raise UsageError(
                f"{tensor.name} of {source} is {found}, which is not what {quantized} was made of",
                hint="name the original that was quantized",
            )

    def encoded() -> Iterator[tuple[str, Any, Any]]:
        for number, tensor in enumerate(tensors):
            progress(tensor.name, number + 1, len(tensors))
            lost = exact.rows(exact.tensors[tensor.name], slice(None)).astype(np.float32)
            lost -= rough.rows(tensor, slice(None))
            found = kernels.encode_residual(lost, n_threads or os.cpu_count() or 1)
            yield tensor.name, found.codes, found.scales

    return write_residuals(
        target or quantized + SUFFIX,
        identity(rough),
        encoded(),
        expected_nbytes=sum(t.shape[0] * row_nbytes(t.shape[1]) + 4 * t.shape[1] for t in tensors),
        overwrite=overwrite,
    )


def checked(table: ResidualTable, catalog: Catalog) -> ResidualTable:
    """Return the table of residuals that were made for this model. UsageError otherwise."""
    if table.fingerprint != identity(Weights(catalog)):
        raise UsageError(
            f"{table.path} was made for another model than {catalog.files[0].path}",
            hint="make it anew with `nexus quantize --residual`",
        )
    return table


def plan_with_room(
    path: str,
    request: PlanRequest,
    table: ResidualTable | None,
    *,
    hardware: HardwareProfile | None = None,
    plan: Plan | str | os.PathLike[str] | None = None,
) -> tuple[Planned, ResidualTable | None]:
    """Plan a model with residuals beside it; without room for them, plan it alone and say so.

    A plan that is given is taken as it is. Raises what `plan_model` raises, and UsageError for
    residuals of another model.
    """
    if table is None:
        return plan_model(path, request, hardware=hardware, plan=plan), None
    hardware = hardware or hardware_profile(path)
    less = request
    if plan is None and (request.ram_bytes is not None or request.weights_bytes is None):
        ram_bytes = request.ram_bytes or int(0.8 * hardware.memory.available_bytes)
        less = replace(request, ram_bytes=max(1, ram_bytes - table.nbytes))
    try:
        planned = plan_model(path, less, hardware=hardware, plan=plan)
    except DoesNotFit:
        _log.warning(
            "there is no room for the %s of residuals in %s: nothing is corrected",
            format_bytes(table.nbytes),
            table.path,
        )
        return plan_model(path, request, hardware=hardware), None
    return planned, checked(table, planned.catalog)


class Residuals:
    """The residuals of an open model."""

    def __init__(
        self, table: ResidualTable, model: core.Model, is_ours: Callable[[str], bool]
    ) -> None:
        """Read and attach those whose matrices the CPU multiplies by; nothing is corrected yet.

        Raises FormatError or OutOfMemory.
        """
        here = tuple(t for t in table.tensors if is_ours(t.name))
        self.table = replace(table, tensors=here)
        self.share = 0.0
        self._model = model
        for stored in here:
            codes, scales = read_residual(table, stored)
            if not np.isfinite(np.frombuffer(scales, np.float32)).all():
                raise FormatError(
                    f"{table.path}: {stored.name} has scales that are not finite",
                    hint="make it anew with `nexus quantize --residual`",
                )
            model.attach_residual(stored.name, codes, scales, 0)

    def set_share(self, share: float) -> None:
        """Correct this share of each matrix's input channels (0 to 1) from the next token on."""
        if not 0 <= share <= 1:
            raise UsageError(f"a share of channels is between 0 and 1, not {share:g}")
        for stored in self.table.tensors:
            k = round(share * stored.n_in)
            self._model.set_residual_k(stored.name, max(k, 1) if share else 0)
        self.share = share

    def bytes_per_token(self) -> int:
        """Return what is read of the residuals for a token."""
        return sum(
            round(self.share * t.n_in) * row_nbytes(t.n_out) + 4 * t.n_out
            for t in self.table.tensors
            if self.share
        )

    def start(self, llm: Any, share: float | None) -> None:
        """Correct `share` of the channels; None: as many as a token has time for."""
        if share is not None:
            self.set_share(share)
            return
        batch, token = llm._batch, max(0, int(llm.token_bos()))

        def decode() -> None:
            llm._ctx.kv_cache_clear()
            batch.set_batch(batch=[token], n_past=0, logits_all=False)
            llm._ctx.decode(batch)

        self.tune(decode)
        llm._ctx.kv_cache_clear()

    def tune(
        self, decode: Callable[[], None], slowdown: float = DEFAULT_SLOWDOWN, n: int = _TIMED_TOKENS
    ) -> dict[float, float]:
        """Take the largest share that slows a token down by no more than `slowdown`.

        `decode` computes one token. Shares take turns, so that a machine that is busy for a while
        is busy for all of them; the median of each counts. Returns seconds a token by share.
        """
        shares = (0.0, *SHARES)
        times: dict[float, list[float]] = {share: [] for share in shares}
        for share in shares:  # pages and caches
            self.set_share(share)
            decode()
        for _ in range(n):
            for share in shares:
                self.set_share(share)
                begin = time.perf_counter()
                decode()
                times[share].append(time.perf_counter() - begin)
        found = {share: median(values) for share, values in times.items()}
        self.set_share(chosen_share(found, slowdown))
        _log.info("residuals: %.0f %% of the channels", 100 * self.share)
        return found


def chosen_share(times: dict[float, float], slowdown: float) -> float:
    """Return the largest share below the first that takes more than (1 + slowdown) times 0's."""
    limit, best = times[0.0] * (1 + slowdown), 0.0
    for share in sorted(times):
        if times[share] > limit:
            break
        best = share
    return best
