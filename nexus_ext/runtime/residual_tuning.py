"""How many channels of each kind of matrix a token has time for, and where they repair most.

Both are measured in the model that was opened, while it writes a few tokens. Each is decoded anew
with nothing corrected; with a usual share of all kinds of matrices; with none and with more of one
kind at a time, the others as usual, since what a kind is worth depends on what else is corrected;
and with everything corrected, which is as near to the original as residuals bring it. From each run
come its time and how far its predictions are from the last one's. What a kind is worth at other
shares is a power law through the two that were measured; channels are then dealt out by what they
repair in the time they take.

Pure but for `observe`, which runs what it is given.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

import numpy as np
import numpy.typing as npt

from nexus_ext.quality.allocation import Choice, Item, allocate

Floats = npt.NDArray[np.float32]

PROBES: Final = (0.06, 0.16)  # shares that are measured: the usual one, and more
SHARES: Final = (0.0, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.12, 0.16, 0.25)
_LEAST_EXPONENT: Final = 0.1


@dataclass(frozen=True, slots=True)
class Effect:
    """What correcting one kind of matrix costs and repairs, the others corrected as usual."""

    kind: str
    seconds: tuple[float, float]  # added to a token at the shares of PROBES
    repaired: tuple[float, float]  # of the divergence, in nats, at the same

    def cost(self, share: float) -> float:
        """Return the seconds that a share takes: a line, and no less than its part."""
        if share == 0:
            return 0.0
        (x0, x1), (y0, y1) = PROBES, (max(s, 0.0) for s in self.seconds)
        slope = max(0.0, (y1 - y0) / (x1 - x0))
        return float(max(y0 * min(1.0, share / x0), y0 + slope * (share - x0)))

    def worth(self, share: float) -> float:
        """Return the divergence that a share repairs, in nats."""
        first, second = self.repaired
        if share == 0 or max(first, second) <= 0:
            return 0.0
        if first <= 0:  # noise: straight through the second
            return second * share / PROBES[1]
        exponent = math.log(max(second, first) / first) / math.log(PROBES[1] / PROBES[0])
        exponent = min(1.0, max(_LEAST_EXPONENT, exponent))
        return first * math.pow(share / PROBES[0], exponent)


@dataclass(frozen=True, slots=True)
class Observed:
    """What a model does with its residuals."""

    token_s: float  # without
    divergence: float  # without, from everything corrected; nats
    effects: tuple[Effect, ...]


def distribute(
    effects: Sequence[Effect], budget: int, cost: Callable[[Effect, float], float]
) -> dict[str, float]:
    """Return the share of each kind whose worths are largest in all, within `budget`.

    `cost` is in the unit of `budget` (bytes, or nanoseconds) and grows with the share. A choice
    from one menu a kind: the knapsack problem of allocations.
    """
    shares = {f"{share:g}": share for share in SHARES}
    items = []
    for effect in effects:
        most = max(effect.worth(share) for share in SHARES)
        items.append(
            Item(
                effect.kind,
                tuple(
                    Choice(name, math.ceil(cost(effect, share)), most - effect.worth(share))
                    for name, share in shares.items()
                ),
            )
        )
    found = allocate(items, budget).types if items else {}
    return {kind: shares[name] for kind, name in found.items()}


def hedged(
    effects: Sequence[Effect], budget: int, cost: Callable[[Effect, float], float]
) -> dict[str, float]:
    """Return shares half of which are dealt out, and half the same for all kinds, within `budget`.

    A few tokens tell little of what a kind is worth: of what they say, half is believed.
    """
    dealt = distribute(effects, budget, cost)
    same, more = 0.0, max(SHARES)
    for _ in range(20):  # halving
        share = (same + more) / 2
        if sum(cost(effect, share) for effect in effects) <= budget:
            same = share
        else:
            more = share
    return {kind: (share + same) / 2 for kind, share in dealt.items()}


def divergence(exact: Floats, seen: Floats) -> float:
    """Return KL(exact || seen) in nats, of two rows of logits (n_vocab,)."""

    def log_softmax(row: Floats) -> npt.NDArray[np.float64]:
        shifted = row.astype(np.float64) - float(row.max())
        found: npt.NDArray[np.float64] = shifted - math.log(float(np.exp(shifted).sum()))
        return found

    p, q = log_softmax(exact), log_softmax(seen)
    return float((np.exp(p) * (p - q)).sum())


def observe(
    kinds: Sequence[str],
    run: Callable[[Mapping[str, float], int, int], Floats],
    first_token: int,
    *,
    most_tokens: int,
    most_seconds: float,
    seed: int = 0,
) -> Observed:
    """Measure all kinds on tokens that the model writes by itself.

    `run(shares, token, position)` decodes a token at a position, over what was there, and returns
    its logits, which may be overwritten by the next run. Stops after `most_tokens`, or when
    `most_seconds` have passed and 4 tokens were seen.
    """
    rng = np.random.default_rng(seed)
    nothing = dict.fromkeys(kinds, 0.0)
    everything = dict.fromkeys(kinds, 1.0)
    usual = dict.fromkeys(kinds, PROBES[0])
    settings = [nothing, usual]
    settings += [{**usual, kind: share} for kind in kinds for share in (0.0, PROBES[1])]
    times: list[list[float]] = [[] for _ in settings]
    apart: list[list[float]] = [[] for _ in settings]
    begin = time.perf_counter()
    token = first_token
    for position in range(most_tokens + 1):
        rows, took = [], []
        for shares in settings:
            started = time.perf_counter()
            logits = run(shares, token, position)
            took.append(time.perf_counter() - started)
            rows.append(logits.copy())
        exact = run(everything, token, position)  # last, so that what follows rests on it
        token = _drawn(exact, rng)
        if position == 0:
            continue  # pages and caches; and the first token says little
        for number, row in enumerate(rows):
            times[number].append(took[number])
            apart[number].append(divergence(exact, row))
        if position >= 4 and time.perf_counter() - begin > most_seconds:
            break
    token_s = median(times[0])
    far = [sum(values) / len(values) for values in apart]
    effects = []
    for n, kind in enumerate(kinds):
        none, more = 2 + 2 * n, 3 + 2 * n
        # Paired by token: a machine that is busy for a while is busy for both.
        added = [
            median(b - a for a, b in zip(times[none], times[with_it], strict=True))
            for with_it in (1, more)
        ]
        effects.append(
            Effect(kind, (added[0], added[1]), (far[none] - far[1], far[none] - far[more]))
        )
    return Observed(token_s, far[0], tuple(effects))


def _drawn(logits: Floats, rng: np.random.Generator) -> int:
    p = np.exp(logits.astype(np.float64) - float(logits.max()))
    return int(rng.choice(len(p), p=p / p.sum()))
