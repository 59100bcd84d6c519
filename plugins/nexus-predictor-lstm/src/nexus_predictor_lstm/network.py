"""An LSTM over the experts that tokens use, with its gradients written out, in numpy.

One step a token. What the token used in all layers goes in, the state h comes out; a layer's
experts for the next token are ranked by

    logits(layer) = h @ out[layer] + bias[layer] + sum over i of above[layer - 1, i]

where i are the experts that the next token has used one layer earlier: known by the time that the
layer is predicted. `above` is left out where `use_above` is off: then only past tokens speak, as in
the literature that proposes such a predictor. The loss of a layer is the cross-entropy between
softmax(logits) and a distribution that is even over the experts used.

Gates in the order input, forget, output, candidate (Hochreiter and Schmidhuber 1997, with the
forget gate of Gers et al. 2000). Tokens are given as `hot`: 1 where an expert is used, else 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Array = npt.NDArray[np.floating[Any]]
    Integers = npt.NDArray[np.int64]
    Flags = npt.NDArray[np.bool_]
    Parameters = dict[str, Array]
    State = tuple[Array, Array]  # h and c: (n_lanes, n_hidden)


@dataclass(frozen=True, slots=True)
class Size:
    n_layers: int
    n_experts: int
    n_hidden: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the parameters by name."""
        n, e, h = self.n_layers, self.n_experts, self.n_hidden
        return {
            "embed": (n * e, 4 * h),  # what an expert of a layer says to the gates
            "recur": (h, 4 * h),
            "gate_bias": (4 * h,),
            "out": (h, n * e),
            "bias": (n * e,),
            "above": (max(n - 1, 0), e, e),  # (layer - 1, expert there, expert of the layer)
        }


def initial(size: Size, seed: int = 0) -> Parameters:
    """Draw parameters: small, with forget gates that are open."""
    rng = np.random.default_rng(seed)
    scale = 1 / np.sqrt(size.n_hidden)
    out: Parameters = {}
    for name, shape in size.shapes().items():
        if name in ("gate_bias", "bias", "above"):
            out[name] = np.zeros(shape, np.float32)
        else:
            out[name] = rng.uniform(-scale, scale, shape).astype(np.float32)
    out["gate_bias"][size.n_hidden : 2 * size.n_hidden] = 1
    return out


def start(size: Size, n_lanes: int, dtype: npt.DTypeLike = np.float32) -> State:
    """Return the state before the first token of a text."""
    shape = (n_lanes, size.n_hidden)
    return np.zeros(shape, dtype), np.zeros(shape, dtype)


def hot(size: Size, used: Integers, dtype: npt.DTypeLike = np.float32) -> Array:
    """Return 1 for each expert used: (..., n_layers, k) numbers -> (..., n_layers, n_experts)."""
    out = np.zeros((*used.shape[:-1], size.n_experts + 1), dtype)
    np.put_along_axis(out, used, 1, axis=-1)  # -1, no expert, goes to the last column
    return out[..., :-1]


def step(p: Parameters, seen: Array, state: State) -> State:
    """Take in one token of each lane; `seen` is its rows of `embed`, added up: (n_lanes, 4 h)."""
    return _step(p, seen, state)[0]


def _step(p: Parameters, seen: Array, state: State) -> tuple[State, tuple[Array, ...]]:
    h, c = state
    z = seen + h @ p["recur"] + p["gate_bias"]
    n = h.shape[1]
    gates = 1 / (1 + np.exp(-z[:, : 3 * n]))
    i, f, o = gates[:, :n], gates[:, n : 2 * n], gates[:, 2 * n :]
    g = np.tanh(z[:, 3 * n :])
    new_c = f * c + i * g
    squashed = np.tanh(new_c)
    return (o * squashed, new_c), (h, c, i, f, o, g, squashed)


def logits(p: Parameters, size: Size, h: Array, tokens: Array, use_above: bool) -> Array:
    """Return what `h`, the states before `tokens`, and the tokens' own layers above say of them.

    h: (n, n_hidden), tokens: (n, n_layers, n_experts) hot -> (n, n_layers, n_experts)
    """
    out = (h @ p["out"] + p["bias"]).reshape(-1, size.n_layers, size.n_experts)
    if use_above:
        for layer in range(1, size.n_layers):
            out[:, layer] += tokens[:, layer - 1] @ p["above"][layer - 1]
    return out


def loss_and_gradients(
    p: Parameters, size: Size, tokens: Array, fresh: Flags, state: State, use_above: bool
) -> tuple[float, Parameters, State]:
    """Run lanes of tokens and go back through time.

    tokens: (n_steps + 1, n_lanes, n_layers, n_experts) hot; that of step t predicts that of t + 1.
    fresh: (n_steps + 1, n_lanes): the token begins a text, so the state before it is dropped and it
    is not predicted. Returns the mean loss of a layer in nats, its gradients, and the last state,
    which later steps may go on from (nothing flows back beyond the first step).
    """
    n_steps, n_lanes = tokens.shape[0] - 1, tokens.shape[1]
    n = n_steps * n_lanes
    before = tokens[:-1].reshape(n, -1)
    seen = (before @ p["embed"]).reshape(n_steps, n_lanes, -1)
    kept, hidden = [], []
    for t in range(n_steps):
        keep = ~fresh[t][:, None]
        state, trace = _step(p, seen[t], (state[0] * keep, state[1] * keep))
        kept.append(trace)
        hidden.append(state[0])
    h = np.concatenate(hidden)
    after = tokens[1:].reshape(n, size.n_layers, size.n_experts)
    counted = ~fresh[1:].reshape(-1)
    n_counted = max(int(counted.sum()), 1) * size.n_layers
    scores = logits(p, size, h, after, use_above)
    scores -= scores.max(axis=-1, keepdims=True)
    log_p = scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))
    wanted = after / after.sum(axis=-1, keepdims=True)
    loss = float(-(wanted * log_p)[counted].sum() / n_counted)
    d_scores = (np.exp(log_p) - wanted) * (counted / n_counted).astype(h.dtype)[:, None, None]
    flat = d_scores.reshape(n, -1)
    grads: Parameters = {"out": h.T @ flat, "bias": flat.sum(axis=0)}
    grads["above"] = np.zeros_like(p["above"])
    if use_above:
        for layer in range(1, size.n_layers):
            grads["above"][layer - 1] = after[:, layer - 1].T @ d_scores[:, layer]
    d_z = _back(p, fresh, kept, (flat @ p["out"].T).reshape(n_steps, n_lanes, -1))
    grads["embed"] = before.T @ d_z
    grads["recur"] = np.concatenate([trace[0] for trace in kept]).T @ d_z
    grads["gate_bias"] = d_z.sum(axis=0)
    return loss, grads, state


def _back(p: Parameters, fresh: Flags, kept: list[tuple[Array, ...]], d_hidden: Array) -> Array:
    """Return the gradients of what goes into the gates, (n_steps * n_lanes, 4 h)."""
    d_h = np.zeros_like(d_hidden[0])
    d_c = np.zeros_like(d_h)
    out: list[Array] = []
    for t in range(len(kept) - 1, -1, -1):
        _, c, i, f, o, g, squashed = kept[t]
        d_h = d_h + d_hidden[t]
        d_c = d_c + d_h * o * (1 - squashed**2)
        d_z = np.concatenate(
            (
                d_c * g * i * (1 - i),
                d_c * c * f * (1 - f),
                d_h * squashed * o * (1 - o),
                d_c * i * (1 - g**2),
            ),
            axis=1,
        )
        out.append(d_z)
        keep = ~fresh[t][:, None]
        d_h = d_z @ p["recur"].T * keep
        d_c = d_c * f * keep
    return np.concatenate(out[::-1])


class Adam:
    """Kingma and Ba 2015, algorithm 1, with the norm of the gradient clipped."""

    def __init__(self, parameters: Parameters, rate: float, clip: float = 1.0) -> None:
        self._rate, self._clip, self._n = rate, clip, 0
        self._mean = {name: np.zeros_like(array) for name, array in parameters.items()}
        self._square = {name: np.zeros_like(array) for name, array in parameters.items()}

    def update(self, parameters: Parameters, grads: Mapping[str, Array]) -> None:
        """Move the parameters, in place."""
        self._n += 1
        norm = np.sqrt(sum(float(np.vdot(g, g)) for g in grads.values()))
        scale = min(1.0, self._clip / norm) if norm else 1.0
        for name, array in parameters.items():
            g = grads[name] * scale
            mean, square = self._mean[name], self._square[name]
            mean += 0.1 * (g - mean)
            square += 0.001 * (g * g - square)
            unbiased = mean / (1 - 0.9**self._n)
            spread = np.sqrt(square / (1 - 0.999**self._n))
            array -= (self._rate * unbiased / (spread + 1e-8)).astype(array.dtype)
