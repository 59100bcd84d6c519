"""Residual correction from files: made from a model and its original, attached when it is opened.

A residual lies in memory as a whole and costs about four bits a weight there; a token uses a few
per cent of it. The kernels and the method are those of nexus_residual.h (DecDEC, OSDI 2025).
Products of one column are corrected: decoding, not prompts. It changes what the model says.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from nexus_ext import core, kernels
from nexus_ext.errors import DoesNotFit, FormatError, UsageError
from nexus_ext.formats import open_gguf
from nexus_ext.formats.residuals import (
    ResidualTable,
    StoredResidual,
    read_residual,
    row_nbytes,
    write_residuals,
)
from nexus_ext.placement import Plan, PlanRequest
from nexus_ext.runtime.planning import Planned, hardware_profile, plan_model
from nexus_ext.runtime.residual_tuning import (
    Effect,
    Floats,
    Observed,
    hedged,
    observe,
)
from nexus_ext.runtime.weights import Weights
from nexus_ext.types import Catalog, Role, TensorInfo
from nexus_ext.units import format_bytes

if TYPE_CHECKING:
    from nexus_ext.hardware import HardwareProfile

_log = logging.getLogger("nexus_ext.runtime")

SUFFIX = ".nxr"
_FLOATS = ("F32", "F16", "BF16")
DEFAULT_SLOWDOWN = 0.05
_TUNED_TOKENS, _TUNED_S = 24, 20.0
_PAGE = 4096
_LAYER = re.compile(r"blk\.\d+\.")
_SHARED = {  # matrices that multiply the same input, whose channels are chosen once for all
    **dict.fromkeys(("attn_q", "attn_k", "attn_v"), "attn_qkv"),
    **dict.fromkeys(("ffn_gate", "ffn_up"), "ffn_gate_up"),
}


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

    They count against whatever budget there is. A plan that is given keeps every weight where it
    is: residuals take what it has set aside for them or leaves free. Raises what `plan_model`
    raises, DoesNotFit when a given plan has no such room, and UsageError for residuals of another
    model.
    """
    if table is None:
        return plan_model(path, request, hardware=hardware, plan=plan), None
    need = memory_nbytes(table)
    if plan is not None:
        planned = plan_model(path, request, hardware=hardware, plan=plan)
        name = "the plan" if isinstance(plan, Plan) else f"the plan {os.fspath(plan)!r}"
        planned = replace(planned, plan=_with_residuals(planned.plan, name, table.path, need))
        return planned, checked(table, planned.catalog)
    hardware = hardware or hardware_profile(path)
    try:
        planned = plan_model(path, replace(request, residual_bytes=need), hardware=hardware)
    except DoesNotFit:
        # Without a word when the model alone does not fit either: that is the error then.
        planned = plan_model(path, request, hardware=hardware)
        _log.warning(
            "there is no room for the %s of residuals in %s: nothing is corrected",
            format_bytes(need),
            table.path,
        )
        return planned, None
    return planned, checked(table, planned.catalog)


def memory_nbytes(table: ResidualTable) -> int:
    """Return what residuals take in memory, in whole pages."""
    return sum(
        -(-part // _PAGE) * _PAGE for t in table.tensors for part in (t.codes_nbytes, 4 * t.n_out)
    )


def _with_residuals(plan: Plan, name: str, path: str, need: int) -> Plan:
    """Return a plan that was given with `need` bytes for residuals, out of what it leaves free."""
    more = max(0, need - plan.breakdown["residuals"])
    free, limit = plan.breakdown["free"], plan.budget.weights_bytes
    if limit is not None:
        free = min(free, limit - plan.weights_bytes)
    if more > free:
        raise DoesNotFit(
            f"{name} leaves {format_bytes(plan.breakdown['residuals'] + free)} for residuals, and "
            f"those in {path} take {format_bytes(need)}",
            hint="make a plan with room for them (`nexus plan MODEL --residual FILE -o PLAN`), or "
            "run without residuals",
            smallest_bytes=need,
        )
    parts = {**plan.breakdown}
    parts["residuals"] += more
    parts["free"] -= more
    return replace(plan, breakdown=parts)


def kind_of(name: str) -> str:
    """Return what matrices of all layers are tuned together: attn_qkv, ffn_down, output, ..."""
    stem = _LAYER.sub("", name).removesuffix(".weight")
    return _SHARED.get(stem, stem)


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
        self.kinds = tuple(dict.fromkeys(kind_of(t.name) for t in here))
        self.shares = dict.fromkeys(self.kinds, 0.0)
        self._model = model
        for stored in here:
            codes, scales = read_residual(table, stored)
            if not np.isfinite(np.frombuffer(scales, np.float32)).all():
                raise FormatError(
                    f"{table.path}: {stored.name} has scales that are not finite",
                    hint="make it anew with `nexus quantize --residual`",
                )
            model.attach_residual(stored.name, codes, scales, 0)

    @property
    def share(self) -> float:
        """The part of all codes that a token reads."""
        total = sum(t.codes_nbytes for t in self.table.tensors)
        read = sum(self._k(t) * row_nbytes(t.n_out) for t in self.table.tensors)
        return read / total if total else 0.0

    def set_share(self, share: float) -> None:
        """Correct this share of each matrix's input channels (0 to 1) from the next token on."""
        self.set_shares(dict.fromkeys(self.kinds, share))

    def set_shares(self, shares: Mapping[str, float]) -> None:
        """Correct a share of the input channels of each kind of matrix; kinds left out stay."""
        for kind, share in shares.items():
            if not 0 <= share <= 1:
                raise UsageError(
                    f"a share of channels is between 0 and 1, not {share:g} ({kind})",
                    hint="0.06 corrects 6 % of them",
                )
            if kind not in self.kinds:
                raise UsageError(
                    f"there are no residuals of {kind!r}", hint=f"kinds are {', '.join(self.kinds)}"
                )
        self.shares.update(shares)
        for stored in self.table.tensors:
            if kind_of(stored.name) in shares:
                self._model.set_residual_k(stored.name, self._k(stored))

    def _k(self, stored: StoredResidual) -> int:
        share = self.shares[kind_of(stored.name)]
        return max(round(share * stored.n_in), 1) if share else 0

    def bytes_per_token(self) -> int:
        """Return what is read of the residuals for a token."""
        return sum(
            self._k(t) * row_nbytes(t.n_out) + 4 * t.n_out for t in self.table.tensors if self._k(t)
        )

    def start(self, llm: Any, share: float | None) -> None:
        """Correct `share` of the channels; None: as many as a token has time for."""
        if share is None:
            self.tune(llm)
        else:
            self.set_share(share)

    def observe(self, llm: Any) -> Observed:
        """Measure what each kind costs and repairs; what the context holds is forgotten."""
        if llm.context_params.embeddings:
            raise UsageError(
                "shares of channels are tuned by what a model writes, and this one is open for "
                "embeddings",
                hint="give residual_share, for instance 0.06",
            )
        batch, n_vocab = llm._batch, llm.n_vocab()

        def run(shares: Mapping[str, float], token: int, position: int) -> Floats:
            self.set_shares(shares)
            if not llm._ctx.kv_cache_seq_rm(0, position, -1):  # a recurrent model: each token alone
                llm._ctx.kv_cache_clear()
                position = 0
            batch.set_batch(batch=[token], n_past=position, logits_all=False)
            llm._ctx.decode(batch)
            return np.ctypeslib.as_array(llm._ctx.get_logits(), (n_vocab,))

        llm._ctx.kv_cache_clear()
        try:
            return observe(
                self.kinds,
                run,
                max(0, int(llm.token_bos())),
                most_tokens=min(_TUNED_TOKENS, llm.n_ctx() - 1),
                most_seconds=_TUNED_S,
            )
        finally:
            llm._ctx.kv_cache_clear()
            self.set_share(0.0)

    def tune(self, llm: Any, slowdown: float = DEFAULT_SLOWDOWN) -> Observed:
        """Correct what repairs most while a token takes (1 + slowdown) times as long, measured."""
        seen = self.observe(llm)
        room_ns = int(1e9 * slowdown * seen.token_s)
        self.set_shares(hedged(seen.effects, room_ns, lambda e, share: 1e9 * e.cost(share)))
        chosen = ", ".join(f"{kind} {100 * share:g} %" for kind, share in self.shares.items())
        _log.info("residuals: of the channels of %s", chosen)
        return seen

    def spread(self, seen: Observed, share: float) -> None:
        """Correct what repairs most for the bytes that `share` of all channels would take."""
        nbytes = dict.fromkeys(self.kinds, 0)
        for stored in self.table.tensors:
            nbytes[kind_of(stored.name)] += stored.codes_nbytes

        def cost(effect: Effect, at: float) -> float:
            return at * nbytes[effect.kind]

        self.set_shares(hedged(seen.effects, int(share * sum(nbytes.values())), cost))
