"""The built-in cache policy: recency by octaves, frequency within, for every model."""

from __future__ import annotations

from nexus_ext.hookspecs import hookimpl
from nexus_ext.policies.base import CacheInfo, CachePolicy, CachePolicyName


class RecencyThenFrequency:
    """The policy of `policy_lfru` in native/cache.c, whatever the model."""

    name = "recency-then-frequency"

    def choose(self, info: CacheInfo) -> CachePolicyName:
        return "lfru"


@hookimpl
def nexus_cache_policy() -> CachePolicy:
    return RecencyThenFrequency()
