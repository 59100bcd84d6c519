"""Routing traces to test with: recorded ones that are installed, and drawn ones of any size.

A recorded trace holds what the routers of a trained model decided over a text: which experts are
popular, and how often a token uses those of the token before, no formula gets right. A drawn one
has exactly the statistics that are asked for.
"""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING, Final

from nexus_ext.errors import UsageError

if TYPE_CHECKING:
    from nexus_ext.routing import RoutingTrace

# Of a mixture of experts with 41 million weights, trained on TinyStories and old books: 6 layers of
# 32 experts, of which a token uses 4. Its routing is more even than that of large models.
RECORDED: Final = {
    "stories": "text like that which the model was trained on",
    "encyclopedia": "text of another kind than that which the model was trained on",
}
_RECORD_BYTES: Final = 1 << 20


def recorded_trace(name: str = "stories") -> RoutingTrace:
    """Return one of RECORDED; UsageError for another name."""
    from nexus_ext.routing import RoutingTrace

    if name not in RECORDED:
        raise UsageError(
            f"there is no recorded trace {name!r}", hint=f"there are {', '.join(RECORDED)}"
        )
    file = files("nexus_ext.testing") / "data" / f"{name}.nxtrace"
    return RoutingTrace.from_bytes(file.read_bytes(), source=name)


def synthetic_trace(
    n_tokens: int,
    n_experts: int,
    n_used: int,
    *,
    zipf: float = 0.0,
    reuse: float = 0.0,
    topic: int = 0,
    n_layers: int = 3,
    seed: int = 0,
) -> RoutingTrace:
    """Draw what the routers of `n_layers` decide for tokens that are computed one by one.

    Experts are popular by Zipf's law with the exponent `zipf` (0: all are alike), each layer has
    its own. Each expert of the last token is kept with the probability `reuse`. Every `topic`
    tokens (0: never) popularity is drawn anew. The same arguments give the same trace.
    """
    import numpy as np

    from nexus_ext.routing import RoutingTrace, TracedLayer

    if not 0 < n_used <= n_experts:
        raise UsageError(f"{n_used} of {n_experts} experts cannot be used by a token")
    rng = np.random.default_rng(seed)
    weights = -zipf * np.log(np.arange(1, n_experts + 1))
    layers = []
    for layer in range(n_layers):
        rows = np.empty((n_tokens, n_used), np.uint8 if n_experts <= 256 else "<u2")
        popular = rng.permutation(weights)
        for t in range(n_tokens):
            if topic and t % topic == 0:
                popular = rng.permutation(weights)
            # The largest of weights with Gumbel noise are a draw without putting back.
            keys = popular + rng.gumbel(size=n_experts)
            if t:
                keys[rows[t - 1][rng.random(n_used) < reuse]] = np.inf
            rows[t] = np.argpartition(-keys, n_used - 1)[:n_used]
        layers.append(
            TracedLayer(layer, n_experts, n_used, _RECORD_BYTES, _RECORD_BYTES, rows.tobytes())
        )
    return RoutingTrace("synthetic", "synthetic", (1,) * n_tokens, tuple(layers))
