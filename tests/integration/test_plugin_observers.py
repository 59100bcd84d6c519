"""What plugins see of a model while it computes: requests from start to end, and every router."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nexus_ext import hookimpl
from nexus_ext.multiplexer.settings import ModelSpec
from nexus_ext.plugins import Plugins
from nexus_ext.policies import ModelInfo, RequestInfo, RequestStart, Routing
from nexus_ext.testing import load_plugins
from nexus_ext.testing.synthetic import MoeDims, write_moe
from tests.integration.mux import a_prompt, answer, multiplexer, run, takes
from tests.integration.streaming import paged, prompt
from tests.integration.test_experts import cached, core_model
from tests.models_folder import find_model

STORIES = find_model("stories260K-q4_0.gguf")
SMALL: dict[str, Any] = {"n_ctx": 64, "n_batch": 64, "n_ubatch": 32, "logits_all": False}
DIMS = MoeDims(n_layers=3, n_experts=8, n_used=2)


class Watch:
    """Keeps all that it is told."""

    name = "watch"

    def __init__(self, fails: bool = False) -> None:
        self.seen: list[Any] = []
        self.fails = fails

    def observe(self, routing: Routing) -> None:
        self.seen.append(routing)
        if self.fails:
            raise RuntimeError("seen enough")

    def plugin(self, *hooks: str) -> ModuleType:
        made = ModuleType("watch")

        for hook in hooks:

            def see(info: Any) -> None:
                self.seen.append(info)

            function = (lambda: self) if hook == "nexus_router_observer" else see
            setattr(made, hook, hookimpl(function, specname=hook))
        return made


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Plugins]:
    def load(*modules: ModuleType) -> Plugins:
        found = load_plugins(*modules)
        monkeypatch.setattr("nexus_ext.plugins._plugins", found)
        return found

    return load


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_moe(tmp_path_factory.mktemp("moe") / "moe.gguf", dims=DIMS)[0]


def test_a_request_of_a_program_is_seen_from_its_start_to_its_end(
    use: Callable[..., Plugins],
) -> None:
    watch = Watch()
    use(watch.plugin("nexus_request_started", "nexus_request_done"))
    with paged(STORIES, "300K", **SMALL) as llm:
        tokens = llm.tokenize(b"Once upon a time")
        text = llm("Once upon a time", max_tokens=5, temperature=0)
        assert text["usage"]["completion_tokens"] == 5
        start, done = watch.seen
        assert isinstance(start, RequestStart) and isinstance(done, RequestInfo)
        assert start.id == done.id and start.id.startswith("python-")
        assert (start.interface, start.model) == ("python", str(STORIES))
        assert start.n_prompt_tokens == done.n_prompt_tokens == len(tokens)
        assert (done.outcome, done.error, done.model) == ("stop", "", llm.nexus.info)
        assert done.n_tokens >= 5 and done.read_bytes > 0
        assert done.prefill_ns > 0 and done.decode_ns > 0
        assert done.started_unix_ns == start.started_unix_ns < done.ended_unix_ns

        generator = llm.generate(tokens)
        next(generator)
        generator.close()
        assert (watch.seen[-1].outcome, watch.seen[-1].n_tokens) == ("stop", 1)
        assert watch.seen[-1].id == watch.seen[-2].id != done.id


@pytest.mark.parametrize(
    ("error", "outcome", "text"),
    [
        (LookupError("no token"), "error", "LookupError: no token"),
        (KeyboardInterrupt(), "cancelled", ""),
    ],
)
def test_a_request_that_fails_is_seen_to_fail(
    error: BaseException, outcome: str, text: str, use: Callable[..., Plugins]
) -> None:
    watch = Watch()
    use(watch.plugin("nexus_request_done"))

    def sample(*args: Any, **kwargs: Any) -> Any:
        raise error

    with paged(STORIES, "300K", **SMALL) as llm:
        llm.sample = sample
        with pytest.raises(type(error)):
            list(llm.generate([1, 2, 3]))
        del llm.sample
        (done,) = watch.seen
        assert (done.outcome, done.error, done.n_tokens) == (outcome, text, 0)
        assert next(llm.generate([1, 2, 3])) >= 0  # it works as before


def test_an_observer_sees_every_decision_of_every_router(
    moe: Path, use: Callable[..., Plugins]
) -> None:
    watch = Watch()
    use(watch.plugin("nexus_router_observer"))
    with cached(moe, 4) as llm:
        tokens = prompt(70, llm.n_vocab())  # two micro-batches
        llm.eval(tokens)
        llm.eval([5])
        llm.eval([6])
        seen = list(watch.seen)
        assert all(routing.model == llm.nexus.info for routing in seen)
        assert {layer.layer for routing in seen for layer in routing.layers} == set(
            range(DIMS.n_layers)
        )
        by_layer: dict[int, list[tuple[int, ...]]] = {}
        for routing in seen:
            for layer in routing.layers:
                by_layer.setdefault(layer.layer, []).extend(layer.experts)
        for decided in by_layer.values():
            assert len(decided) == len(tokens) + 2
            assert all(len(set(experts)) == DIMS.n_used for experts in decided)
            assert all(0 <= e < DIMS.n_experts for experts in decided for e in experts)
        assert [len(r.layers[0].experts) for r in seen[-2:]] == [1, 1]
        # The same decisions as those that `nexus trace` would take from the core.
        assert llm.nexus.router_watch is not None
        llm.nexus.router_watch.stop()
        core = core_model(llm)
        core.record_routing(True)
        llm.reset()
        llm.eval(tokens)
        recorded = [experts for number, entry in core.take_routing() for experts in entry]
        assert len(watch.seen) == len(seen)
        assert {tuple(e) for e in recorded} == {e for d in by_layer.values() for e in d[:70]}


def test_an_observer_that_fails_is_asked_once_and_nothing_is_recorded_any_more(
    moe: Path, use: Callable[..., Plugins]
) -> None:
    watch = Watch(fails=True)
    plugins = use(watch.plugin("nexus_router_observer"))
    with cached(moe, 4) as llm:
        for token in (1, 2, 3):
            llm.eval([token])
        assert len(watch.seen) == 1
        assert core_model(llm).take_routing() == []
    record = next(r for r in plugins.list_plugins() if r.name == "watch")
    assert record.disabled == ("nexus_router_observer",)


def test_without_an_observer_nothing_is_recorded(moe: Path, use: Callable[..., Plugins]) -> None:
    use()
    with cached(moe, 4) as llm:
        llm.eval([1])
        assert llm.nexus.router_watch is None
        assert core_model(llm).take_routing() == []


def test_models_that_come_and_go_in_the_multiplexer_are_seen(use: Callable[..., Plugins]) -> None:
    watch = Watch()
    plugins = use(watch.plugin("nexus_model_loaded", "nexus_model_closed"))
    budget = sum(takes("bit")) + takes("tiny")[1]  # one of the two

    async def test() -> None:
        async with multiplexer(budget) as mux:
            for name in ("bit", "tiny"):
                await answer(mux, name, a_prompt(1, 5))

    run(test())
    assert plugins.wait_for_observers()
    assert all(isinstance(info, ModelInfo) for info in watch.seen)
    paths = [Path(info.path).name.split("-")[0] for info in watch.seen]
    assert sorted(paths) == ["bitllama", "bitllama", "tinydense", "tinydense"]
    assert all(info.resident_bytes > 0 for info in watch.seen)


def test_the_multiplexer_shows_routers_from_another_thread(
    moe: Path, use: Callable[..., Plugins]
) -> None:
    watch = Watch()
    plugins = use(watch.plugin("nexus_router_observer"))

    async def test() -> None:
        path = str(moe)
        async with multiplexer(find=lambda name: ModelSpec(name, path), n_ctx=64) as mux:
            await answer(mux, "moe", [1 + t % 300 for t in a_prompt(1, 9)], 4)

    run(test())
    assert plugins.wait_for_observers()
    assert {routing.model.path for routing in watch.seen} == {str(moe)}
    n_tokens = sum(len(routing.layers[0].experts) for routing in watch.seen)
    assert n_tokens == 9 + 3  # the last token that is generated is not computed with
    assert all(len(routing.layers) == DIMS.n_layers for routing in watch.seen)
