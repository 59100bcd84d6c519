"""`nexus trace` records what routers decide; a replay counts what the cache in C counts."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nexus_ext import Llama
from nexus_ext.native_plugins import replay_builtin
from nexus_ext.placement import Pin, Plan, PlanRequest
from nexus_ext.placement.experts import groups, slot_bytes
from nexus_ext.placement.plan import ExpertCache
from nexus_ext.routing import RoutingTrace, TracedLayer, replay
from nexus_ext.runtime.planning import plan_model
from nexus_ext.testing.synthetic import MoeDims, write_moe
from tests.cli_support import call, hardware_file
from tests.integration.streaming import prompt
from tests.models_folder import model_folders

TRAINED = "tinymoe-41M-Q4_K_M.gguf"
N_TOKENS = 200
SMALL: dict[str, Any] = {
    "n_ctx": 256,
    "n_batch": 64,
    "n_ubatch": 64,
    "n_threads": 2,
    "verbose": False,
}
TEXT = "One day a little girl found a box. She wanted to know what was in it. " * 12


@pytest.fixture(scope="module", params=["synthetic", "trained"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "trained":
        found = [folder / TRAINED for folder in model_folders() if (folder / TRAINED).is_file()]
        if not found:
            pytest.skip(f"{TRAINED} is not in the repository; the synthetic model stands for it")
        return found[0]
    path = tmp_path_factory.mktemp("moe") / "moe.gguf"
    dims = MoeDims(n_layers=3, n_experts=16, n_used=3)
    [written] = write_moe(path, dims=dims)
    return written


@pytest.fixture(scope="module")
def hardware(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hardware_file(tmp_path_factory.mktemp("hardware"))


def with_cache(model: Path, slots: int) -> Plan:
    """A plan with all experts streamed through a cache of `slots` in each layer."""
    request = PlanRequest(
        weights_bytes=1 << 30,
        gpu_bytes=0,
        n_ctx=SMALL["n_ctx"],
        n_batch=64,
        n_ubatch=64,
        pins=(Pin("_exps", "nvme"),),
    )
    planned = plan_model(model, request)
    caches = tuple(
        ExpertCache(tuple(t.name for t in parts), slots, slots * slot_bytes(parts))
        for parts in groups(planned.catalog.tensors)
    )
    n_bytes = sum(cache.nbytes for cache in caches)
    return replace(
        planned.plan,
        expert_caches=caches,
        breakdown={**planned.plan.breakdown, "expert cache": n_bytes},
    )


def decode(
    model: Path, slots: int, policy: str, tokens: list[int]
) -> tuple[RoutingTrace, int, int]:
    """Run tokens one at a time: what the routers decided, and uses and misses of the cache."""
    llm = Llama(model, plan=with_cache(model, slots), warm_start=False, **SMALL)
    try:
        core, catalog = llm.nexus.model, llm.nexus.catalog
        assert core is not None
        core.set_cache_policy(policy)
        core.set_predictor("none")  # a replay knows nothing of what is read ahead
        core.record_routing(True)
        before = core.stats()
        for token in tokens:
            llm.eval([token])
        after = core.stats()
        entries = core.take_routing()
    finally:
        llm.close()
    layers = []
    for parts in groups(catalog.tensors):
        members = {catalog.tensors.index(tensor) for tensor in parts}
        rows = [row for extent, rows in entries if extent in members for row in rows]
        assert len(rows) == len(tokens)
        layers.append(
            TracedLayer(
                layer=parts[0].layer or 0,
                n_experts=parts[0].n_experts,
                n_used=len(rows[0]),
                record_bytes=sum(t.nbytes // t.n_experts for t in parts),
                slot_bytes=slot_bytes(parts),
                experts=bytes(expert for row in rows for expert in row),
            )
        )
    trace = RoutingTrace(catalog.fingerprint, "test", (1,) * len(tokens), tuple(layers))
    return (
        trace,
        after.expert_uses - before.expert_uses,
        after.expert_misses - before.expert_misses,
    )


@pytest.mark.parametrize("policy", ["adaptive", "lfru", "lru", "lfu", "least-stale"])
def test_a_replay_counts_what_the_cache_counts(model: Path, policy: str) -> None:
    tokens = prompt(N_TOKENS, 256)
    catalog = plan_model(model, PlanRequest(weights_bytes=1 << 30)).catalog
    n_used, n_experts = catalog.shape.n_experts_used, catalog.shape.n_experts
    for slots in (n_used, n_used + 1, n_experts // 2, n_experts - 1, n_experts):
        trace, uses, misses = decode(model, slots, policy, tokens)
        [[expected]] = replay(
            trace, [policy], [[slots] * len(trace.layers)], by_code=replay_builtin
        )
        assert (uses, misses) == (sum(expected.uses), sum(expected.misses)), slots


def recorded(model: Path, hardware: Path, *arguments: str | Path, to: Path) -> RoutingTrace:
    done = call("trace", model, "-o", to, "--hardware", hardware, "-t", "1", "--json", *arguments)
    assert done.status == 0, done.out
    trace = RoutingTrace.from_bytes(to.read_bytes())
    assert done.json["n_tokens"] == trace.n_tokens
    return trace


def test_a_trace_is_the_same_whatever_the_batches_and_the_memory(
    model: Path, hardware: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    whole = recorded(model, hardware, "-f", text, "-c", "128", "--weights", "1G", to=tmp_path / "a")
    small = recorded(model, hardware, "-f", text, "-c", "128", "-ub", "32", to=tmp_path / "b")
    assert whole.n_tokens > 128 and max(whole.passes) == 128 and max(small.passes) == 32
    assert sum(whole.passes) == whole.n_tokens == small.n_tokens
    for one, other in zip(whole.layers, small.layers, strict=True):
        # Not all: a batch of another size rounds differently, which can turn a close decision.
        assert (one.numbers() == other.numbers()).mean() > 0.95
    assert [layer.n_experts for layer in whole.layers] == [
        parts[0].n_experts
        for parts in groups(plan_model(model, PlanRequest(weights_bytes=1 << 30)).catalog.tensors)
    ]
    assert 0 < whole.disk_bytes_s <= 1e9 and whole.compute_s > 0


def test_a_prompt_is_continued_token_by_token(model: Path, hardware: Path, tmp_path: Path) -> None:
    trace = recorded(model, hardware, "One day", "-n", "5", "-c", "64", to=tmp_path / "trace")
    assert 1 <= len(trace.passes) <= 6 and trace.passes[1:] == (1,) * (len(trace.passes) - 1)


def test_predictors_are_compared_layer_by_layer(
    model: Path, hardware: Path, tmp_path: Path
) -> None:
    """The control is a gate on its own input: it must be right about everything."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    arguments = (
        "trace",
        model,
        "-o",
        tmp_path / "t",
        "-f",
        text,
        "-c",
        "128",
        "-n",
        "9",
        "-t",
        "1",
    )
    arguments = (*arguments, "--hardware", hardware, "--predictors")
    found = call(*arguments, "--json").json
    by_name: dict[str, list[dict[str, Any]]] = {}
    for one in found["predictors"]:
        by_name.setdefault(one["predictor"], []).append(one)
    n = found["n_layers"]
    assert {name: len(of_name) for name, of_name in by_name.items()} == {
        "gate": n - 1,  # of the first layer nothing is known before it
        "previous": n,
        "popular": n,
        "control": n,
    }
    assert all(one["slots"] == one["exact"] == 1.0 for one in by_name["control"])
    for one in found["predictors"]:
        assert 0 <= one["exact"] <= one["slots"] <= 1
        assert one["n_tokens"] == found["n_tokens"] - (one["predictor"] in ("previous", "popular"))
    shown = call(*arguments)
    assert shown.status == 0 and "control" in shown.out and "100.0%" in shown.out


@pytest.fixture(scope="module")
def trace_file(hardware: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trace")
    [model] = write_moe(directory / "moe.gguf", dims=MoeDims(n_layers=2, n_experts=8, n_used=2))
    recorded(model, hardware, "One day", "-n", "20", "-c", "64", to=directory / "trace")
    return directory / "trace"


def test_replay_shows_every_policy_beside_the_optimum(trace_file: Path) -> None:
    rows = call("replay", trace_file, "--json").json["rows"]
    assert {row["policy"] for row in rows} == {
        "adaptive", "lfru", "lru", "lfu", "least-stale", "random", "belady", "none",
    }  # fmt: skip
    assert {row["share"] for row in rows} >= {0.25, 1.0}
    assert all(row["below_belady"] >= 0 and row["tok_s"] > 0 for row in rows)
    assert all(row["hit_rate"] == 0 for row in rows if row["policy"] == "none")
    shown = call("replay", trace_file, "--share", "50%", "--policy", "lru,global-lru")
    assert shown.status == 0 and "global-lru" in shown.out and "50%" in shown.out


def test_replay_takes_a_size_in_bytes_and_rates(trace_file: Path) -> None:
    trace = RoutingTrace.from_bytes(trace_file.read_bytes())
    size = str(3 * sum(layer.slot_bytes for layer in trace.layers))
    done = call("replay", trace_file, "--cache", size, "--policy", "none", "--disk", "1M",
                "--compute", "0", "--json").json  # fmt: skip
    [row] = done["rows"]
    assert row["slots"] == 3
    assert row["tok_s"] == pytest.approx((1 << 20) / row["bytes_per_token"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cache", "1M", "--share", "25%"], "both name a size"),
        (["--share", "1.5"], "not a part"),
        (["--share", "most"], "not a part"),
        (["--policy", "lru,best"], "'best'"),
    ],
)
def test_replay_refuses_what_it_cannot_use(
    trace_file: Path, arguments: list[str], words: str
) -> None:
    done = call("replay", trace_file, *arguments)
    assert done.status == 2 and words in done.err


def test_files_that_are_no_traces_are_refused(model: Path, tmp_path: Path) -> None:
    assert "cannot be read" in call("replay", tmp_path / "none").err
    damaged = tmp_path / "damaged"
    shutil.copy(__file__, damaged)
    done = call("replay", damaged)
    assert done.status == 1 and "no trace" in done.err


def test_a_trace_needs_one_text_and_experts(model: Path, hardware: Path, tmp_path: Path) -> None:
    target = tmp_path / "trace"
    assert call("trace", model, "-o", target).status == 2
    assert call("trace", model, "-o", target, "text", "-f", "file").status == 2
    assert "cannot be read" in call("trace", model, "-o", target, "-f", tmp_path / "none").err
    long = call("trace", model, "-o", target, "One", "-n", "64", "-c", "64", "--hardware", hardware)
    assert long.status == 2 and "context" in long.err
    [dense] = [f / "stories260K-f32.gguf" for f in model_folders()[:1]]
    assert "no experts" in call("trace", dense, "-o", target, "One", "--hardware", hardware).err
    assert not target.exists()


def test_a_plot_without_matplotlib_names_the_extra(
    trace_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = call("replay", trace_file, "--plot", tmp_path / "plot.png")
    assert done.status == 2 and "matplotlib" in done.err and "nexus_ext[plot]" in done.err


def test_a_plot_has_a_line_for_each_policy(
    trace_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[str, list[float], list[float]]] = []

    class Axes:
        def plot(self, x: list[float], y: list[float], *, label: str, **_: object) -> None:
            drawn.append((label, list(x), list(y)))

        def __getattr__(self, name: str) -> Any:
            return lambda *_, **__: None

    class Figure:
        def savefig(self, file: str) -> None:
            Path(file).write_bytes(b"drawn")

        def tight_layout(self) -> None: ...

    matplotlib, pyplot = ModuleType("matplotlib"), ModuleType("matplotlib.pyplot")
    vars(matplotlib).update(use=lambda _: None, pyplot=pyplot)
    vars(pyplot).update(subplots=lambda **_: (Figure(), Axes()), close=lambda _: None)
    monkeypatch.setitem(sys.modules, "matplotlib", matplotlib)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", pyplot)
    target = tmp_path / "plot.png"
    done = call("replay", trace_file, "--policy", "lru,belady", "--share", "50%", "--plot", target)
    assert done.status == 0 and target.read_bytes() == b"drawn"
    assert [label for label, _, _ in drawn] == ["lru", "belady"]
    assert all(len(x) > 1 and x == sorted(x) and max(y) <= 1 for _, x, y in drawn)
