"""Which experts follow which: two first-order chains, as tables of log-odds.

    score(layer, j) = log P(j) + t * sum over i of lift_time(layer, i, j)
                               + l * sum over k of lift_layer(layer - 1, k, j)

i: experts that the token before used there; k: that this token used in the layer before.

lift(i, j) = log P(j | i) - log P(j): how much likelier j is where i was used. With both weights 1
this is naive Bayes with experts as independent evidence. They are not independent, hence weights,
which training chooses. P(j | i) is smoothed towards P(j) by `SMOOTHING` imagined uses of i, so that
pairs that were never seen together say nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from nexus_ext.formats import Learned
from nexus_ext.hooks import FormatError, UsageError
from nexus_ext.routing import RoutingTrace, decisions, follows, score, split

if TYPE_CHECKING:
    import numpy.typing as npt

    Bytes = npt.NDArray[np.int8]
    Integers = npt.NDArray[np.int64]
    Reals = npt.NDArray[np.float32]

KIND: Final = "markov"
VERSION: Final = 1
STEP: Final = 1 / 16  # nats a unit of the lifts: 8 nats fit into a byte
SMOOTHING: Final = 8.0
WEIGHTS: Final = (0.0, 0.25, 0.5, 0.75, 1.0)
TUNING: Final = 0.1  # share of a trace that the weights are chosen with


@dataclass(frozen=True, slots=True)
class Shape:
    """What routers decide: the same numbers for all layers."""

    layers: tuple[int, ...]  # numbers of the layers with experts
    n_experts: int
    n_used: int

    @classmethod
    def of(cls, trace: RoutingTrace) -> Shape:
        kinds = {(layer.n_experts, layer.n_used) for layer in trace.layers}
        if len(kinds) != 1:
            raise UsageError(
                f"the layers of {trace.architecture} have {len(kinds)} numbers of experts",
                hint="a Markov chain needs layers that are alike",
            )
        ((n_experts, n_used),) = kinds
        return cls(tuple(layer.layer for layer in trace.layers), n_experts, n_used)


@dataclass(frozen=True, slots=True)
class Chain:
    """The tables of one model, and how much each counts."""

    fingerprint: str
    architecture: str
    shape: Shape
    n_tokens: int  # trained with
    time_weight: float
    layer_weight: float
    popularity: Reals  # (n_layers, n_experts): nats
    time: Bytes  # (n_layers, n_experts before, n_experts): steps
    layer: Bytes  # (n_layers - 1, n_experts of the layer before, n_experts): steps

    def scores(
        self, layer: int, before: Sequence[int] | None, above: Sequence[int] | None
    ) -> Reals:
        """Return the score of each expert of the layer of this index: (n_experts,).

        `before`: what the token before used there; `above`: what this token used one layer earlier.
        """
        out: Reals = self.popularity[layer]
        if before is not None and self.time_weight:
            seen = self.time[layer, before].sum(axis=0, dtype=np.int32)
            out = out + np.float32(self.time_weight * STEP) * seen
        if above is not None and layer and self.layer_weight:
            seen = self.layer[layer - 1, above].sum(axis=0, dtype=np.int32)
            out = out + np.float32(self.layer_weight * STEP) * seen
        return out

    def rank(self, trace: RoutingTrace) -> Integers:
        """Predict every token of a trace: (n_tokens, n_layers, n_experts), likeliest first."""
        self.check(trace.fingerprint, Shape.of(trace))
        used = decisions(trace)
        evidence = _Evidence(used, follows(trace), self.time, self.layer)
        return evidence.ranked(self.popularity, self.time_weight, self.layer_weight)

    @property
    def popular(self) -> list[list[int]]:
        """The experts of each layer, what was used most in training first."""
        order: list[list[int]] = np.argsort(-self.popularity, axis=1, kind="stable").tolist()
        return order

    def rank_popular(self, n_tokens: int) -> Integers:
        """Predict what was used most in training, the same for every token, shaped as by `rank`."""
        order = np.array(self.popular)
        return np.broadcast_to(order, (n_tokens, *order.shape))

    def check(self, fingerprint: str, shape: Shape) -> None:
        if (fingerprint, shape) != (self.fingerprint, self.shape):
            raise UsageError(
                f"the chain was trained for the model {self.fingerprint} ({self.shape}), "
                f"this is {fingerprint} ({shape})",
                hint="record a trace of this model and train with it: nexus markov train",
            )

    def learned(self) -> Learned:
        """Return the chain as what a file can hold."""
        facts = {
            "architecture": self.architecture,
            "layers": list(self.shape.layers),
            "n_experts": self.shape.n_experts,
            "n_used": self.shape.n_used,
            "n_tokens": self.n_tokens,
            "time_weight": self.time_weight,
            "layer_weight": self.layer_weight,
        }
        arrays = {"popularity": self.popularity, "time": self.time, "layer": self.layer}
        return Learned(KIND, VERSION, self.fingerprint, facts, arrays)

    @classmethod
    def read(cls, path: str) -> Chain:
        """Return the chain in a file; ReadFailed, FormatError or NotForThis name it."""
        return cls.of(Learned.read(path, KIND, VERSION), source=path)

    @classmethod
    def of(cls, learned: Learned, *, source: str) -> Chain:
        """Return the chain that `learned` holds; FormatError names `source` and what is wrong."""
        facts, arrays = learned.facts, learned.arrays
        try:
            shape = Shape(
                tuple(int(n) for n in facts["layers"]),
                int(facts["n_experts"]),
                int(facts["n_used"]),
            )
            n, e = len(shape.layers), shape.n_experts
            wanted = {"popularity": (n, e), "time": (n, e, e), "layer": (max(n - 1, 0), e, e)}
            for name, size in wanted.items():
                kind = np.float32 if name == "popularity" else np.int8
                if arrays[name].shape != size or arrays[name].dtype != kind:
                    raise ValueError(f"{name} is {arrays[name].dtype} {arrays[name].shape}")
            if not n or not 1 <= shape.n_used <= e:
                raise ValueError(f"{shape} is no model")
            return cls(
                fingerprint=learned.fingerprint,
                architecture=str(facts["architecture"]),
                shape=shape,
                n_tokens=int(facts["n_tokens"]),
                time_weight=float(facts["time_weight"]),
                layer_weight=float(facts["layer_weight"]),
                popularity=arrays["popularity"].astype(np.float32),
                time=arrays["time"].astype(np.int8),
                layer=arrays["layer"].astype(np.int8),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(
                f"{source}: {type(error).__name__}: {error}", hint="train the chain again"
            ) from error


def train(trace: RoutingTrace) -> Chain:
    """Count the pairs of a trace; choose the weights with its last tenth, then count it all."""
    shape = Shape.of(trace)
    learned, tuning = split(trace, TUNING)
    tables = _tables(learned, shape)
    evidence = _Evidence(decisions(tuning), follows(tuning), *tables[1:])
    best = (-1.0, 0.0, 0.0)
    for time_weight in WEIGHTS:
        for layer_weight in WEIGHTS:
            ranked = evidence.ranked(tables[0], time_weight, layer_weight)
            scores = score(KIND, tuning, ranked)
            slots = sum(one.slots for one in scores) / len(scores)
            if slots > best[0]:  # the smaller weights where it makes no difference
                best = (slots, time_weight, layer_weight)
    popularity, time, layer = _tables(trace, shape)
    return Chain(
        trace.fingerprint,
        trace.architecture,
        shape,
        trace.n_tokens,
        *best[1:],
        popularity,
        time,
        layer,
    )


class _Evidence:
    """What the tokens of a trace say about each other, before it is weighed."""

    def __init__(
        self, used: Integers, continues: npt.NDArray[np.bool_], time: Bytes, layer: Bytes
    ) -> None:
        n_tokens, n_layers, most = used.shape
        self.time = np.zeros((n_tokens, n_layers, time.shape[2]), np.float32)
        self.layer = np.zeros_like(self.time)
        for i in range(n_layers):
            for k in range(most):
                before = used[:-1, i, k]
                seen = continues[1:] & (before >= 0)
                self.time[1:, i][seen] += time[i, before[seen]]
                if i:
                    above = used[:, i - 1, k]
                    seen = above >= 0
                    self.layer[seen, i] += layer[i - 1, above[seen]]

    def ranked(self, popularity: Reals, time_weight: float, layer_weight: float) -> Integers:
        scores = popularity + np.float32(STEP * time_weight) * self.time
        scores += np.float32(STEP * layer_weight) * self.layer
        return np.argsort(-scores, axis=2, kind="stable")


def _tables(trace: RoutingTrace, shape: Shape) -> tuple[Reals, Bytes, Bytes]:
    used = decisions(trace)
    n_layers, e = len(shape.layers), shape.n_experts
    continues = follows(trace)[1:]
    counts = np.stack(
        [np.bincount(used[:, i][used[:, i] >= 0], minlength=e) for i in range(n_layers)]
    )
    share = (counts + 1.0) / (counts + 1.0).sum(axis=1, keepdims=True)
    time = np.stack(
        [_lift(used[:-1, i][continues], used[1:, i][continues], share[i]) for i in range(n_layers)]
    )
    pairs = range(1, n_layers)
    layer = np.zeros((max(n_layers - 1, 0), e, e), np.int8)
    for i in pairs:
        layer[i - 1] = _lift(used[:, i - 1], used[:, i], share[i])
    return np.log(share).astype(np.float32), time, layer


def _lift(before: Integers, after: Integers, share: npt.NDArray[np.float64]) -> Bytes:
    """Return log P(j | i) - log P(j) in steps: (n_experts, n_experts)."""
    e = len(share)
    counts = np.zeros(e * e, np.int64)
    for a in range(before.shape[1]):
        for b in range(after.shape[1]):
            i, j = before[:, a], after[:, b]
            both = (i >= 0) & (j >= 0)
            counts += np.bincount(i[both] * e + j[both], minlength=e * e)
    pairs = counts.reshape(e, e).astype(np.float64)
    given = (pairs + SMOOTHING * share) / (pairs.sum(axis=1, keepdims=True) + SMOOTHING)
    steps = np.clip(np.rint(np.log(given / share) / STEP), -127, 127)
    lifts: Bytes = steps.astype(np.int8)
    return lifts
