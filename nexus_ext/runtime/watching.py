"""What plugins are told of a `Llama`: its requests, and what its routers decide."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field

from nexus_ext import core
from nexus_ext.placement import experts
from nexus_ext.plugin_registry import describe
from nexus_ext.plugins import plugins
from nexus_ext.policies import (
    LayerRouting,
    ModelInfo,
    Outcome,
    RequestInfo,
    RequestStart,
    Routing,
)
from nexus_ext.types import Catalog

_numbers = itertools.count(1)


@dataclass(slots=True)
class RequestWatch:
    """One request of `Llama.generate`. Made when it starts: plugins are told at once."""

    model: ModelInfo
    n_prompt_tokens: int
    read_before: int
    n_tokens: int = 0
    id: str = field(default_factory=lambda: f"python-{next(_numbers)}")
    started_unix_ns: int = field(default_factory=time.time_ns)
    begin_ns: int = field(default_factory=time.perf_counter_ns)
    first_ns: int = 0  # when the first token was there

    def __post_init__(self) -> None:
        plugins().request_started(
            RequestStart(
                id=self.id,
                interface="python",
                model=self.model.path,
                n_prompt_tokens=self.n_prompt_tokens,
                started_unix_ns=self.started_unix_ns,
            )
        )

    def end(self, read_bytes: int, error: BaseException | None) -> None:
        """Tell that it has ended, with `error` or because nobody wants more tokens."""
        now = time.perf_counter_ns()
        first = self.first_ns or now
        outcome: Outcome = "stop"
        if error is not None:
            outcome = "error" if isinstance(error, Exception) else "cancelled"
        plugins().request_done(
            RequestInfo(
                model=self.model,
                n_prompt_tokens=self.n_prompt_tokens,
                n_tokens=self.n_tokens,
                prefill_ns=first - self.begin_ns,
                decode_ns=now - first,
                read_bytes=read_bytes - self.read_before,
                id=self.id,
                interface="python",
                model_name=self.model.path,
                outcome=outcome,
                error=describe(error) if isinstance(error, Exception) else "",
                started_unix_ns=self.started_unix_ns,
                ended_unix_ns=self.started_unix_ns + now - self.begin_ns,
            )
        )


class RouterWatch:
    """Hands what the routers of a model have decided to plugins, after each call of the model."""

    def __init__(self, model: core.Model, catalog: Catalog, info: ModelInfo, n_tokens: int) -> None:
        """`n_tokens`: that one call computes at most."""
        number = {tensor.name: i for i, tensor in enumerate(catalog.tensors)}
        # Without a cache each product of a layer is recorded: the first stands for all.
        self._layers = {
            number[parts[0].name]: layer
            for parts in experts.groups(catalog.tensors)
            if (layer := parts[0].layer) is not None
        }
        self._info = info
        self._model: core.Model | None = model
        # Room for one decision of the largest call, and for all of a token's.
        used = max(catalog.shape.n_experts_used, 1)
        self._most = max(1 << 14, 3 + n_tokens * used)
        model.record_routing(True)

    def tell(self, *, later: bool = False) -> None:
        """Show plugins what was decided since the last time; `later`: from another thread."""
        if self._model is None:
            return
        layers: list[LayerRouting] = []
        while entries := self._model.take_routing(self._most):
            layers += [
                LayerRouting(layer, tuple(map(tuple, tokens)))
                for number, tokens in entries
                if (layer := self._layers.get(number)) is not None
            ]
        if layers:
            routing = Routing(self._info, tuple(layers))
            if later:
                plugins().later(lambda: plugins().observe_routing(routing))
            else:
                plugins().observe_routing(routing)
        if not plugins().has_router_observers():  # all of them have failed
            self.stop()

    def stop(self) -> None:
        """Leave what the routers decide to others."""
        model, self._model = self._model, None
        if model is not None:
            model.record_routing(False)


def watch_routers(
    model: core.Model, catalog: Catalog, info: ModelInfo, n_tokens: int
) -> RouterWatch | None:
    """Return a watch if any plugin wants one."""
    if not plugins().has_router_observers():
        return None
    return RouterWatch(model, catalog, info, n_tokens)
