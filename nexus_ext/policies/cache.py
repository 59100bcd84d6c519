"""The built-in cache policy: by recency or by rates of use, whichever has missed less of late."""

from __future__ import annotations

from nexus_ext.hookspecs import hookimpl
from nexus_ext.policies.base import CacheInfo, CachePolicy, CachePolicyName


class Adaptive:
    """The policy of native/policy_adaptive.c, whatever the model."""

    name = "adaptive"

    def choose(self, info: CacheInfo) -> CachePolicyName:
        return "adaptive"


@hookimpl
def nexus_cache_policy() -> CachePolicy:
    return Adaptive()
