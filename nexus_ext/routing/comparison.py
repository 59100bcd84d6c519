"""Rankings of experts side by side: scores by layer, and what reading ahead by each would do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from nexus_ext.routing.evaluation import ReadAhead, Score, mean_score, read_ahead, score
from nexus_ext.routing.trace import RoutingTrace

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

NONE: Final = "none"  # the name of a run that reads nothing ahead


@dataclass(frozen=True, slots=True)
class Comparison:
    """How rankings did on one trace."""

    scores: Mapping[str, list[Score]]  # by layer
    ahead: Mapping[str, ReadAhead]  # with the cache of `slots`; NONE reads nothing ahead
    n_used: int
    slots: int

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can say."""
        return {
            "slots": self.slots,
            "scores": [asdict(one) for of_one in self.scores.values() for one in of_one],
            "read_ahead": [asdict(one) for one in self.ahead.values()],
        }

    def lines(self) -> list[str]:
        """Return two tables as text."""
        names = list(self.scores)
        out = ["share of the experts used that were predicted, and tokens with all of them right"]
        out.append(f"{'layer':>9}" + "".join(f"{name:>18}" for name in names))
        cells = {(name, one.layer): one for name in names for one in self.scores[name]}
        for layer in sorted({layer for _, layer in cells}):
            out.append(f"{layer:>9}" + "".join(_cell(cells.get((name, layer))) for name in names))
        means = [mean_score(self.scores[name]) for name in names]
        out.append(f"{'mean':>9}" + "".join(_cell(one) for one in means))
        most = 2 * self.n_used
        twice = [f"{one.recall[most - 1]:.1%}" if len(one.recall) >= most else "-" for one in means]
        out.append(f"{f'of {most}':>9}" + "".join(f"{text:>10}{'':8}" for text in twice))
        out.append(f"reading 2 experts ahead, an LRU of {self.slots} experts a layer")
        out.append(f"{'':>9}{'hits':>9}{'useful':>9}{'KiB read/token':>16}{'KiB wasted/token':>18}")
        for name, run in self.ahead.items():
            started, n = run.useful + run.wasted, max(run.n_tokens, 1)
            useful = f"{run.useful / started:.0%}" if started else "-"
            out.append(
                f"{name:>9}{run.hit_rate:>9.1%}{useful:>9}{run.read_bytes / n / 1024:>16.1f}"
                f"{run.wasted_bytes / n / 1024:>18.1f}"
            )
        return out


def compare(
    trace: RoutingTrace, rankings: Mapping[str, npt.NDArray[np.int64]], slots: int | None = None
) -> Comparison:
    """Score rankings of a trace that they were not made with; `slots` is half the experts if None.

    UsageError for a ranking of another shape, of nothing, or fewer slots than a token uses experts.
    """
    n_used = max(layer.n_used for layer in trace.layers)
    if slots is None:
        slots = max(n_used, max(layer.n_experts for layer in trace.layers) // 2)
    ahead = {NONE: read_ahead(NONE, trace, None, slots)}
    for name, ranked in rankings.items():
        ahead[name] = read_ahead(name, trace, ranked, slots)
    scores = {name: score(name, trace, ranked) for name, ranked in rankings.items()}
    return Comparison(scores, ahead, n_used, slots)


def _cell(one: Score | None) -> str:
    return f"{'-':>10}{'':8}" if one is None else f"{one.slots:>10.1%}{one.exact:>8.1%}"
