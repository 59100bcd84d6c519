"""How well experts can be predicted: what predictors would have said, and how much of it came true.

Slot overlap is the share of the experts used that were predicted; the exact-set rate is the share
of tokens whose experts were all predicted, and nothing else. Papers report one or the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

GATE: Final = "gate"  # the layer's gate, on what was known one layer before
CONTROL: Final = "control"  # the layer's gate, on its own input: anything below 1 is a bug
PREVIOUS: Final = "previous"  # what the token before used
POPULAR: Final = "popular"  # what was used most so far
PREDICTORS: Final = (GATE, PREVIOUS, POPULAR, CONTROL)

Experts = Sequence[int]


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How one predictor did in one layer."""

    predictor: str
    layer: int
    n_tokens: int  # that it said anything about
    slots: float
    exact: float


def previous(decisions: Sequence[Experts]) -> list[Experts]:
    """Return for each token what the one before used; nothing for the first."""
    return [(), *decisions[:-1]] if decisions else []


def popular(decisions: Sequence[Experts], n_experts: int) -> list[Experts]:
    """Return for each token the experts that all before it used most, as many as it uses."""
    counts = [0] * n_experts
    out: list[Experts] = []
    for token, experts in enumerate(decisions):
        order = sorted(range(n_experts), key=lambda e: -counts[e])
        out.append(order[: len(set(experts))] if token else ())
        for expert in experts:
            counts[expert] += 1
    return out


def accuracy(
    predictor: str, layer: int, predicted: Sequence[Experts], decisions: Sequence[Experts]
) -> Accuracy | None:
    """Compare; tokens without a prediction do not count. None: there was none, or not for each."""
    if len(predicted) != len(decisions):
        return None
    pairs = [(set(p), set(d)) for p, d in zip(predicted, decisions, strict=True) if p]
    if not pairs:
        return None
    used = sum(len(d) for _, d in pairs)
    return Accuracy(
        predictor,
        layer,
        len(pairs),
        slots=sum(len(p & d) for p, d in pairs) / used,
        exact=sum(p == d for p, d in pairs) / len(pairs),
    )


def accuracies(
    layer: int,
    n_experts: int,
    decisions: Sequence[Experts],
    recorded: Mapping[str, Sequence[Experts]],
) -> list[Accuracy]:
    """Return how each predictor did in a layer; `recorded` has what GATE and CONTROL said."""
    said: dict[str, Sequence[Experts]] = {
        **recorded,
        PREVIOUS: previous(decisions),
        POPULAR: popular(decisions, n_experts),
    }
    found = [accuracy(name, layer, said.get(name, ()), decisions) for name in PREDICTORS]
    return [one for one in found if one is not None]
