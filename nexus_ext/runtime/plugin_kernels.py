"""Which resident weights kernels of plugins multiply by, and whether they give ggml's bits.

A provider claims tensors by type and size. With kernels="auto" its function is tried first on rows
of the model itself, for every length of row that it claims; with "nexus" what it can compute is
enough. A plugin that cannot be used is disabled for the hook by name, and ggml computes.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from nexus_ext import core, native_kernels
from nexus_ext.errors import PluginError
from nexus_ext.plugin_registry import show
from nexus_ext.plugins import Rubbish, plugins
from nexus_ext.plugins.asking import of_kind
from nexus_ext.policies import KernelInfo, KernelProvider
from nexus_ext.types import Catalog

HOOK = "nexus_kernel_provider"
MODES = ("auto", "nexus", "opencl")  # of `Llama`'s argument `kernels`: not "ggml"
_TRIAL_ROWS = 64

_log = logging.getLogger("nexus_ext.plugins")
_kept: list[KernelProvider] = []  # until the process ends: models may outlive their owners


@dataclass(frozen=True, slots=True)
class Claim:
    """What one plugin multiplies by."""

    plugin: str
    provider: KernelProvider
    tensors: tuple[int, ...]  # numbers in the catalog


def claims(
    catalog: Catalog, tiers: Mapping[str, str], mode: str, taken: Sequence[str]
) -> list[Claim]:
    """Return who claims which resident matrices; `taken` are types that we multiply by ourselves.

    What is claimed twice is the first plugin's, by name. Nothing is asked with kernels="ggml".
    """
    if mode not in MODES:
        return []
    free = {
        number: KernelInfo("MUL_MAT", tensor.type_name, tensor.shape[0], tensor.shape[1])
        for number, tensor in enumerate(catalog.tensors)
        if len(tensor.shape) == 2
        and tiers.get(tensor.name) in ("ram", "host")
        and tensor.type_name.lower() not in taken
        and tensor.name != "token_embd.weight"  # whose rows are fetched
    }
    kind: type[KernelProvider] = KernelProvider  # type: ignore[type-abstract]
    found = []
    nothing: list[int] = []
    for name, provider in plugins().collect(HOOK, lambda answer: of_kind(answer, kind)):
        ask = partial(_claimed, name, provider, free)
        tensors = plugins().guarded(name, HOOK, ask, nothing)
        for number in tensors:
            del free[number]
        if tensors:
            found.append(Claim(name, provider, tuple(tensors)))
    return found


def _claimed(name: str, provider: KernelProvider, free: Mapping[int, KernelInfo]) -> list[int]:
    tensors = []
    for number, info in free.items():
        claimed: object = provider.claims(info)
        if type(claimed) is not bool:
            raise Rubbish(f"answered {show(claimed)} instead of whether it claims {info}")
        if claimed:
            tensors.append(number)
    if not tensors:
        return []
    if type(provider.function) is not int:
        raise Rubbish(f"has a function {show(provider.function)}, which is no address")
    try:
        kind = native_kernels.kernel_type(name, provider.function)
    except PluginError as error:
        raise Rubbish(f"cannot be used: {error}") from error
    for number in tensors:
        if free[number].type_name.lower() != kind:
            raise Rubbish(
                f"claims weights of type {free[number].type_name}, but its kernel is for {kind}"
            )
    return tensors


def attach(model: core.Model, catalog: Catalog, wanted: Sequence[Claim], mode: str) -> int:
    """Have claimed weights multiplied by plugins; return how many. Before the model is loaded."""
    n_taken = 0
    for claim in wanted:
        provider = claim.provider
        problem = _trial(model, catalog, claim, identical=mode != "nexus")
        if problem:
            plugins().note(claim.plugin, HOOK, problem)
            continue
        _kept.append(provider)
        try:
            n = native_kernels.use_kernel(
                model.pointer, claim.plugin, provider.function, claim.tensors
            )
        except PluginError as error:
            plugins().disable(claim.plugin, HOOK, f"cannot be used: {error}", error)
            continue
        _log.info("kernel %r of plugin %r multiplies by %d weights", provider.name, claim.plugin, n)
        n_taken += n
    return n_taken


def _trial(model: core.Model, catalog: Catalog, claim: Claim, *, identical: bool) -> str:
    """Return why a kernel is not used; "" when it is."""
    probe = ctypes.CDLL(str(core.BACKEND_PATH)).nx_backend_kernel_same_bits
    probe.restype = ctypes.c_int
    probe.argtypes = [ctypes.c_void_p, ctypes.c_char_p, *[ctypes.c_uint64] * 3]
    tried = set()
    for number in claim.tensors:
        tensor = catalog.tensors[number]
        n_in, n_rows = tensor.shape[0], min(tensor.shape[1], _TRIAL_ROWS)
        if n_in in tried:
            continue
        tried.add(n_in)
        rows = native_kernels.stored_rows(model.pointer, number, n_rows * tensor.row_nbytes)
        if rows is None:
            return f"was not tried: {tensor.name} cannot be read"
        same = probe(claim.provider.function, rows, len(rows), n_in, n_rows)
        if same < 0:
            return f"is not used: this ggml has no place for it ({tensor.type_name})"
        if not same and identical:
            return (
                f"is not used: rows of {n_in} {tensor.type_name} come out with other bits than "
                'ggml\'s (kernels="nexus" uses it all the same)'
            )
    return ""
