"""Follow a model token by token: what its routers decided last, and what the chain makes of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from nexus_ext.hooks import CacheInfo, PredictorChoice
    from nexus_predictor_markov.chain import Chain

_log = logging.getLogger("nexus_predictor_markov")


class MarkovPredictor:
    """Predicts for the model that its chain was trained for; leaves others to the built-in."""

    name = "markov"

    def __init__(self, chain: Chain) -> None:
        self._chain = chain

    def choose(self, info: CacheInfo) -> PredictorChoice:
        """Return a follower, to be used while that is measured to help, or "auto"."""
        shape = self._chain.shape
        if info.fingerprint != self._chain.fingerprint or not set(info.layers) <= set(shape.layers):
            _log.warning(
                "the chain was trained for the model %s, this is %s: not used",
                self._chain.fingerprint,
                info.fingerprint,
            )
            return "auto"
        return Follower(self._chain, info.layers)


class Follower:
    """Predicts for one model. Told and asked by one thread at a time; layers count from 0."""

    name = "markov"
    automatic = True  # only while it is measured to help

    def __init__(self, chain: Chain, layers: Sequence[int]) -> None:
        """`layers`: the model's numbers of the layers that are predicted, in order."""
        places = {layer: i for i, layer in enumerate(chain.shape.layers)}
        self._chain = chain
        self._places = [places[layer] for layer in layers]  # KeyError: not of this model
        self._popular = chain.popular
        self._last: list[Sequence[int] | None] = [None] * len(layers)

    def routed(self, layer: int, tokens: Sequence[Sequence[int]]) -> None:
        """See what a router decided for each token."""
        self._last[layer] = tokens[-1]

    def predict(self, layer: int, n_tokens: int, n_used: int, limit: int) -> Sequence[int]:
        """Return experts that the router of the layer will pick, the likeliest first.

        As many as a token uses; for several tokens all that there are, by popularity.
        """
        place = self._places[layer]
        if n_tokens > 1:
            return self._popular[place]
        # The token before was seen in this layer, this token in the layer before.
        adjacent = layer > 0 and self._places[layer - 1] == place - 1
        above = self._last[layer - 1] if adjacent else None
        order = np.argsort(-self._chain.scores(place, self._last[layer], above), kind="stable")
        found: list[int] = order[:n_used].tolist()
        return found
