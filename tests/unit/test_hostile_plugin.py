"""Whatever a plugin does, each hook has the answer that it has without plugins."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from starlette.testclient import TestClient

from nexus_ext.codecs import Codecs
from nexus_ext.errors import FormatError, NexusError
from nexus_ext.formats import open_model
from nexus_ext.multiplexer import deciding, eviction
from nexus_ext.multiplexer.eviction import Holder, Memory
from nexus_ext.placement import PlanRequest, solve
from nexus_ext.policies import CacheInfo, IoInfo, Routing
from nexus_ext.quality.allocation import Choice, Item, allocate
from nexus_ext.server import create_app
from nexus_ext.server.plugin_metrics import plugin_metrics
from nexus_ext.store import Library, ModelName
from nexus_ext.units import MIB
from tests.fake_engine import FakeEngine
from tests.hostile import MODES, hostile_plugins
from tests.unit.hook_exercises import DONE, MODEL, START, STORIES
from tests.unit.test_placement_builders import machine, model

INFO = IoInfo(1, 0, 100, None)
EXPERTS = CacheInfo(2, 8, 2, 4)
CATALOG, MACHINE, REQUEST = model(), machine(), PlanRequest(weights_bytes=2 * MIB)
MEMORY = Memory(
    100,
    (
        Holder("a", 10, (10, 10), loaded=True, resident=2, last_used_ns=1),
        Holder("b", 10, (30, 20), loaded=True, resident=1, last_used_ns=2),
        Holder("pinned", 5, (), loaded=True, pinned=True),
        Holder("new", 30, (10, 10)),
    ),
)
ITEMS = [
    Item(name, (Choice("Q4_K", 100, 2.0), Choice("Q8_0", 200, 0.1))) for name in ("a", "b", "c")
]
RAW = bytes(range(256)) * 4


@pytest.mark.parametrize("mode", MODES)
def test_every_decision_is_the_built_in_one(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plugins = hostile_plugins(mode, monkeypatch)
    for _ in range(2):
        assert plugins.choose_io(INFO) == "buffered"
        assert plugins.choose_cache(EXPERTS) == "adaptive"
        assert plugins.choose_predictor(EXPERTS) == "auto"
        assert plugins.solve(CATALOG, MACHINE, REQUEST) == solve(CATALOG, MACHINE, REQUEST)
        assert deciding.activate(MEMORY, "new") == eviction.activate(MEMORY, "new")
        assert deciding.make_room(MEMORY, 50, "new") == eviction.make_room(MEMORY, 50, "new")
        assert plugins.allocate(ITEMS, 450) == allocate(ITEMS, 450)
    states = {r.name: r for r in plugins.list_plugins() if not r.builtin}
    assert "registered already, as 'hostile-again'" in states["hostile"].error
    record = states["hostile-again"]
    if "hooks are slow" not in mode:
        assert record.state == "disabled"
        assert {"nexus_io_policy", "nexus_placement_solver"} <= set(record.disabled)
        assert record.error


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_added_that_does_not_work_and_nothing_is_missing(
    mode: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plugins = hostile_plugins(mode, monkeypatch)
    codecs = plugins.codecs()
    assert set(codecs.names()) - {"hostile"} == set(Codecs().names())
    if "hostile" in codecs.names():
        assert codecs.get("hostile").encode(memoryview(RAW), "") == RAW
    cli = click.Group(commands={"run": click.Command("run")})
    plugins.register_commands(cli)
    assert list(cli.commands) == ["run"]
    assert plugin_metrics(()) == b""
    library = Library.at(tmp_path / "own", ollama="", lm_studio="")
    library.own.create(ModelName.parse("mine"), STORIES)
    assert [str(name) for name in library.names()] == ["mine:latest"]
    assert library.find("mine").path == str(STORIES)
    with pytest.raises(NexusError, match="there is no model"):
        library.find("other")
    unknown = tmp_path / "unknown"
    unknown.write_bytes(b"what is this?" * 1000)
    with pytest.raises(FormatError, match="the magic is"):
        open_model(unknown)
    assert open_model(STORIES).container == "gguf"


@pytest.mark.parametrize("mode", MODES)
def test_the_server_starts_and_serves_what_it_serves(
    mode: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plugins = hostile_plugins(mode, monkeypatch)
    library = Library.at(tmp_path / "own", ollama="", lm_studio="")
    library.own.create(ModelName.parse("mine"), STORIES)
    body = {"model": "mine", "prompt": "Hi", "max_tokens": 5}
    with TestClient(create_app(FakeEngine(["mine:latest"]), library)) as client:
        assert client.get("/health", headers={"host": "localhost"}).status_code == 200
        answer = client.post("/v1/completions", json=body, headers={"host": "localhost"})
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"] == "Hello"
        metrics = client.get("/metrics", headers={"host": "localhost"})
        assert metrics.status_code == 200 and "nexus_requests_total" in metrics.text
    assert plugins.wait_for_observers()


@pytest.mark.parametrize("mode", MODES)
def test_observers_cannot_be_heard(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plugins = hostile_plugins(mode, monkeypatch)
    for _ in range(12):
        plugins.model_loaded(MODEL)
        plugins.request_started(START)
        plugins.request_done(DONE)
        plugins.observe_routing(Routing(MODEL, ()))
        plugins.model_closed(MODEL)
    record = next(r for r in plugins.list_plugins() if r.name == "hostile-again")
    if mode.startswith("hooks raise") or mode == "hooks exit":
        assert "nexus_request_done" in record.disabled


def test_the_run_is_the_users_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    plugins = hostile_plugins("hooks are slow", monkeypatch)
    monkeypatch.setitem(MODES, "hooks are slow", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        plugins.choose_io(INFO)
