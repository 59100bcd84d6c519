"""An engine that computes nothing: it asks plugins what the runtime asks, in the same order.

Planning is the runtime's own (header, solver, I/O policy), so is the command line. What happens
while tokens are computed is replayed from a routing trace. No weight is read: the header of a model
will do, for instance of `write_llama(..., sparse=True)`.
"""

from __future__ import annotations

import inspect
import itertools
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nexus_ext.errors import UsageError
from nexus_ext.formats import open_model
from nexus_ext.hardware import HardwareProfile
from nexus_ext.native_plugins import replay_builtin
from nexus_ext.native_plugins import replay_trace as replay_trace
from nexus_ext.native_predictions import predict_trace
from nexus_ext.placement import Plan, PlanRequest
from nexus_ext.plugins import Plugins
from nexus_ext.policies import (
    CacheChoice,
    CacheInfo,
    IoInfo,
    IoMode,
    LayerRouting,
    ModelInfo,
    PredictorChoice,
    RequestInfo,
    RequestStart,
    Routing,
)
from nexus_ext.routing import BELADY, Replay, RoutingTrace, replay
from nexus_ext.routing.prediction import POPULAR, PREVIOUS, Accuracy, accuracy, popular, previous
from nexus_ext.testing.hardware import machine
from nexus_ext.testing.loading import load_plugins, use_plugins

if TYPE_CHECKING:
    from nexus_ext.runtime import Planned

_MS = 1_000_000  # nanoseconds
_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class CacheRun:
    """What the cache policy in use makes of a trace, between the built-in's and the optimum."""

    chosen: Replay
    builtin: Replay
    belady: Replay  # no policy that must hold what it reads does better

    @property
    def policy(self) -> str:
        return self.chosen.policy


@dataclass(frozen=True, slots=True)
class PredictorRun:
    """What the predictor in use makes of a trace, layer by layer.

    `layers` is empty for "none", for "auto" and "gate", which need the gates of a model, and for
    predictors that are asked while tokens are computed.
    """

    predictor: str
    layers: tuple[Accuracy, ...]

    @property
    def slots(self) -> float | None:
        """Share of the experts used that were predicted, over all layers; None: not known."""
        known = [layer.slots for layer in self.layers]
        return sum(known) / len(known) if known else None


@dataclass(frozen=True, slots=True)
class CommandResult:
    """A command that has ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """stdout as JSON."""
        return json.loads(self.out)


@dataclass(frozen=True, slots=True)
class FakeModel:
    """A model that was planned and not loaded."""

    info: ModelInfo
    plan: Plan
    cache_policy: str | None  # None: no cache of experts in this plan
    predictor: str | None
    plugins: Plugins

    def request(
        self,
        *,
        n_prompt_tokens: int = 16,
        n_tokens: int = 8,
        read_bytes: int | None = None,
        error: str = "",
    ) -> RequestInfo:
        """Tell the plugins that a request has started and ended; a token takes a millisecond.

        `read_bytes` is by default what the plan reads for so many passes; with `error` the request
        has failed. Returns what `nexus_request_done` was told.
        """
        n_passes = n_tokens + (n_prompt_tokens > 0)
        if read_bytes is None:
            read_bytes = n_passes * self.plan.streamed_bytes_per_token
        start = RequestStart(
            id=f"fake-{next(_numbers)}",
            interface="python",
            model=self.info.path,
            n_prompt_tokens=n_prompt_tokens,
            started_unix_ns=time.time_ns(),
        )
        info = RequestInfo(
            model=self.info,
            n_prompt_tokens=n_prompt_tokens,
            n_tokens=n_tokens,
            prefill_ns=n_prompt_tokens * _MS,
            decode_ns=n_tokens * _MS,
            read_bytes=read_bytes,
            id=start.id,
            model_name=start.model,
            outcome="error" if error else "stop",
            error=error,
            started_unix_ns=start.started_unix_ns,
            ended_unix_ns=start.started_unix_ns + (n_prompt_tokens + n_tokens) * _MS,
        )
        self.plugins.request_started(start)
        self.plugins.request_done(info)
        return info

    def route(self, trace: RoutingTrace) -> int:
        """Show a trace to those who watch routers, one call a token; return how many tokens."""
        columns = [(layer.layer, layer.numbers().tolist()) for layer in trace.layers]
        for token in range(trace.n_tokens):
            decided = (LayerRouting(layer, (tuple(rows[token]),)) for layer, rows in columns)
            self.plugins.observe_routing(Routing(self.info, tuple(decided)))
        return trace.n_tokens


def name_of(choice: CacheChoice | PredictorChoice) -> str:
    """Return how a choice is called: a built-in's name, or that of what decides."""
    return choice if isinstance(choice, str) else choice.name


class FakeEngine:
    """Asks `plugins` (the built-ins alone by default), for a described machine (`machine()`).

    A plugin that fails is an AssertionError here, where the runtime would log its name and go on
    without it; `strict=False` does as the runtime does.
    """

    def __init__(
        self,
        plugins: Plugins | None = None,
        *,
        hardware: HardwareProfile | None = None,
        strict: bool = True,
    ) -> None:
        self.plugins = load_plugins() if plugins is None else plugins
        self.hardware = machine() if hardware is None else hardware
        self.strict = strict

    def plan(self, model: str | os.PathLike[str], **request: Any) -> Plan:
        """Place a model: `request` is what `PlanRequest` takes, `weights_bytes` for instance.

        Asks twice and compares, since the same arguments must give the same plan. Raises what the
        runtime would (DoesNotFit, PluginError), and AssertionError for a plan that it could not
        use: one that leaves a tensor out, is over its budget, or is not the same after `to_json`.
        """
        catalog, wish = open_model(os.fspath(model)), PlanRequest(**request)
        with self._watched():
            plan = self.plugins.solve(catalog, self.hardware, wish)
            again = self.plugins.solve(catalog, self.hardware, wish)
        budget = plan.budget
        assert plan == again, "the solver gave two plans for the same arguments"
        missing = [t.name for t in catalog.tensors if t.name not in plan.tiers]
        assert not missing, f"the plan leaves out {', '.join(missing)}"
        for what, used, limit in (
            ("ram", plan.ram_bytes, budget.ram_bytes),
            ("weights", plan.weights_bytes, budget.weights_bytes),
        ):
            assert limit is None or used <= limit, f"{what}: the plan takes {used} of {limit} bytes"
        assert Plan.from_json(plan.to_json()) == plan, "the plan is another one after to_json"
        return plan

    def io_mode(
        self,
        *,
        streamed_bytes: int,
        resident_bytes: int = 0,
        available_bytes: int | None = None,
        limit_bytes: int | None = None,
    ) -> IoMode:
        """Ask how to read; what is available is by default that of the machine."""
        if available_bytes is None:
            available_bytes = self.hardware.memory.available_bytes
        info = IoInfo(streamed_bytes, resident_bytes, available_bytes, limit_bytes)
        with self._watched():
            return self.plugins.choose_io(info)

    def cache(self, trace: RoutingTrace, *, share: float = 0.5) -> CacheRun:
        """Replay a trace through a cache for `share` of each layer's experts."""
        info = cache_info(trace, share)
        with self._watched():
            policy = self.plugins.choose_cache(info)
        builtin = load_plugins().choose_cache(info)
        sizes = [[info.slots] * len(trace.layers)]
        assert isinstance(builtin, str)
        [(expected, belady)] = replay(trace, [builtin, BELADY], sizes, by_code=replay_builtin)
        chosen, disabled = replay_trace(trace, policy, sizes[0])
        assert not (disabled and self.strict), f"{chosen.policy} was disabled: {disabled[0]}"
        return CacheRun(chosen, expected, belady)

    def predictor(self, trace: RoutingTrace, *, share: float = 0.5) -> PredictorRun:
        """Ask which predictor to use, and compare what it says with what the routers decided.

        Tokens of the trace come one by one. As in the runtime, a plugin is asked for each layer but
        the first. PluginError when it fails.
        """
        info = cache_info(trace, share)
        with self._watched():
            chosen = self.plugins.choose_predictor(info)
        name = name_of(chosen)
        if isinstance(chosen, str) and chosen not in (PREVIOUS, POPULAR):
            return PredictorRun(name, ())
        said = None if isinstance(chosen, str) else predict_trace(trace, chosen, info.slots)
        layers = []
        for i, layer in enumerate(trace.layers):
            decided = layer.numbers().tolist()
            predicted: Sequence[Sequence[int]]
            if said is not None:
                predicted = said[i]
            elif chosen == PREVIOUS:
                predicted = previous(decided)
            else:
                predicted = popular(decided, layer.n_experts)
            layers.append(accuracy(name, layer.layer, predicted, decided))
        return PredictorRun(name, tuple(one for one in layers if one is not None))

    @contextmanager
    def model(
        self, model: str | os.PathLike[str], *, plan: Plan | None = None, **request: Any
    ) -> Iterator[FakeModel]:
        """Go through the life of a model: plan it, choose policies, tell of loading and closing.

        `request` is as in `plan`; with `plan` no solver is asked.
        """
        planned = self._planned(model, plan, request)
        plan, shape = planned.plan, planned.catalog.shape
        cache_policy = predictor = None
        if caches := plan.expert_caches:
            layer_of = {t.name: t.layer for t in planned.catalog.tensors}
            cached = [layer_of[cache.tensors[0]] for cache in caches]
            told = CacheInfo(
                len(caches),
                shape.n_experts,
                shape.n_experts_used,
                caches[0].slots,
                fingerprint=planned.catalog.fingerprint,
                layers=tuple(layer for layer in cached if layer is not None),
            )
            with self._watched():
                cache_policy = name_of(self.plugins.choose_cache(told))
                predictor = name_of(self.plugins.choose_predictor(told))
        info = ModelInfo(
            path=os.fspath(model),
            fingerprint=planned.catalog.fingerprint,
            architecture=shape.architecture,
            resident_bytes=plan.weights_bytes,
            streamed_bytes_per_token=plan.streamed_bytes_per_token,
            io_mode=None if plan.everything_fits else planned.io_mode,
        )
        with self._watched():
            self.plugins.model_loaded(info)
            try:
                yield FakeModel(info, plan, cache_policy, predictor, self.plugins)
            finally:
                self.plugins.model_closed(info)

    def command(
        self, *arguments: str | os.PathLike[str], stdin: str | None = None
    ) -> CommandResult:
        """Run a command line of `nexus` in this process."""
        from click.testing import CliRunner

        from nexus_ext.cli.app import NexusGroup, cli

        # click 8.1 mixes stderr into stdout unless it is told not to, 8.2 cannot be told.
        known = inspect.signature(CliRunner).parameters
        apart: dict[str, Any] = {"mix_stderr": False} if "mix_stderr" in known else {}
        runner = CliRunner(**apart)
        # A group of its own: commands that are added to the one of the process stay there.
        group = NexusGroup(name=cli.name, params=cli.params, help=cli.help)
        with self.in_use():
            result = runner.invoke(group, [os.fspath(a) for a in arguments], input=stdin)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return CommandResult(result.exit_code, result.stdout, result.stderr)

    def _planned(
        self, model: str | os.PathLike[str], plan: Plan | None, request: dict[str, Any]
    ) -> Planned:
        from nexus_ext.runtime.planning import plan_model

        with self.in_use():
            return plan_model(model, PlanRequest(**request), hardware=self.hardware, plan=plan)

    @contextmanager
    def in_use(self) -> Iterator[Plugins]:
        """Let all of this process use the plugins for a while, and fail if one of them has failed.

        For what has no method here: stores, containers, the multiplexer, a `Llama`.
        """
        with use_plugins(self.plugins), self._watched():
            yield self.plugins

    @contextmanager
    def _watched(self) -> Iterator[None]:
        yield
        if self.strict:
            assert_healthy(self.plugins)


def cache_info(trace: RoutingTrace, share: float) -> CacheInfo:
    """Return what a policy is told of a cache for `share` of the experts of a trace's model."""
    n_experts = max(layer.n_experts for layer in trace.layers)
    n_used = max(layer.n_used for layer in trace.layers)
    slots = max(n_used, round(share * n_experts))
    if not 0 < share <= 1:
        raise UsageError(f"share is {share}, not above 0 and at most 1")
    layers = tuple(layer.layer for layer in trace.layers)
    return CacheInfo(len(layers), n_experts, n_used, slots, trace.fingerprint, layers)


def assert_healthy(plugins: Plugins) -> None:
    """Fail when a plugin has failed at anything so far; AssertionError says which and at what."""
    errors = [f"{r.name}: {r.error}" for r in plugins.list_plugins() if r.error]
    assert not errors, "; ".join(errors)
