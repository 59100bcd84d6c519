"""In which order the experts of a layer are stored, so that those of a token lie together.

Routers pick some experts often, and some together. Neighbours in the order are neighbours on the
disk, where a run of records is one read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from nexus_ext.routing.trace import TracedLayer

# How many records back still count as near: what is read with them is not far away either.
_NEAR = 4


def record_order(layer: TracedLayer) -> tuple[int, ...]:
    """Return the experts in the order in which their records shall lie.

    The one used most is first; each next one is that which tokens used most with the last few,
    nearer ones counting more. Experts that nobody used come last, by number.
    """
    import numpy as np

    together = co_activation(layer)
    uses = together.diagonal().astype(np.float64)
    scale = 1.0 + uses.max(initial=0.0)
    order = [int(uses.argmax())]
    left = np.ones(layer.n_experts, bool)
    left[order[0]] = False
    for _ in range(layer.n_experts - 1):
        score = uses / scale  # below one use together: it decides only between equals
        for age, expert in enumerate(order[: -_NEAR - 1 : -1], 1):
            score = score + together[expert] / age
        score[~left] = -1.0
        order.append(int(score.argmax()))  # the first of equals
        left[order[-1]] = False
    return tuple(order)


def co_activation(layer: TracedLayer) -> npt.NDArray[np.int64]:
    """Return how many tokens used two experts together: (n_experts, n_experts).

    The diagonal has how many used one.
    """
    import numpy as np

    numbers = layer.numbers()
    used = np.zeros((len(numbers), layer.n_experts), np.float32)
    np.put_along_axis(used, numbers.astype(np.int64), 1.0, axis=1)
    counts: npt.NDArray[np.int64] = (used.T @ used).round().astype(np.int64)
    return counts


def runs_per_token(layer: TracedLayer, order: tuple[int, ...]) -> float:
    """Return how many runs of neighbouring records a token needs, on average, in an order."""
    import numpy as np

    place = np.empty(layer.n_experts, np.int64)
    place[list(order)] = np.arange(layer.n_experts)
    numbers = layer.numbers()
    if not len(numbers):
        return 0.0
    places = np.sort(place[numbers.astype(np.int64)], axis=1)
    return float(1 + (np.diff(places, axis=1) > 1).sum(axis=1).mean())
