"""What caches of given sizes would have hit, had they served a trace.

As native/cache.c does it when tokens are computed one at a time: each layer has slots of its own. A
token holds all experts that it uses; what is there is held first, then each missing expert takes an
empty slot, or that of the record which the policy values least.

All layers and all sizes advance together, one token at a time: each (size, layer) is a lane, a row
of the arrays below.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from nexus_ext.errors import UsageError
from nexus_ext.routing.policies import GLOBAL_LRU, HALF_LIFE, NONE, POLICIES, Facts
from nexus_ext.routing.trace import MAX_EXPERTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt

    from nexus_ext.routing.trace import RoutingTrace

    Integers = npt.NDArray[np.int64]
    Reals = npt.NDArray[np.float64]
    Singles = npt.NDArray[np.float32]
    Flags = npt.NDArray[np.bool_]

ByCode = Callable[["RoutingTrace", str, "Sequence[int]"], "Replay"]  # slots of each layer
NEVER: Final = 1 << 40  # a token that no trace reaches
FORGOTTEN: Final = 1 << 14  # tokens after which a decayed frequency is 0 in single precision


@dataclass(frozen=True, slots=True)
class Replay:
    """What one policy did with one number of slots in each layer."""

    policy: str
    slots: tuple[int, ...]  # of each layer
    uses: tuple[int, ...]  # of each layer: distinct experts of each token
    misses: tuple[int, ...]
    read_bytes: int
    n_tokens: int

    @property
    def hit_rate(self) -> float:
        uses = sum(self.uses)
        return 1.0 - sum(self.misses) / uses if uses else 0.0

    @property
    def bytes_per_token(self) -> float:
        return self.read_bytes / self.n_tokens if self.n_tokens else 0.0


def decisions(trace: RoutingTrace) -> Integers:
    """Return the distinct experts of each token, -1 where there are fewer.

    Shape: (n_tokens, n_layers, most experts a token).
    """
    import numpy as np

    most = max((layer.n_used for layer in trace.layers), default=0)
    out = np.full((trace.n_tokens, len(trace.layers), most), -1, np.int64)
    for i, layer in enumerate(trace.layers):
        out[:, i, : layer.n_used] = layer.numbers()
        _drop_repeats(out[:, i])
    return out


def _drop_repeats(numbers: Integers) -> None:
    """Set to -1 what stands in the same row before."""
    import numpy as np

    for k in range(1, numbers.shape[1]):
        numbers[np.any(numbers[:, :k] == numbers[:, k : k + 1], axis=1), k] = -1


def repeats(trace: RoutingTrace) -> float:
    """Return the part of all experts used that the token before used as well."""
    import numpy as np

    used = decisions(trace)
    now, before = used[1:, :, :, None], used[:-1, :, None, :]
    repeated = np.any(now == before, axis=3) & (used[1:] >= 0)
    return float(repeated.sum() / max((used[1:] >= 0).sum(), 1))


def next_uses(used: Integers, n_experts: int) -> Integers:
    """Return for each use the token that uses the same expert of the layer next, else NEVER."""
    import numpy as np

    n_tokens, n_layers, _ = used.shape
    upcoming = np.full((n_layers, n_experts + 1), NEVER, np.int64)  # the last column: for -1
    out = np.empty_like(used)
    rows = np.arange(n_layers)[:, None]
    for at in range(n_tokens - 1, -1, -1):
        out[at] = upcoming[rows, used[at]]
        upcoming[rows, used[at]] = at
    return out


class _Lanes:
    """The caches of all lanes, and one token after another through them."""

    def __init__(self, policy: str, n_slots: Integers, n_experts: int, seed: int) -> None:
        import numpy as np

        self._score = POLICIES[policy]
        self._rng = np.random.default_rng(seed)
        n_lanes, most = len(n_slots), int(n_slots.max(initial=1))
        self.n_slots = n_slots
        self.absent = np.arange(most)[None, :] >= n_slots[:, None]
        self.lanes = np.arange(n_lanes)[:, None]
        # Of each slot, (n_lanes, most):
        self.expert = np.full((n_lanes, most), -1, np.int64)
        self.last_use = np.zeros((n_lanes, most), np.int64)
        self.frequency = np.zeros((n_lanes, most), np.float32)
        self.next_use = np.zeros((n_lanes, most), np.int64)
        # Of each expert, (n_lanes, n_experts + 1); the last column stands for -1:
        self.slot_of = np.full((n_lanes, n_experts + 1), -1, np.int64)
        self.clock = 0
        self.filled = np.zeros(n_lanes, np.int64)
        self.misses = np.zeros(n_lanes, np.int64)
        self.decay = np.exp2(-np.arange(FORGOTTEN) / HALF_LIFE).astype(np.float32)

    def _decayed(self, age: Integers) -> Singles:
        import numpy as np

        return self.decay[np.minimum(age, FORGOTTEN - 1)]

    def step(self, experts: Integers, next_use: Integers) -> None:
        """Serve one token: (n_lanes, most) experts, and when they are used next."""
        import numpy as np

        self.clock += 1
        used = experts >= 0
        slot = self.slot_of[self.lanes, experts]
        lane, k = np.nonzero(used & (slot >= 0))
        at = slot[lane, k]
        age = self.clock - self.last_use[lane, at]
        self.frequency[lane, at] = self.frequency[lane, at] * self._decayed(age) + np.float32(1)
        self.last_use[lane, at] = self.clock
        self.next_use[lane, at] = next_use[lane, k]
        missing = used & (slot < 0)
        n_missing = missing.sum(axis=1)
        self.misses += n_missing
        rows = np.nonzero(n_missing)[0]
        if len(rows):
            self._admit(rows, missing[rows], experts[rows], next_use[rows])

    def _admit(self, rows: Integers, missing: Flags, experts: Integers, next_use: Integers) -> None:
        """Give slots to the missing experts of these lanes, the k-th of each at a time."""
        import numpy as np

        first = np.argsort(~missing, axis=1, kind="stable")  # the missing ones, in order
        experts = np.take_along_axis(experts, first, axis=1)
        next_use = np.take_along_axis(next_use, first, axis=1)
        left = missing.sum(axis=1)
        scores = self._scores(rows)
        for k in range(int(left.max())):
            on = np.nonzero(left > k)[0]
            lanes = rows[on]
            empty = self.filled[lanes] < self.n_slots[lanes]
            slot = np.where(empty, self.filled[lanes], scores[on].argmin(axis=1))
            scores[on, slot] = np.inf
            self.filled[lanes] += empty
            evicted = self.expert[lanes, slot]
            self.slot_of[lanes, evicted] = -1  # an empty slot has -1, and so the last column
            self.expert[lanes, slot] = experts[on, k]
            self.last_use[lanes, slot] = self.clock
            self.frequency[lanes, slot] = 1
            self.next_use[lanes, slot] = next_use[on, k]
            self.slot_of[lanes, experts[on, k]] = slot

    def _scores(self, rows: Integers) -> Reals:
        import numpy as np

        age = self.clock - self.last_use[rows]
        facts = Facts(
            expert=self.expert[rows],
            age=age,
            frequency=self.frequency[rows] * self._decayed(age),
            next_use=self.next_use[rows],
            rng=self._rng,
        )
        scores = self._score(facts)
        scores[(age == 0) | self.absent[rows]] = np.inf
        return scores


def replay(
    trace: RoutingTrace,
    policies: Sequence[str],
    sizes: Sequence[Sequence[int]],
    *,
    seed: int = 0,
    by_code: ByCode | None = None,
) -> list[list[Replay]]:
    """Return for each size (slots of each layer) what each policy does: [size][policy].

    A policy that is no formula of POLICIES is replayed by `by_code`, as
    `nexus_ext.native_plugins.replay_builtin` does it; UsageError for such a name without it.

    "none" reads every expert that a token uses. A layer with fewer slots than its router picks
    experts for a token has no cache, as in a plan. `seed` is that of the random policy.
    """
    import numpy as np

    used = decisions(trace)
    n_layers, n_sizes = len(trace.layers), len(sizes)
    n_experts = max((layer.n_experts for layer in trace.layers), default=1)
    upcoming = next_uses(used, n_experts) if "belady" in policies else used
    lane_layer = np.tile(np.arange(n_layers), n_sizes)
    slots = np.array(sizes, np.int64).reshape(n_sizes * n_layers)
    n_uses = (used >= 0).sum(axis=(0, 2))
    results: list[list[Replay]] = [[] for _ in sizes]
    [cached] = np.nonzero(slots >= np.array([layer.n_used for layer in trace.layers])[lane_layer])
    served = lane_layer[cached]
    for policy in policies:
        if policy not in POLICIES and policy != NONE:
            if by_code is None:
                raise UsageError(
                    f"the policy {policy!r} has no formula",
                    hint=f"use {', '.join(POLICIES)} or {NONE}, or pass by_code",
                )
            for i, size in enumerate(sizes):
                results[i].append(by_code(trace, policy, size))
            continue
        misses = n_uses[lane_layer]
        if policy != NONE and len(cached):
            lanes = _Lanes(policy, slots[cached], n_experts, seed)
            for at in range(len(used)):
                lanes.step(used[at][served], upcoming[at][served])
            misses[cached] = lanes.misses
        misses = misses.reshape(n_sizes, n_layers)
        for i, size in enumerate(sizes):
            results[i].append(_result(trace, policy, size, n_uses.tolist(), misses[i].tolist()))
    return results


def _result(
    trace: RoutingTrace, policy: str, slots: Sequence[int], uses: list[int], misses: list[int]
) -> Replay:
    read_bytes = sum(
        n_missing * layer.record_bytes
        for n_missing, layer in zip(misses, trace.layers, strict=True)
    )
    return Replay(policy, tuple(slots), tuple(uses), tuple(misses), read_bytes, trace.n_tokens)


def global_lru(trace: RoutingTrace, slots: int) -> Replay:
    """Return what one LRU of `slots` records for all layers together does.

    The cache that nobody should build: below one token's cycle it evicts each record just before
    its next use, and where tokens repeat each other it hits exactly never.
    """
    held: OrderedDict[int, None] = OrderedDict()
    n_layers = len(trace.layers)
    uses, misses = [0] * n_layers, [0] * n_layers
    for token in decisions(trace).tolist():
        for layer, experts in enumerate(token):
            for expert in experts:
                if expert < 0:
                    continue
                uses[layer] += 1
                key = layer * MAX_EXPERTS + expert
                if key in held:
                    held.move_to_end(key)
                    continue
                misses[layer] += 1
                held[key] = None
                if len(held) > slots:
                    held.popitem(last=False)
    return _result(trace, GLOBAL_LRU, (slots,), uses, misses)
