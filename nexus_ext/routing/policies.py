"""Eviction policies as pure functions: a score for each record, and the lowest is evicted.

The online ones are those of native/policy_builtin.c, formula for formula, so that a replay counts
what the cache would. A policy sees of a record what C shows it, and Belady's also the future. The
default, which learns, has no formula: its code in C is replayed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Reals = npt.NDArray[np.float64]
    Integers = npt.NDArray[np.int64]

BELADY: Final = "belady"
HALF_LIFE: Final = 64.0  # tokens: HALF_LIFE of native/policy.c


@dataclass(frozen=True, slots=True)
class Facts:
    """What a policy sees of records that may be evicted. Arrays of one shape."""

    expert: Integers
    age: Integers  # tokens since it was used last
    frequency: npt.NDArray[np.float32]  # uses, decayed by half every HALF_LIFE tokens
    next_use: Integers  # token that uses it next; only Belady may look
    rng: np.random.Generator


Policy = Callable[[Facts], "Reals"]


def lru(facts: Facts) -> Reals:
    return -facts.age.astype(float)


def lfu(facts: Facts) -> Reals:
    return facts.frequency - 1e-9 * facts.age


def lfru(facts: Facts) -> Reals:
    """Frequency, and less of it the longer a record was not used: frequency / sqrt(age + 8)."""
    import numpy as np

    scores: Reals = facts.frequency / np.sqrt(facts.age + 8.0) - 1e-9 * facts.age
    return scores


def least_stale(facts: Facts) -> Reals:
    import numpy as np

    fresh = np.where(facts.age > 1, 0.0, 1e6)
    return fresh + facts.expert - 1e-3 * np.minimum(facts.age, 1000)


def random(facts: Facts) -> Reals:
    return facts.rng.random(facts.age.shape)


def belady(facts: Facts) -> Reals:
    """Farthest next use first (Belady 1966): no policy that must hold what it reads does better."""
    return -facts.next_use.astype(float)


POLICIES: Final[dict[str, Policy]] = {
    "lfru": lfru,
    "lru": lru,
    "lfu": lfu,
    "least-stale": least_stale,
    "random": random,
    BELADY: belady,
}
DEFAULT: Final = "adaptive"
ONLINE: Final = (DEFAULT, "lfru", "lru", "lfu", "least-stale", "random")
NONE: Final = "none"  # no cache
GLOBAL_LRU: Final = "global-lru"  # one cache for all layers
