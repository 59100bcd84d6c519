"""Follow a model token by token: one step of the network a token, one product a layer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from nexus_predictor_lstm.network import start, step

if TYPE_CHECKING:
    from nexus_ext.hooks import CacheInfo, PredictorChoice
    from nexus_predictor_lstm.network import Array
    from nexus_predictor_lstm.train import Lstm

# Of a prompt, only so many tokens before its end are taken in: the network forgets the others.
WINDOW: Final = 32

_log = logging.getLogger("nexus_predictor_lstm")


class LstmPredictor:
    """Predicts for the model that its network was trained for; leaves others to the built-in."""

    name = "lstm"

    def __init__(self, network: Lstm) -> None:
        self._network = network

    def choose(self, info: CacheInfo) -> PredictorChoice:
        """Return a follower, to be used while that is measured to help, or "auto"."""
        network = self._network
        if (info.fingerprint, info.layers) != (network.fingerprint, network.layers):
            _log.warning(
                "the network was trained for layers %s of %s, these are %s of %s: not used",
                network.layers,
                network.fingerprint,
                info.layers,
                info.fingerprint,
            )
            return "auto"
        return Follower(network)


class Follower:
    """Predicts for one model. Told and asked by one thread at a time; layers count from 0."""

    name = "lstm"
    automatic = True  # only while it is measured to help

    def __init__(self, network: Lstm) -> None:
        size, p = network.size, network.parameters
        self._network = network
        self._state = start(size, 1)
        # By layer, contiguous: (n_experts, n_hidden)
        split = p["out"].reshape(size.n_hidden, size.n_layers, size.n_experts)
        self._out: Array = np.ascontiguousarray(split.transpose(1, 2, 0))
        self._bias: Array = p["bias"].reshape(size.n_layers, size.n_experts)
        self._embed: Array = p["embed"].reshape(size.n_layers, size.n_experts, -1)
        self._last: list[Sequence[Sequence[int]]] = [()] * size.n_layers

    def routed(self, layer: int, tokens: Sequence[Sequence[int]]) -> None:
        """See what a router decided for each token."""
        self._last[layer] = tokens[-WINDOW:]
        if layer == len(self._last) - 1:
            self._advance()

    def _advance(self) -> None:
        """Take in the tokens that all layers have seen, in order."""
        n = max(map(len, self._last))
        if n > 1:
            self._state = start(self._network.size, 1)
        for back in range(n, 0, -1):
            seen: Array = np.zeros((1, self._embed.shape[2]), np.float32)
            for layer, tokens in enumerate(self._last):
                # llama.cpp computes the last layer for fewer tokens: the last ones.
                if len(tokens) >= back:
                    seen += self._embed[layer, tokens[-back]].sum(axis=0)
            self._state = step(self._network.parameters, seen, self._state)

    def predict(self, layer: int, n_tokens: int, n_used: int, limit: int) -> Sequence[int]:
        """Return experts that the router of the layer will pick, the likeliest first.

        As many as a token uses; for several tokens all, by what is used most.
        """
        if n_tokens > 1:
            popular: list[int] = np.argsort(-self._bias[layer], kind="stable").tolist()
            return popular
        scores = self._out[layer] @ self._state[0][0] + self._bias[layer]
        if self._network.use_above and layer and self._last[layer - 1]:
            above = self._network.parameters["above"][layer - 1]
            scores = scores + above[self._last[layer - 1][-1]].sum(axis=0)
        found: list[int] = np.argsort(-scores, kind="stable")[:n_used].tolist()
        return found
