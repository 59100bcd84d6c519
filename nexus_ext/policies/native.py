"""Policies that are asked while tokens are computed: in C, or in Python once a layer.

What `choose` of a cache policy or of a predictor may return instead of a name. A struct in C
(native/include/nexus_plugin.h) costs about what its own code costs; an object in Python is asked
at most once for each layer and token, takes the interpreter's lock for it, and may be used to try
something out. plugins/docs/c-policies.md has the numbers.

Neither can change a result: an answer that is none, or an exception, disables the policy by name
for that model, and the built-in takes over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True, slots=True)
class NativePolicy:
    """A struct of nexus_plugin.h: `nxp_cache_policy` or `nxp_predictor`.

    With cffi: `NativePolicy("mine", int(ffi.cast("uintptr_t", lib.my_policy())), lib)`, with
    ctypes: `NativePolicy("mine", ctypes.addressof(struct), struct)`.
    """

    name: str
    address: int  # of the struct
    keepalive: object = None  # held for as long as a model may call what the struct points to
    automatic: bool = True  # a predictor: only while it is measured to help; False: always


@dataclass(frozen=True, slots=True)
class EvictionAsk:
    """Which experts leave the cache of one layer? Fields as those of `nxp_cache_ask`."""

    layer: int
    n_wanted: int
    experts: tuple[int, ...]  # the candidates
    ages: tuple[int, ...]  # graphs since each was used
    frequencies: tuple[float, ...]  # graphs that used each, halved every 64
    incoming: tuple[int, ...]  # who takes the slots
    ahead: bool  # they were predicted, and not asked for


@runtime_checkable
class LayerCachePolicy(Protocol):
    """A cache policy in Python, asked once a layer at most."""

    name: str

    def used(self, layer: int, experts: Sequence[int]) -> None:
        """See which experts a graph has asked a layer for, each once."""
        ...

    def victims(self, ask: EvictionAsk) -> Sequence[int]:
        """Return `ask.n_wanted` of `ask.experts`, each once; what is first leaves first."""
        ...


@runtime_checkable
class LayerPredictor(Protocol):
    """A predictor in Python, asked once a layer. `automatic = False` if it is to be on always."""

    name: str

    def routed(self, layer: int, tokens: Sequence[Sequence[int]]) -> None:
        """See what a router decided: the experts of each token of a graph."""
        ...

    def predict(self, layer: int, n_tokens: int, n_used: int, limit: int) -> Sequence[int]:
        """Return what the router of `layer`, computed next, will ask for: likeliest first.

        The first `limit` that are not cached are read. An empty answer is none.
        """
        ...
