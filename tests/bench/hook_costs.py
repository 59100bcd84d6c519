"""What plugins cost: an observer of routers for each token, a decision, an event.

    python -m tests.bench.hook_costs

An observer is compared with none on a mixture with as many decisions a token as a large one, and
tiny matrices, all in memory: the worst case, since a token takes next to no time. Runs alternate.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType

import pytest

from nexus_ext import hookimpl
from nexus_ext.multiplexer import deciding, eviction
from nexus_ext.multiplexer.eviction import Holder, Memory
from nexus_ext.plugin_registry import GROUP
from nexus_ext.plugins import Plugins
from nexus_ext.policies import IoInfo, Routing
from nexus_ext.testing.synthetic import MoeDims, write_moe
from tests.integration.streaming import prompt
from tests.integration.test_experts import cached

# As many decisions as a token of a large mixture (Qwen3-30B-A3B: 48 layers, 8 of 128 experts).
DIMS = MoeDims(n_layers=48, n_embd=64, n_ff=32, n_heads=2, n_heads_kv=1, n_experts=128, n_used=8)
N_TOKENS = 64


class Nothing:
    name = "nothing"
    calls = 0

    def observe(self, routing: Routing) -> None:
        Nothing.calls += 1


class Takes:
    """Two models, one of which must make room."""

    name = "built-in once more"
    activate = staticmethod(eviction.activate)
    make_room = staticmethod(eviction.make_room)


def plugins_with(patch: pytest.MonkeyPatch, **hooks: Callable[[], object]) -> Plugins:
    plugin = ModuleType("bench")
    for name, function in hooks.items():
        setattr(plugin, name, hookimpl(lambda function=function: function(), specname=name))
    patch.setattr(EntryPoint, "load", lambda self: plugin)
    entries = [EntryPoint("bench", "bench", GROUP)] if hooks else []
    found = Plugins(found=entries, environ={})
    patch.setattr("nexus_ext.plugins._plugins", found)
    return found


def observer(folder: Path, patch: pytest.MonkeyPatch) -> None:
    path = write_moe(folder / "moe.gguf", dims=DIMS)[0]
    times: dict[str, list[float]] = {"without": [], "with": []}
    handing_over: list[float] = []
    for _ in range(5):
        for what in times:
            hooks = {"nexus_router_observer": Nothing} if what == "with" else {}
            plugins_with(patch, **hooks)
            with cached(path, 128, logits_all=False) as llm:
                watch = llm.nexus.router_watch
                assert (watch is not None) == (what == "with")
                if watch is not None:
                    tell = watch.tell

                    def timed(tell: Callable[[], None] = tell) -> None:
                        begin = time.perf_counter()
                        tell()
                        handing_over.append(time.perf_counter() - begin)

                    watch.tell = timed  # type: ignore[method-assign]
                tokens = prompt(N_TOKENS, llm.n_vocab())
                llm.eval(tokens[:2])
                handing_over.clear()
                for token in tokens[2:]:
                    begin = time.perf_counter()
                    llm.eval([token])
                    times[what].append(time.perf_counter() - begin)
    print(f"\n{DIMS.n_layers} layers, {DIMS.n_used} experts a token, all cached:")
    for what, seconds in times.items():
        print(
            f"  {what:8s} an observer: {statistics.median(seconds) * 1e6:8.0f} us a token (median)"
        )
    print(f"  handing over alone: {statistics.median(handing_over) * 1e6:.0f} us a token (median)")


def decisions(patch: pytest.MonkeyPatch) -> None:
    holders = tuple(
        Holder(f"m{i}", 10, (10,) * 64, loaded=True, resident=64, last_used_ns=i) for i in range(8)
    )
    memory = Memory(8 * 650, (*holders, Holder("new", 30, (10,) * 64)))
    info = IoInfo(1, 0, 100, None)
    for what in ("built-in", "plugin"):
        hooks = {"nexus_eviction_policy": Takes} if what == "plugin" else {}
        plugins = plugins_with(patch, **hooks)
        for name, call in (
            ("choose_io", lambda plugins=plugins: plugins.choose_io(info)),
            ("an event that nobody watches", lambda plugins=plugins: plugins.model_loaded(None)),
            ("activate, 8 models of 64 units", lambda: deciding.activate(memory, "new")),
        ):
            call()
            begin = time.perf_counter()
            for _ in range(200):
                call()
            each = (time.perf_counter() - begin) / 200
            print(f"{what:8s} {name:32s} {each * 1e6:8.1f} us")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        observer(Path(folder), patch)
        decisions(patch)


if __name__ == "__main__":
    main()
