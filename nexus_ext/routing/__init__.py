"""What routers decided, token by token, and what caches of experts would have made of it.

Pure functions of data: a trace is a value with a binary form, a replay is arithmetic on it. No I/O,
no clock, no model.
"""

from __future__ import annotations

from nexus_ext.routing.comparison import Comparison, compare
from nexus_ext.routing.evaluation import (
    ReadAhead,
    Score,
    follows,
    joined,
    mean_score,
    rank_popular,
    rank_previous,
    read_ahead,
    score,
    split,
)
from nexus_ext.routing.policies import BELADY, DEFAULT, GLOBAL_LRU, NONE, ONLINE, POLICIES
from nexus_ext.routing.replay import Replay, decisions, global_lru, repeats, replay
from nexus_ext.routing.report import Row, default_sizes, report, slots_of, slots_of_share
from nexus_ext.routing.trace import RoutingTrace, TracedLayer

__all__ = [
    "BELADY",
    "DEFAULT",
    "GLOBAL_LRU",
    "NONE",
    "ONLINE",
    "POLICIES",
    "Comparison",
    "ReadAhead",
    "Replay",
    "RoutingTrace",
    "Row",
    "Score",
    "TracedLayer",
    "compare",
    "decisions",
    "default_sizes",
    "follows",
    "global_lru",
    "joined",
    "mean_score",
    "rank_popular",
    "rank_previous",
    "read_ahead",
    "repeats",
    "replay",
    "report",
    "score",
    "slots_of",
    "slots_of_share",
    "split",
]
