"""The authors' kit: it asks what the runtime asks, and notices what a plugin does wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import click
import pytest

import nexus_ext.testing as kit
from nexus_ext import hookimpl
from nexus_ext import plugins as home
from nexus_ext.errors import DoesNotFit, PluginError, UsageError
from nexus_ext.placement import Plan, solve
from nexus_ext.plugins import Plugins
from nexus_ext.policies import IoInfo
from nexus_ext.routing import repeats
from nexus_ext.testing import (
    FakeEngine,
    MoeDims,
    expert_plan,
    load_plugins,
    machine,
    scripted_server,
    synthetic_trace,
    use_plugins,
    write_llama,
    write_moe,
)
from tests.native_plugin import LRU, compiled, native

GIB = 1 << 30


class Chooser:
    """A plugin that answers one hook with an object that chooses one thing."""

    def __init__(self, hook: str, answer: object) -> None:
        policy = SimpleNamespace(name="chooser", choose=lambda info: self.choose(info, answer))
        setattr(self, hook, hookimpl(lambda: policy))
        self.infos: list[object] = []

    def choose(self, info: object, answer: object) -> object:
        self.infos.append(info)
        if isinstance(answer, Exception):
            raise answer
        return answer


class Observer:
    def __init__(self) -> None:
        self.seen: list[tuple[str, object]] = []

    @hookimpl
    def nexus_model_loaded(self, info: object) -> None:
        self.seen.append(("loaded", info))

    @hookimpl
    def nexus_request_done(self, info: object) -> None:
        self.seen.append(("done", info))

    @hookimpl
    def nexus_request_started(self, info: object) -> None:
        self.seen.append(("started", info))

    @hookimpl
    def nexus_router_observer(self) -> SimpleNamespace:
        return SimpleNamespace(name="observer", observe=lambda r: self.seen.append(("routed", r)))

    @hookimpl
    def nexus_model_closed(self, info: object) -> None:
        self.seen.append(("closed", info))

    @hookimpl
    def nexus_register_commands(self, cli: click.Group) -> None:
        @cli.command()
        @click.option("--fail", is_flag=True)
        def seen(fail: bool) -> None:
            if fail:
                raise UsageError("failed as asked", hint="ask for something else")
            click.echo(json.dumps({"n": len(self.seen)}))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A header; the weights are holes."""
    path = tmp_path_factory.mktemp("kit") / "dense.gguf"
    dims = {"n_layers": 3, "n_embd": 256, "n_ff": 512, "n_heads": 4, "n_heads_kv": 2}
    write_llama(path, **dims, n_vocab=320, sparse=True)
    return path


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kit") / "moe.gguf"
    write_moe(path, dims=MoeDims(n_layers=4, n_experts=16, n_used=2), sparse=True)
    return path


@pytest.mark.parametrize("name", kit.__all__)
def test_every_public_name_can_be_had(name: str) -> None:
    assert getattr(kit, name) is not None and name in dir(kit)
    assert not isinstance(getattr(kit, name), ModuleType)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        kit.no_such_name  # noqa: B018


def test_importing_the_kit_loads_nothing_heavy() -> None:
    code = "import sys, nexus_ext.testing; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"numpy", "pytest", "click", "pluggy", "llama_cpp", "gguf"} & set(
        done.stdout.split()
    )


def test_only_what_is_named_is_loaded() -> None:
    observer = Observer()
    names = [r.name for r in load_plugins(observer).list_plugins()]
    assert "Observer" in names
    assert not any(r.name == "Observer" for r in load_plugins().list_plugins())


def test_what_cannot_be_loaded_is_an_error() -> None:
    with pytest.raises(PluginError, match="no plugin 'nowhere' is installed") as error:
        load_plugins("nowhere")
    assert "pip install -e ." in error.value.hint
    with pytest.raises(PluginError, match="implements no hook"):
        load_plugins(SimpleNamespace(__name__="empty"))


def test_the_process_uses_plugins_for_a_while_and_gets_its_own_back() -> None:
    before, mine = home.plugins(), load_plugins()
    with pytest.raises(ZeroDivisionError), use_plugins(mine):
        assert home.plugins() is mine
        _ = 1 / 0
    assert home.plugins() is before


def test_a_plan_is_that_of_the_runtime(dense: Path) -> None:
    plan = FakeEngine().plan(dense, weights_bytes=600_000)
    assert plan.weights_bytes <= 600_000 and "nvme" in plan.tiers.values()
    with pytest.raises(DoesNotFit):
        FakeEngine().plan(dense, weights_bytes=1000)


def test_the_machine_is_the_one_described(dense: Path) -> None:
    engine = FakeEngine(hardware=machine(ram="8G", available="7G", limit="6G", cores=3))
    assert engine.hardware.memory.limit_bytes == 6 * GIB
    assert engine.hardware.cpu.n_cores == 3
    assert engine.io_mode(streamed_bytes=2 * GIB) == "buffered"
    assert engine.io_mode(streamed_bytes=7 * GIB) == "direct"


class Solver:
    """A solver that changes the built-in's plan; `change` gets it and how often it was asked."""

    name = "changing"

    def __init__(self, change: Callable[[Plan, int], Plan]) -> None:
        self.n, self.change = 0, change

    @hookimpl
    def nexus_placement_solver(self) -> Solver:
        return self

    def solve(self, catalog: object, hardware: object, request: object) -> object:
        plan = solve(catalog, hardware, request)  # type: ignore[arg-type]
        self.n += 1
        return self.change(plan, self.n)


def forgetful(plan: Plan, n: int) -> Plan:
    return replace(plan, tiers=dict(list(plan.tiers.items())[1:]))


def fickle(plan: Plan, n: int) -> Plan:
    return replace(plan, notes=(f"asked for the {n}th time",))


def test_a_plan_that_leaves_something_out_is_noticed(dense: Path) -> None:
    with pytest.raises(AssertionError, match="leaves out 'token_embd"):
        FakeEngine(load_plugins(Solver(forgetful))).plan(dense, weights_bytes=600_000)
    with pytest.raises(AssertionError, match="two plans for the same"):
        FakeEngine(load_plugins(Solver(fickle))).plan(dense, weights_bytes=600_000)


def test_a_cache_policy_is_compared_with_the_builtin_and_the_optimum() -> None:
    plugin = Chooser("nexus_cache_policy", "least-stale")
    trace = synthetic_trace(200, 32, 4, zipf=1.0)
    run = FakeEngine(load_plugins(plugin)).cache(trace, share=0.25)
    assert run.policy == "least-stale" and run.builtin.policy == "adaptive"
    assert run.chosen.hit_rate < run.builtin.hit_rate < run.belady.hit_rate
    (info,) = plugin.infos
    assert (info.n_layers, info.n_experts, info.n_experts_used, info.slots) == (3, 32, 4, 8)  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="share is 0"):
        FakeEngine().cache(trace, share=0)


def test_a_predictor_is_measured_where_a_trace_can_tell() -> None:
    trace = synthetic_trace(200, 32, 4, reuse=0.5)
    previous = FakeEngine(load_plugins(Chooser("nexus_expert_predictor", "previous")))
    run = previous.predictor(trace)
    assert run.predictor == "previous" and len(run.layers) == 3
    assert run.slots is not None and abs(run.slots - repeats(trace)) < 0.01
    assert FakeEngine().predictor(trace).slots is None


class LikeBefore:
    """A predictor in Python: what the layer used for the token before."""

    name = "like-before"

    def __init__(self, mistake: str = "") -> None:
        self.mistake, self.used = mistake, {}  # type: ignore[var-annotated]

    def routed(self, layer: int, tokens: list[list[int]]) -> None:
        self.used[layer] = tokens[-1]

    def predict(self, layer: int, n_tokens: int, n_used: int, limit: int) -> list[int]:
        if self.mistake == "raises":
            raise RuntimeError("no idea")
        if self.mistake == "no such expert":
            return [99]
        return list(self.used.get(layer, ()))


def test_a_predictor_in_python_is_asked_for_each_layer_and_token() -> None:
    trace = synthetic_trace(100, 32, 4, reuse=0.5)
    engine = FakeEngine(load_plugins(Chooser("nexus_expert_predictor", LikeBefore())))
    run = engine.predictor(trace)
    builtin = FakeEngine(load_plugins(Chooser("nexus_expert_predictor", "previous")))
    assert run.predictor == "like-before"
    assert [x.layer for x in run.layers] == [1, 2]  # nothing is known before the first
    assert list(run.layers) == [
        replace(x, predictor="like-before") for x in builtin.predictor(trace).layers[1:]
    ]


@pytest.mark.parametrize("mistake", ["raises", "no such expert"])
def test_a_predictor_in_python_that_fails_is_named(mistake: str) -> None:
    plugin = Chooser("nexus_expert_predictor", LikeBefore(mistake))
    with pytest.raises(PluginError, match="plugin 'like-before': `predict`"):
        FakeEngine(load_plugins(plugin)).predictor(synthetic_trace(9, 32, 4))


IN_C = """
#include <stdlib.h>
static void *create(void *user, const nxp_layers *layers) {
    (void)user;
    return layers->n_experts[1] == 32 && layers->n_slots[0] == 16 ? calloc(2, sizeof(int)) : NULL;
}
static void routed(void *state, const nxp_routed *routed) {
    ((int *)state)[0] = routed->experts[0];
    ((int *)state)[1]++;
}
static int32_t predict(void *state, const nxp_predict_ask *ask, int32_t *out) {
    if (ask->struct_size < sizeof *ask || ((int *)state)[1] == 0) return -1;
    out[0] = ((int *)state)[0];
    return 1;
}
nxp_predictor policy = {
    .head = NXP_HEAD(nxp_predictor, NXP_PREDICTOR, "same-as-below"),
    .create = create, .destroy = free, .routed = routed, .predict = predict,
};
nxp_cache_policy other = {.head = NXP_HEAD(nxp_cache_policy, NXP_CACHE_POLICY, "other")};
"""


def test_a_predictor_in_c_is_asked_through_its_struct(tmp_path: Path) -> None:
    library = compiled(tmp_path, IN_C)
    trace = synthetic_trace(50, 32, 4, zipf=0.5)
    engine = FakeEngine(load_plugins(Chooser("nexus_expert_predictor", native(library))))
    run = engine.predictor(trace)
    below, above = (layer.numbers().tolist() for layer in trace.layers[:2])
    hits = sum(a[0] in b for a, b in zip(below, above, strict=True))
    assert run.layers[0].slots == hits / (50 * 4)
    with pytest.raises(PluginError, match="`create` has failed"):
        engine.predictor(trace, share=0.25)
    wrong = Chooser("nexus_expert_predictor", native(library, "other"))
    with pytest.raises(PluginError, match="no predictor of version 1"):
        FakeEngine(load_plugins(wrong)).predictor(trace)


def test_a_cache_policy_in_c_is_replayed_by_the_code_of_the_cache(tmp_path: Path) -> None:
    trace = synthetic_trace(200, 32, 4, zipf=1.0)
    mine = Chooser("nexus_cache_policy", native(compiled(tmp_path, LRU)))
    run = FakeEngine(load_plugins(mine)).cache(trace, share=0.25)
    builtin = FakeEngine(load_plugins(Chooser("nexus_cache_policy", "lru"))).cache(
        trace, share=0.25
    )
    assert run.policy == "policy"
    assert run.chosen.misses == builtin.chosen.misses


@pytest.mark.parametrize("answer", [RuntimeError("no"), "magic", None])
def test_a_decision_that_fails_is_an_error_here(answer: object) -> None:
    engine = FakeEngine(load_plugins(Chooser("nexus_io_policy", answer)))
    with pytest.raises((AssertionError, PluginError), match="nexus_io_policy"):
        engine.io_mode(streamed_bytes=1)


def test_a_model_goes_through_its_life(moe: Path) -> None:
    observer = Observer()
    engine = FakeEngine(load_plugins(observer))
    with engine.model(moe, plan=expert_plan(moe, 8)) as model:
        model.request(n_prompt_tokens=3, n_tokens=5)
        assert (model.cache_policy, model.predictor) == ("adaptive", "auto")
    assert [what for what, _ in observer.seen] == ["loaded", "started", "done", "closed"]
    started, done = observer.seen[1][1], observer.seen[2][1]
    assert started.id == done.id != ""  # type: ignore[attr-defined]
    assert (done.n_prompt_tokens, done.n_tokens) == (3, 5)  # type: ignore[attr-defined]
    assert done.read_bytes == 6 * model.plan.streamed_bytes_per_token > 0  # type: ignore[attr-defined]
    assert done.model.architecture == "qwen3moe"  # type: ignore[attr-defined]


def test_observers_of_routers_see_a_trace(moe: Path) -> None:
    observer, trace = Observer(), synthetic_trace(5, 32, 4)
    with FakeEngine(load_plugins(observer)).model(moe, plan=expert_plan(moe, 8)) as model:
        assert model.route(trace) == 5
        failed = model.request(error="ReadFailed: the disk is gone")
    routed = [found for what, found in observer.seen if what == "routed"]
    assert [len(r.layers) for r in routed] == [3] * 5  # type: ignore[attr-defined]
    last = routed[-1].layers[2]  # type: ignore[attr-defined]
    assert last.experts == (tuple(trace.layers[2].numbers()[-1].tolist()),)
    assert (failed.outcome, failed.error) == ("error", "ReadFailed: the disk is gone")


def test_a_plugin_for_a_newer_nexus_ext_is_an_error() -> None:
    newer = Chooser("nexus_io_policy", "direct")
    newer.nexus_plugin_api = 1000  # type: ignore[attr-defined]
    with pytest.raises(PluginError, match="version 1000 of the plugin API"):
        load_plugins(newer)


def test_an_observer_that_fails_is_an_error_here(moe: Path) -> None:
    class Failing(Observer):
        @hookimpl
        def nexus_request_done(self, info: object) -> None:
            raise RuntimeError("no disk left")

    engine = FakeEngine(load_plugins(Failing()))
    with pytest.raises(AssertionError, match="no disk left"):
        with engine.model(moe, weights_bytes=moe.stat().st_size // 2) as model:
            model.request()
    lenient = FakeEngine(load_plugins(Failing()), strict=False)
    with lenient.model(moe, weights_bytes=moe.stat().st_size // 2) as model:
        model.request()


def test_anything_can_use_the_plugins_for_a_while() -> None:
    engine = FakeEngine(load_plugins(Chooser("nexus_io_policy", "direct")))
    info = IoInfo(streamed_bytes=1, resident_bytes=0, available_bytes=GIB, limit_bytes=None)
    with engine.in_use() as used:
        assert home.plugins() is used is engine.plugins
        assert home.plugins().choose_io(info) == "direct"
    broken = FakeEngine(load_plugins(Chooser("nexus_io_policy", "magic")))
    with pytest.raises(AssertionError, match="magic"), broken.in_use() as used:
        assert used.choose_io(info) in ("direct", "buffered")


def test_commands_are_those_of_the_plugins_under_test() -> None:
    engine = FakeEngine(load_plugins(Observer()))
    assert engine.command("seen").json == {"n": 0}
    failed = engine.command("seen", "--fail")
    assert failed.status == 2 and "failed as asked" in failed.err and not failed.out
    without = FakeEngine().command("seen")
    assert without.status == 2 and "no command 'seen'" in without.err


def test_a_server_answers_as_scripted_and_tells_the_plugins_in_use() -> None:
    observer = Observer()
    plugins = load_plugins(observer)
    with scripted_server(plugins, answer="wörld") as client:
        body = {"model": "scripted", "messages": [{"role": "user", "content": "hello"}]}
        reply = client.post("/v1/chat/completions", json=body).json()
        assert reply["choices"][0]["message"]["content"] == "wörld"
        assert client.post("/v1/chat/completions", json={**body, "model": "x"}).status_code == 404
        assert client.get("/metrics").status_code == 200
        assert plugins.wait_for_observers()
    assert [what for what, _ in observer.seen] == ["started", "done"]
    assert observer.seen[1][1].n_tokens == len("wörld".encode())  # type: ignore[attr-defined]


def test_a_server_without_a_client_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "starlette.testclient", None)
    with pytest.raises(UsageError, match="client of the server") as error:
        with scripted_server(load_plugins()):
            pass
    assert error.value.hint == "pip install httpx"


def test_plugins_is_what_the_kit_hands_out() -> None:
    assert isinstance(load_plugins(), Plugins)
