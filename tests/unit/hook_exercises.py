"""What the example of each hook's page is put through: a function for each hook, by its name.

Each gets the plugins with the example among them, a folder, and a patch. Together with the state of
the plugin afterwards this says that the example is accepted and does what its page promises.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from starlette.testclient import TestClient

from nexus_ext.codecs import RAW
from nexus_ext.formats import open_model
from nexus_ext.formats.sources import open_source
from nexus_ext.multiplexer import deciding, eviction
from nexus_ext.multiplexer.eviction import Holder, Memory
from nexus_ext.placement import PlanRequest
from nexus_ext.plugins import Plugins
from nexus_ext.plugins.containers import open_container, writer_for
from nexus_ext.policies import (
    CacheInfo,
    IoInfo,
    KernelInfo,
    LayerRouting,
    ModelInfo,
    RequestInfo,
    RequestStart,
    Routing,
)
from nexus_ext.quality.allocation import Choice, Item
from nexus_ext.server import create_app
from nexus_ext.server.config import Config, ServerConfig
from nexus_ext.server.plugin_metrics import plugin_metrics
from nexus_ext.store import Library
from nexus_ext.units import MIB
from tests.fake_engine import FakeEngine
from tests.unit.test_placement_builders import machine, model

MODEL = ModelInfo("m.gguf", "f" * 32, "llama", 1000, 0, None)
START = RequestStart("r-1", "python", "m.gguf", 5, time.time_ns())
DONE = RequestInfo(MODEL, 5, 9, 1000, 2_000_000_000, 0, id="r-1")
EXAMPLE = "plugin_dist_example_example"
STORIES = Path(__file__).resolve().parents[1] / "models" / "stories260K-q4_0.gguf"

Patch = pytest.MonkeyPatch


def nexus_placement_solver(plugins: Plugins, folder: Path, patch: Patch) -> None:
    catalog, request = model(), PlanRequest(weights_bytes=3 * MIB)
    plan = plugins.solve(catalog, machine(), request)
    attention = {t for name, t in plan.tiers.items() if "attn_" in name and "norm" not in name}
    assert attention == {"ram"} and "nvme" in plan.tiers.values()
    smaller = replace(request, weights_bytes=2 * MIB)
    assert plugins.solve(catalog, machine(), smaller) is not None
    assert plugins.placement_solver().name == "attention-first"


def nexus_io_policy(plugins: Plugins, folder: Path, patch: Patch) -> None:
    assert plugins.choose_io(IoInfo(1, 0, 100, None)) == "direct"


def nexus_cache_policy(plugins: Plugins, folder: Path, patch: Patch) -> None:
    assert plugins.choose_cache(CacheInfo(2, 8, 2, 7)) == "lru"
    assert plugins.choose_cache(CacheInfo(2, 8, 2, 4)) == "adaptive"


def nexus_expert_predictor(plugins: Plugins, folder: Path, patch: Patch) -> None:
    assert plugins.choose_predictor(CacheInfo(2, 8, 2, 4)) == "none"


def nexus_eviction_policy(plugins: Plugins, folder: Path, patch: Patch) -> None:
    small = Holder("small", 10, (10, 10), loaded=True, resident=2, last_used_ns=1)
    large = Holder("large", 10, (30, 30), loaded=True, resident=2, last_used_ns=2)
    memory = Memory(110, (small, large, Holder("new", 20, ())))
    found = deciding.activate(memory, "new")
    assert found is not None and [step.name for step in found.steps] == ["large"]
    builtin = eviction.activate(memory, "new")
    assert builtin is not None and [step.name for step in builtin.steps] == ["small"]
    assert deciding.make_room(memory, 25, "new") is not None


def nexus_quantization_allocator(plugins: Plugins, folder: Path, patch: Patch) -> None:
    menu = (Choice("Q4_K", 100, 2.0), Choice("Q8_0", 200, 0.1))
    items = [Item(name, menu) for name in ("output.weight", "a", "b")]
    found = plugins.allocate(items, 400)
    assert found.types == {"output.weight": "Q8_0", "a": "Q4_K", "b": "Q4_K"}
    assert (found.nbytes, round(found.loss, 6)) == (400, 4.1)
    assert plugins.allocate(items, 300).nbytes == 300  # too little for its wish


def nexus_codec(plugins: Plugins, folder: Path, patch: Patch) -> None:
    codec, raw = plugins.codecs().get("deflate"), bytes(1000) + b"x" * 1000
    stored, back = codec.encode(memoryview(raw), "F32"), bytearray(2000)
    codec.decode(memoryview(stored), memoryview(back))
    assert back == raw and len(stored) < 100 and RAW in plugins.codecs().names()


def nexus_format_reader(plugins: Plugins, folder: Path, patch: Patch) -> None:
    target = folder / "model"
    write_folder(STORIES, target)
    found, stock = open_container(str(target)), open_model(STORIES)
    assert found is not None and found.container == "folder"
    assert [t.name for t in found.tensors] == [t.name for t in stock.tensors]
    source, other = open_source(str(target)), open_source(STORIES)
    buffer = bytearray(1 << 20)
    for number, tensor in enumerate(stock.tensors):
        mine = bytes(source.read(number, 0, tensor.nbytes, buffer))
        assert mine == bytes(other.read(number, 0, tensor.nbytes, buffer)), tensor.name
    source.close()
    other.close()


def write_folder(source: Path, target: Path) -> None:
    """Write a GGUF as the container of the page of `nexus_format_reader`."""
    from gguf import GGUFReader

    reader = GGUFReader(source)
    metadata = {
        name: field.contents()
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")
    }
    target.mkdir()
    tensors = []
    with open(target / "weights.bin", "wb") as file:
        file.write(b"weights".ljust(64, b"\0"))
        for tensor in reversed(reader.tensors):  # any order does
            file.write(bytes(-file.tell() % 32))
            tensors.append(
                {
                    "name": tensor.name,
                    "shape": [int(n) for n in tensor.shape],
                    "type": tensor.tensor_type.name,
                    "offset": file.tell(),
                }
            )
            file.write(tensor.data.tobytes())
    described = {"metadata": metadata, "tensors": tensors[::-1]}
    (target / "model.json").write_text(json.dumps(described), encoding="utf-8")


def nexus_format_writer(plugins: Plugins, folder: Path, patch: Patch) -> None:
    found = writer_for("model.weights")
    assert found is not None and writer_for("model.other") is None
    source, told = open_source(STORIES), []
    target = folder / "model.weights"
    paths = found[1].write(
        source, str(target), overwrite=False, progress=lambda done, total: told.append(done)
    )
    listed = json.loads(Path(paths[1]).read_text(encoding="utf-8"))
    weights = target.read_bytes()
    for number, (name, _, _, at) in enumerate(listed):
        nbytes = source.catalog.tensors[number].nbytes
        assert name == source.catalog.tensors[number].name
        assert weights[at : at + nbytes] == bytes(source.read(number, 0, nbytes, bytearray(nbytes)))
    assert told == sorted(told) and told
    source.close()


def nexus_kernel_provider(plugins: Plugins, folder: Path, patch: Patch) -> None:
    (pair,) = plugins.collect("nexus_kernel_provider", lambda answer: answer)
    provider = pair[1]
    assert provider.claims(KernelInfo("MUL_MAT", "TQ2_0", 256, 8)) is False  # type: ignore[attr-defined]


def nexus_model_store(plugins: Plugins, folder: Path, patch: Patch) -> None:
    shelf = folder / "shelf"
    shelf.mkdir()
    (shelf / "mine.gguf").write_bytes(STORIES.read_bytes())
    patch.setenv("SHELF", str(shelf))
    library = Library.at(folder / "own", ollama="", lm_studio="")
    assert [str(name) for name in library.names()] == ["shelf:mine"]
    found = library.find("shelf:mine")
    assert (found.origin, found.path) == ("shelf", str(shelf / "mine.gguf"))


def nexus_server_routes(plugins: Plugins, folder: Path, patch: Patch) -> None:
    library = Library.at(folder / "own", ollama="", lm_studio="")
    config = Config(server=ServerConfig(api_keys=["secret"]))
    made = create_app(FakeEngine([]), library, config)
    with TestClient(made, base_url="http://localhost") as client:
        assert client.get("/hello").status_code == 401
        answer = client.get("/hello?name=you", headers={"Authorization": "Bearer secret"})
        assert answer.json() == {"hello": "you"}


def nexus_metrics(plugins: Plugins, folder: Path, patch: Patch) -> None:
    plugins.request_done(DONE)
    assert b'outcomes_total{outcome="stop"} 1.0' in plugin_metrics(())


def nexus_register_commands(plugins: Plugins, folder: Path, patch: Patch) -> None:
    cli = click.Group()
    plugins.register_commands(cli)
    assert CliRunner().invoke(cli, ["hello", "you"]).output == "hello you\n"


def nexus_model_loaded(plugins: Plugins, folder: Path, patch: Patch) -> None:
    plugins.model_loaded(MODEL)


def nexus_model_closed(plugins: Plugins, folder: Path, patch: Patch) -> None:
    plugins.model_closed(MODEL)


def nexus_request_started(plugins: Plugins, folder: Path, patch: Patch) -> None:
    plugins.request_started(START)
    assert sys.modules[EXAMPLE].running == {"r-1": START}
    plugins.request_done(DONE)
    assert sys.modules[EXAMPLE].running == {}


def nexus_request_done(plugins: Plugins, folder: Path, patch: Patch) -> None:
    said: list[str] = []
    patch.setattr("builtins.print", lambda text, **_: said.append(text))
    plugins.request_done(DONE)
    assert said == ["r-1: 9 tokens, 4.00 tokens/s"]


def nexus_router_observer(plugins: Plugins, folder: Path, patch: Patch) -> None:
    assert plugins.has_router_observers()
    plugins.observe_routing(Routing(MODEL, (LayerRouting(3, ((1, 2), (2, 5))),)))
    assert sys.modules[EXAMPLE].uses == {(3, 1): 1, (3, 2): 2, (3, 5): 1}
