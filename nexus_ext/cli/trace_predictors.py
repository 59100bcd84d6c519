"""What `nexus trace --predictors` collects and shows: how well experts could be predicted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from nexus_ext.cli.output import Output
    from nexus_ext.routing import RoutingTrace
    from nexus_ext.routing.prediction import Accuracy

KINDS: Final = {1: "gate", 2: "control"}  # nx_routed of nexus_core.h


class Predictions:
    """What the gates said, token by token, for each layer of a trace."""

    def __init__(self, n_layers: int) -> None:
        self._said: list[dict[str, list[Sequence[int]]]] = [{} for _ in range(n_layers)]

    def add(self, kind: int, layer: int, tokens: Sequence[Sequence[int]]) -> None:
        self._said[layer].setdefault(KINDS[kind], []).extend(tokens)

    def accuracies(self, trace: RoutingTrace) -> list[Accuracy]:
        """Compare with what the routers decided."""
        from nexus_ext.routing.prediction import accuracies

        return [
            one
            for layer, said in zip(trace.layers, self._said, strict=True)
            for one in accuracies(layer.layer, layer.n_experts, layer.numbers().tolist(), said)
        ]


def show(found: list[Accuracy], output: Output) -> None:
    """Write a table: a line for each layer, slot overlap and exact sets of each predictor."""
    from nexus_ext.routing.prediction import PREDICTORS

    by_place = {(one.layer, one.predictor): one for one in found}
    layers = list(dict.fromkeys(one.layer for one in found))

    def cell(one: Accuracy | None) -> str:
        return "-" if one is None else f"{one.slots:.1%} {one.exact:6.1%}"

    output.heading("Predicted experts: share of slots, and of tokens with all experts right")
    output.table(
        (">layer", *(f">{name}" for name in PREDICTORS)),
        [
            (str(layer), *(cell(by_place.get((layer, name))) for name in PREDICTORS))
            for layer in layers
        ],
    )
    means = []
    for name in PREDICTORS:
        of_name = [one for one in found if one.predictor == name]
        if of_name:
            means.append(f"{name} {sum(one.slots for one in of_name) / len(of_name):.1%}")
    output.line("mean share of slots: " + ", ".join(means))


def fields(found: list[Accuracy]) -> list[dict[str, object]]:
    return [asdict(one) for one in found]
