"""Train a network from a trace; keep the parameters that do best on its last tenth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from nexus_ext.formats import Learned
from nexus_ext.hooks import FormatError, UsageError
from nexus_ext.routing import RoutingTrace, decisions, follows, mean_score, score, split
from nexus_predictor_lstm.network import (
    Adam,
    Size,
    hot,
    initial,
    logits,
    loss_and_gradients,
    start,
    step,
)

if TYPE_CHECKING:
    from nexus_predictor_lstm.network import Array, Flags, Integers, Parameters

KIND: Final = "lstm"
VERSION: Final = 1
TUNING: Final = 0.1  # share of a trace that decides which epoch is kept
LEAST_TOKENS: Final = 64
_BLOCK: Final = 4096  # tokens whose logits are in memory at once


@dataclass(frozen=True, slots=True)
class Settings:
    n_hidden: int = 128
    n_epochs: int = 10
    n_lanes: int = 32  # texts side by side
    n_steps: int = 32  # tokens that gradients go back
    rate: float = 3e-3
    use_above: bool = True  # what the token has used one layer earlier counts as well
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Lstm:
    """A trained network, and the model whose experts it predicts."""

    fingerprint: str
    architecture: str
    layers: tuple[int, ...]  # numbers of the layers with experts
    n_used: int
    n_tokens: int  # trained with
    use_above: bool
    size: Size
    parameters: Parameters

    def rank(self, trace: RoutingTrace) -> Integers:
        """Predict every token of a trace: (n_tokens, n_layers, n_experts), likeliest first."""
        self.check(trace)
        return _rank(self.parameters, self.size, trace, self.use_above)

    def check(self, trace: RoutingTrace) -> None:
        size, n_used = shape_of(trace, self.size.n_hidden)
        layers = tuple(layer.layer for layer in trace.layers)
        ours = (self.fingerprint, self.size, self.n_used, self.layers)
        if (trace.fingerprint, size, n_used, layers) != ours:
            raise UsageError(
                f"the network was trained for the model {self.fingerprint}, this trace is of "
                f"{trace.fingerprint}",
                hint="record a trace of this model and train with it: nexus lstm train",
            )

    def learned(self) -> Learned:
        """Return the network as what a file can hold; parameters in half precision."""
        facts = {
            "architecture": self.architecture,
            "layers": list(self.layers),
            "n_experts": self.size.n_experts,
            "n_hidden": self.size.n_hidden,
            "n_used": self.n_used,
            "n_tokens": self.n_tokens,
            "use_above": self.use_above,
        }
        arrays = {name: array.astype(np.float16) for name, array in self.parameters.items()}
        return Learned(KIND, VERSION, self.fingerprint, facts, arrays)

    @classmethod
    def read(cls, path: str) -> Lstm:
        """Return the network in a file; ReadFailed or FormatError name it."""
        return cls.of(Learned.read(path, KIND, VERSION), source=path)

    @classmethod
    def of(cls, learned: Learned, *, source: str) -> Lstm:
        """Return the network that `learned` holds; FormatError names `source` and what is wrong."""
        facts, arrays = learned.facts, learned.arrays
        try:
            layers = tuple(int(n) for n in facts["layers"])
            size = Size(len(layers), int(facts["n_experts"]), int(facts["n_hidden"]))
            n_used = int(facts["n_used"])
            if not layers or size.n_hidden < 1 or not 1 <= n_used <= size.n_experts:
                raise ValueError(f"{size} is no model")
            for name, shape in size.shapes().items():
                if arrays[name].shape != shape or arrays[name].dtype != np.float16:
                    raise ValueError(f"{name} is {arrays[name].dtype} {arrays[name].shape}")
            return cls(
                fingerprint=learned.fingerprint,
                architecture=str(facts["architecture"]),
                layers=layers,
                n_used=n_used,
                n_tokens=int(facts["n_tokens"]),
                use_above=bool(facts["use_above"]),
                size=size,
                parameters={name: arrays[name].astype(np.float32) for name in size.shapes()},
            )
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(
                f"{source}: {type(error).__name__}: {error}", hint="train the network again"
            ) from error


def shape_of(trace: RoutingTrace, n_hidden: int) -> tuple[Size, int]:
    """Return the size of a network for a trace, and the experts of a token."""
    kinds = {(layer.n_experts, layer.n_used) for layer in trace.layers}
    if len(kinds) != 1:
        raise UsageError(
            f"the layers of {trace.architecture} have {len(kinds)} numbers of experts",
            hint="this predictor needs layers that are alike",
        )
    ((n_experts, n_used),) = kinds
    return Size(len(trace.layers), n_experts, n_hidden), n_used


def train(
    trace: RoutingTrace,
    settings: Settings = Settings(),
    progress: Callable[[int, float, float], None] | None = None,
) -> Lstm:
    """Train; `progress` gets (epoch, loss in nats, share of slots right on the last tenth)."""
    size, n_used = shape_of(trace, settings.n_hidden)
    if trace.n_tokens < LEAST_TOKENS:
        raise UsageError(
            f"{trace.n_tokens} tokens are too few to train with",
            hint=f"record at least {LEAST_TOKENS}, better some ten thousands",
        )
    learned, tuning = split(trace, TUNING)
    used, fresh = _lanes(learned, settings.n_lanes)
    parameters = initial(size, settings.seed)
    adam = Adam(parameters, settings.rate)
    best, kept = -1.0, parameters
    for epoch in range(settings.n_epochs):
        state, losses = start(size, used.shape[1]), []
        for t in range(0, len(used) - 1, settings.n_steps):
            part = slice(t, t + settings.n_steps + 1)
            loss, grads, state = loss_and_gradients(
                parameters, size, hot(size, used[part]), fresh[part], state, settings.use_above
            )
            adam.update(parameters, grads)
            losses.append(loss)
        found = score(KIND, tuning, _rank(parameters, size, tuning, settings.use_above))
        slots = mean_score(found).slots
        if slots > best:
            best, kept = slots, {name: array.copy() for name, array in parameters.items()}
        if progress is not None:
            progress(epoch, float(np.mean(losses)), slots)
    return Lstm(
        trace.fingerprint,
        trace.architecture,
        tuple(layer.layer for layer in trace.layers),
        n_used,
        learned.n_tokens,
        settings.use_above,
        size,
        kept,
    )


def _lanes(trace: RoutingTrace, n_lanes: int) -> tuple[Integers, Flags]:
    """Cut a trace into lanes of equal length: (n_tokens of each, n_lanes, ...)."""
    n_lanes = max(1, min(n_lanes, trace.n_tokens // 16))
    n = trace.n_tokens // n_lanes
    used, fresh = decisions(trace)[: n * n_lanes], ~follows(trace)[: n * n_lanes]
    fresh = fresh.reshape(n_lanes, n)
    fresh[:, 0] = True
    return used.reshape(n_lanes, n, *used.shape[1:]).swapaxes(0, 1), fresh.T


def _rank(parameters: Parameters, size: Size, trace: RoutingTrace, use_above: bool) -> Integers:
    used, fresh = decisions(trace), ~follows(trace)
    out = np.empty((trace.n_tokens, size.n_layers, size.n_experts), np.int64)
    state = start(size, 1)
    for begin in range(0, trace.n_tokens, _BLOCK):
        part = slice(begin, begin + _BLOCK)
        tokens = hot(size, used[part])
        seen = tokens.reshape(len(tokens), -1) @ parameters["embed"]
        before: Array = np.empty((len(tokens), size.n_hidden), np.float32)
        for t in range(len(tokens)):
            if fresh[begin + t]:
                state = start(size, 1)
            before[t] = state[0][0]
            state = step(parameters, seen[t : t + 1], state)
        scores = logits(parameters, size, before, tokens, use_above)
        out[part] = np.argsort(-scores, axis=2, kind="stable")
    return out
