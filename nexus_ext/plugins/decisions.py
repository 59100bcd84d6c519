"""Every hook by name: what its answer must be, and what it is asked for.

Decisions of higher layers (which model gives up memory, where models are found) are asked from
there, with `decide` and `collect`; what this layer knows of is asked here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, Any, Final, TypeVar, get_args

from nexus_ext.codecs import Codec, Codecs
from nexus_ext.errors import DoesNotFit, UsageError
from nexus_ext.plugin_registry import PluginRecord, show
from nexus_ext.plugins.asking import Asking, Rubbish, of_kind
from nexus_ext.plugins.background import Background
from nexus_ext.plugins.codec import GuardedCodec, accept_codec
from nexus_ext.policies import (
    CacheChoice,
    CacheInfo,
    CachePolicy,
    CachePolicyName,
    EvictionPolicy,
    ExpertPredictor,
    IoInfo,
    IoMode,
    IoPolicy,
    LayerCachePolicy,
    LayerPredictor,
    ModelInfo,
    NativePolicy,
    PlacementSolver,
    PredictorChoice,
    PredictorName,
    QuantizationAllocator,
    RequestInfo,
    RequestStart,
    RouterObserver,
    Routing,
)

if TYPE_CHECKING:
    import click

    from nexus_ext.hardware.profile import HardwareProfile
    from nexus_ext.placement import Plan, PlanRequest
    from nexus_ext.quality.allocation import Allocation, Item
    from nexus_ext.types import Catalog

PLACEMENT: Final = "nexus_placement_solver"
IO: Final = "nexus_io_policy"
CACHE: Final = "nexus_cache_policy"
PREDICTOR: Final = "nexus_expert_predictor"
EVICTION: Final = "nexus_eviction_policy"
ALLOCATOR: Final = "nexus_quantization_allocator"
CODEC: Final = "nexus_codec"
ROUTER: Final = "nexus_router_observer"
CHOOSING: Final[dict[str, type[Any]]] = {
    PLACEMENT: PlacementSolver,
    IO: IoPolicy,
    CACHE: CachePolicy,
    PREDICTOR: ExpertPredictor,
    EVICTION: EvictionPolicy,
    ALLOCATOR: QuantizationAllocator,
}
_T = TypeVar("_T")


class Plugins(Asking):
    """The plugins of one process; `plugins()` returns the ones that nexus_ext uses."""

    _background: Background | None = None

    def __init__(
        self,
        found: Iterable[EntryPoint] | None = None,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(found, environ)
        self._codecs: dict[str, GuardedCodec] = {}

    def list_plugins(self) -> tuple[PluginRecord, ...]:
        """Return every plugin that was found, built-ins first, then by name."""
        return self.records(CHOOSING)

    # -- hooks that choose ----------------------------------------------------------------------

    def placement_solver(self) -> PlacementSolver:
        """Return the solver in use."""
        solver: PlacementSolver = self.chosen(PLACEMENT, CHOOSING[PLACEMENT])[1]
        return solver

    def io_policy(self) -> IoPolicy:
        """Return the I/O policy in use."""
        policy: IoPolicy = self.chosen(IO, CHOOSING[IO])[1]
        return policy

    def solve(self, catalog: Catalog, hardware: HardwareProfile, request: PlanRequest) -> Plan:
        """Place a model with the solver in use.

        Raises what the built-in solver may raise: DoesNotFit, UsageError. That a plugin finds no
        plan is not the last word: the next solver is asked.
        """
        from nexus_ext.placement import Plan
        from nexus_ext.placement.check import faults

        def accept(plan: object) -> Plan:
            if not isinstance(plan, Plan):
                raise Rubbish(f"returned {show(plan)}, which is no Plan")
            fault = faults(plan, catalog, hardware, request)
            if fault:
                raise Rubbish(f"made a plan that cannot be used: {fault}")
            return plan

        def call(solver: PlacementSolver) -> object:
            return solver.solve(catalog, hardware, request)

        kind = CHOOSING[PLACEMENT]
        return self.decide(PLACEMENT, kind, call, accept, polite=(DoesNotFit, UsageError))

    def choose_io(self, info: IoInfo) -> IoMode:
        """Return how to read, as the policy in use decides."""
        mode: IoMode = self._one_of(IO, info, IoMode)
        return mode

    def choose_cache(
        self,
        info: CacheInfo,
        use: Callable[[CacheChoice, str], None] = lambda choice, plugin: None,
    ) -> CacheChoice:
        """Return the eviction policy of the expert cache, as the policy in use decides.

        `use` puts the choice to work, is told whose it is, and may refuse it with PluginError.
        """
        others = (NativePolicy, LayerCachePolicy)
        choice: CacheChoice = self._one_of(CACHE, info, CachePolicyName, others, use)
        return choice

    def choose_predictor(
        self,
        info: CacheInfo,
        use: Callable[[PredictorChoice, str], None] = lambda choice, plugin: None,
    ) -> PredictorChoice:
        """Return how experts are predicted, as the predictor in use decides; as `choose_cache`."""
        others = (NativePolicy, LayerPredictor)
        choice: PredictorChoice = self._one_of(PREDICTOR, info, PredictorName, others, use)
        return choice

    def _one_of(
        self,
        hook: str,
        info: object,
        names: Any,
        others: tuple[type[Any], ...] = (),
        use: Callable[[Any, str], None] = lambda choice, plugin: None,
    ) -> Any:
        known = get_args(names)

        def accept(chosen: object) -> object:
            by_name = type(chosen) is str and chosen in known
            if not by_name and not isinstance(chosen, others):
                raise Rubbish(f"chose {show(chosen)} instead of one of {', '.join(known)}")
            return chosen

        def call(policy: Any) -> object:
            return policy.choose(info)

        return self.decide(hook, CHOOSING[hook], call, accept, use=use)

    def allocate(self, items: Sequence[Item], budget_nbytes: int) -> Allocation:
        """Return a type for each tensor. Raises UsageError when even the smallest do not fit."""
        from nexus_ext.quality.allocation import checked

        def accept(answer: object) -> Allocation:
            try:
                return checked(answer, items, budget_nbytes)
            except ValueError as error:
                raise Rubbish(str(error)) from error

        def call(allocator: QuantizationAllocator) -> object:
            return allocator.allocate(items, budget_nbytes)

        return self.decide(ALLOCATOR, CHOOSING[ALLOCATOR], call, accept, polite=(UsageError,))

    # -- hooks that add -------------------------------------------------------------------------

    def codecs(self) -> Codecs:
        """Return all codecs: those of nexus_ext and those of plugins.

        A codec that takes the name of another is left out: a file would be read by other rules
        than it was written.
        """
        taken = dict.fromkeys(Codecs().names(), "nexus_ext")
        added: list[Codec] = []
        for name, codec in self.collect(CODEC, accept_codec):
            if codec.name in taken:
                owner = taken[codec.name]
                self.disable(name, CODEC, f"has the name {codec.name!r}, which {owner!r} has")
                continue
            taken[codec.name] = name
            # One object for each, always: the core knows a codec by it.
            added.append(self._codecs.setdefault(name, GuardedCodec(codec, name, self)))
        return Codecs(added)

    def register_commands(self, cli: click.Group) -> None:
        """Let plugins add commands; one that takes the name of another is dropped and logged."""
        hook = "nexus_register_commands"
        for impl in self._registry.implementations(hook):
            before = dict(cli.commands)
            self.observe_one(impl, hook, cli=cli)
            for name, command in before.items():
                if cli.commands.get(name) is not command:
                    self.note(impl.plugin_name, hook, f"has the command {name!r}, which exists")
                    cli.commands[name] = command

    # -- hooks that watch -----------------------------------------------------------------------

    def model_loaded(self, info: ModelInfo) -> None:
        self.observe("nexus_model_loaded", info=info)

    def model_closed(self, info: ModelInfo) -> None:
        self.observe("nexus_model_closed", info=info)

    def request_started(self, info: RequestStart) -> None:
        self.observe("nexus_request_started", info=info)

    def request_done(self, info: RequestInfo) -> None:
        self.observe("nexus_request_done", info=info)

    def has_router_observers(self) -> bool:
        return bool(self._router_observers())

    def observe_routing(self, routing: Routing) -> None:
        """Show one call of a model to everyone who watches routers."""
        for name, observer in self._router_observers():

            def tell(observer: RouterObserver = observer) -> None:
                observer.observe(routing)

            self.guarded(name, ROUTER, tell, None)

    def _router_observers(self) -> list[tuple[str, RouterObserver]]:
        kind: type[Any] = RouterObserver
        return self.collect(ROUTER, lambda answer: of_kind(answer, kind))

    def later(self, tell: Callable[[], None]) -> None:
        """Call `tell` in a thread of its own: where a slow plugin would hold up everybody."""
        with self._lock:
            if self._background is None:
                self._background = Background()
        self._background.add(tell)

    def wait_for_observers(self, seconds: float = 5.0) -> bool:
        """Wait until all that was handed to `later` is told; False when that takes too long."""
        return self._background is None or self._background.wait(seconds)
