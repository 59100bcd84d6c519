"""A cache policy for mixtures of experts, in C: nexus_ext's hook, and the struct behind it.

What it does is in native/policy.c, how it compares in README.md: `python -m nexus_policy_lfru
TRACE` replays a trace of `nexus trace` through it and through what nexus_ext brings.
"""

from __future__ import annotations

import ctypes
from importlib.util import find_spec

from nexus_ext import hookimpl
from nexus_ext.policies import CacheInfo, NativePolicy


def native_policy(file: str | None = None) -> NativePolicy:
    """Return the policy, to be given to a cache or to a replay; `file`: a library of one's own."""
    if file is None:
        found = find_spec("nexus_policy_lfru._policy")
        file = found.origin if found is not None else None
    if file is None:
        raise ImportError("nexus_policy_lfru is not built: pip install --no-build-isolation .")
    library = ctypes.CDLL(file)
    struct = ctypes.c_char.in_dll(library, "nexus_policy_lfru")
    return NativePolicy("lfru-history", ctypes.addressof(struct), library)


class LfruHistory:
    """Chooses the policy for every model with a cache of experts."""

    name = "lfru-history"

    def choose(self, info: CacheInfo) -> NativePolicy:
        return native_policy()


@hookimpl
def nexus_cache_policy() -> LfruHistory:
    return LfruHistory()
