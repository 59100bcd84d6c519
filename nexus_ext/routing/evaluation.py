"""How good a ranking of experts is: what it would have predicted, what reading ahead by it costs.

A ranking is an array (n_tokens, n_layers, k) of numbers of experts, each once, likeliest first, and
-1 where nothing is said: a prediction of each layer's experts, made before its router decides. All
predictors, trained or not, are compared by the same functions, on tokens that they have not seen.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from nexus_ext.errors import UsageError
from nexus_ext.routing.replay import decisions
from nexus_ext.routing.trace import RoutingTrace

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Integers = npt.NDArray[np.int64]
    Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Score:
    """How well one predictor ranks the experts of one layer."""

    predictor: str
    layer: int
    n_tokens: int  # that it said anything about
    slots: float  # share of the experts used that are among the first n_used predicted
    exact: float  # share of tokens whose experts are exactly the first n_used predicted
    recall: tuple[float, ...]  # [k - 1]: share of the experts used among the first k predicted


@dataclass(frozen=True, slots=True)
class ReadAhead:
    """What reading ahead by a ranking does to caches of one size, over all layers of a trace."""

    predictor: str
    slots: int  # of each layer
    n_tokens: int
    uses: int  # experts that tokens use
    misses: int  # of them, read when the router has asked: computing waits
    useful: int  # of them, read ahead
    wasted: int  # experts that were read ahead and not used by their token
    read_bytes: int
    wasted_bytes: int

    @property
    def hit_rate(self) -> float:
        """Share of uses that no demand read was needed for."""
        return 1.0 - self.misses / self.uses if self.uses else 0.0


def split(trace: RoutingTrace, held_out: float) -> tuple[RoutingTrace, RoutingTrace]:
    """Return the beginning of a trace to train with, and the rest, never less than a token each.

    `held_out` is the share of the rest. UsageError for a trace of fewer than two tokens.
    """
    at = round(trace.n_tokens * (1 - held_out))
    at = min(max(at, 1), trace.n_tokens - 1)
    if at < 1:
        raise UsageError(
            f"a trace of {trace.n_tokens} tokens cannot be split",
            hint="record a longer text with `nexus trace`",
        )
    return _part(trace, 0, at), _part(trace, at, trace.n_tokens)


def joined(traces: Sequence[RoutingTrace]) -> RoutingTrace:
    """Return traces of one model as one; UsageError for none, or for traces of several models."""
    if not traces:
        raise UsageError("there is no trace", hint="record one with `nexus trace`")
    first = traces[0]
    for trace in traces[1:]:
        if (trace.fingerprint, _shape(trace)) != (first.fingerprint, _shape(first)):
            raise UsageError(
                f"traces of two models: {first.fingerprint} and {trace.fingerprint}",
                hint="learn from traces of one model",
            )
    layers = tuple(
        replace(layer, experts=b"".join(trace.layers[i].experts for trace in traces))
        for i, layer in enumerate(first.layers)
    )
    return replace(first, passes=tuple(n for t in traces for n in t.passes), layers=layers)


def _shape(trace: RoutingTrace) -> list[tuple[int, int, int]]:
    return [(layer.layer, layer.n_experts, layer.n_used) for layer in trace.layers]


def _part(trace: RoutingTrace, begin: int, end: int) -> RoutingTrace:
    passes, start = [], 0
    for n in trace.passes:
        kept = min(end, start + n) - max(begin, start)
        if kept > 0:
            passes.append(kept)
        start += n
    layers = []
    for layer in trace.layers:
        size = layer.n_used * layer.width
        layers.append(replace(layer, experts=layer.experts[begin * size : end * size]))
    return replace(trace, passes=tuple(passes), layers=tuple(layers))


def follows(trace: RoutingTrace) -> Flags:
    """Tell for each token whether it continues the one before: (n_tokens,).

    A pass of several tokens begins a text of its own: traces of files are recorded in windows.
    """
    import numpy as np

    out = np.ones(trace.n_tokens, bool)
    out[:1] = False
    starts = np.cumsum([0, *trace.passes])[:-1]
    several = [n > 1 for n in trace.passes]
    out[starts[several]] = False
    return out


def rank_previous(trace: RoutingTrace) -> Integers:
    """Predict what the token before used."""
    import numpy as np

    used = decisions(trace)
    out = np.full_like(used, -1)
    out[1:] = used[:-1]
    out[~follows(trace)] = -1
    return out


def rank_popular(learned: RoutingTrace, trace: RoutingTrace) -> Integers:
    """Predict what `learned` used most, the same for each token of `trace`."""
    import numpy as np

    n_layers = len(learned.layers)
    n_experts = max((layer.n_experts for layer in learned.layers), default=0)
    order = np.full((n_layers, n_experts), -1, np.int64)
    for i, layer in enumerate(learned.layers):
        counts = np.bincount(layer.numbers().ravel(), minlength=layer.n_experts)
        order[i, : layer.n_experts] = np.argsort(-counts, kind="stable")
    return np.broadcast_to(order, (trace.n_tokens, n_layers, n_experts))


def score(predictor: str, trace: RoutingTrace, ranked: Integers) -> list[Score]:
    """Compare a ranking with what was used; a layer of which nothing was said has no score.

    `exact` is 0 for a ranking of fewer experts than a token uses.
    """
    used = decisions(trace)
    _check(predictor, trace, ranked)
    found = []
    for i, layer in enumerate(trace.layers):
        said = ranked[:, i] >= 0
        tokens = said.any(axis=1)
        n = int(tokens.sum())
        if not n:
            continue
        right = (ranked[tokens, i, :, None] == used[tokens, i, None, :]).any(axis=2)
        right &= said[tokens]
        n_distinct = (used[tokens, i] >= 0).sum(axis=1)
        total = int(n_distinct.sum())
        recall = right.cumsum(axis=1).sum(axis=0) / total
        first = right[:, : layer.n_used].sum(axis=1)
        found.append(
            Score(
                predictor,
                layer.layer,
                n,
                slots=float(first.sum() / total),
                exact=float((first == n_distinct).mean()),
                recall=tuple(float(share) for share in recall),
            )
        )
    return found


def mean_score(scores: Sequence[Score]) -> Score:
    """Return the mean over layers, with the layer -1; UsageError where there are no scores."""
    if not scores:
        raise UsageError("there are no scores: nothing was predicted", hint="give a longer trace")
    n = len(scores)
    most = min(len(one.recall) for one in scores)
    return Score(
        scores[0].predictor,
        -1,
        min(one.n_tokens for one in scores),
        slots=sum(one.slots for one in scores) / n,
        exact=sum(one.exact for one in scores) / n,
        recall=tuple(sum(one.recall[k] for one in scores) / n for k in range(most)),
    )


def read_ahead(
    predictor: str, trace: RoutingTrace, ranked: Integers | None, slots: int, limit: int = 2
) -> ReadAhead:
    """Replay a trace through one LRU a layer of `slots` records, reading ahead by a ranking.

    Before a layer's router decides, up to `limit` of the first n_used predicted that are not there
    are read into slots that neither they nor other predicted experts hold; None reads nothing
    ahead. As native/predict.c does it, with LRU for the cache's policy and reads that are always in
    time: what is counted is the most that a predictor can do.
    """
    used = decisions(trace)
    if ranked is not None:
        _check(predictor, trace, ranked)
    uses = misses = useful = wasted = read_bytes = wasted_bytes = 0
    for i, layer in enumerate(trace.layers):
        if slots < layer.n_used:
            raise UsageError(
                f"{slots} slots are fewer than the {layer.n_used} experts of a token",
                hint=f"give {layer.n_used} to {layer.n_experts} slots",
            )
        cache = _Lru(slots)
        said = None if ranked is None else ranked[:, i, : layer.n_used].tolist()
        n_read = n_wasted = 0
        for token, row in enumerate(used[:, i].tolist()):
            wanted = [expert for expert in row if expert >= 0]
            ahead = cache.fetch([e for e in said[token] if e >= 0], limit) if said else []
            missing = cache.use(wanted)
            hit = sum(expert in wanted for expert in ahead)
            uses += len(wanted)
            misses += missing
            useful += hit
            n_wasted += len(ahead) - hit
            n_read += missing + len(ahead)
        wasted += n_wasted
        read_bytes += n_read * layer.record_bytes
        wasted_bytes += n_wasted * layer.record_bytes
    return ReadAhead(
        predictor, slots, trace.n_tokens, uses, misses, useful, wasted, read_bytes, wasted_bytes
    )


class _Lru:
    """The records of one layer, the next to be evicted first."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._held: OrderedDict[int, None] = OrderedDict()

    def fetch(self, predicted: Sequence[int], limit: int) -> list[int]:
        """Read ahead what is predicted and not there; return what was read."""
        started: list[int] = []
        for expert in predicted:
            if len(started) == limit:
                break
            if expert in self._held:
                continue
            if not self._make_room(predicted):
                break
            started.append(expert)
            self._held[expert] = None
        for expert in started:  # what is not used is the first to leave
            self._held.move_to_end(expert, last=False)
        return started

    def use(self, wanted: Sequence[int]) -> int:
        """Hold what a token uses; return how many were not there."""
        missing = [expert for expert in wanted if expert not in self._held]
        for expert in wanted:
            if expert in self._held:
                self._held.move_to_end(expert)
        for expert in missing:
            self._make_room(wanted)
            self._held[expert] = None
        return len(missing)

    def _make_room(self, kept: Collection[int]) -> bool:
        if len(self._held) < self._slots:
            return True
        victim = next((expert for expert in self._held if expert not in kept), None)
        if victim is None:
            return False
        del self._held[victim]
        return True


def _check(predictor: str, trace: RoutingTrace, ranked: Integers) -> None:
    if ranked.ndim != 3 or ranked.shape[:2] != (trace.n_tokens, len(trace.layers)):
        raise UsageError(
            f"the ranking of {predictor!r} has shape {ranked.shape}, the trace "
            f"{trace.n_tokens} tokens and {len(trace.layers)} layers",
            hint="rank every token of every layer of the trace",
        )
