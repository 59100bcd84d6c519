"""Decisions that are made once for each model, from a few numbers, by an object with a name."""

from __future__ import annotations

from nexus_ext.hooks import CacheInfo, CachePolicyName, IoInfo, IoMode, PredictorName


class WideMargin:
    """Use the page cache when what is streamed fits into half of the memory that is left."""

    name = "template-wide-margin"

    def choose(self, info: IoInfo) -> IoMode:
        room_bytes = info.available_bytes
        if info.limit_bytes is not None:  # in a memory cgroup the page cache counts as well
            room_bytes = min(room_bytes, info.limit_bytes)
        return (
            "buffered" if info.streamed_bytes * 2 <= room_bytes - info.resident_bytes else "direct"
        )


class RecencyWhenTight:
    """Go by recency alone where a cache holds less than two tokens use: there is no history."""

    name = "template-recency-when-tight"

    def choose(self, info: CacheInfo) -> CachePolicyName:
        return "lru" if info.slots < 2 * info.n_experts_used else "adaptive"


class OnlyWithRoom:
    """Predict only where a cache holds more than a token uses: guesses would push out what is."""

    name = "template-only-with-room"

    def choose(self, info: CacheInfo) -> PredictorName:
        return "auto" if info.slots > info.n_experts_used else "none"
