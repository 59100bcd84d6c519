"""What plugins cost: finding them, asking them, telling them, and decoding with all that are there.

    pip install plugins/nexus-*            # or those that are to be measured
    python -m tests.bench.plugin_cost
    python -m tests.bench.plugin_cost --model model.gguf --share 40 --rounds 9

The plugins are those that are installed in this environment. Calls are timed in loops of
`--calls`, with one plugin made for it that does nothing. For decoding a model is opened and closed
in turn without and with all plugins, A B A B, past the page cache; the ratio is that of each pair.
A synthetic mixture of experts is written to `--dir` (and removed) unless `--model` names a file.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nexus_ext import hookimpl
from nexus_ext.errors import DoesNotFit
from nexus_ext.plugins import Plugins
from nexus_ext.policies import CacheInfo, IoInfo, ModelInfo, RequestInfo
from nexus_ext.testing import MoeDims, load_plugins, machine, use_plugins, write_moe

MODEL = ModelInfo("model.gguf", "0" * 32, "llama", 1 << 30, 1 << 28, "direct")
REQUEST = RequestInfo(MODEL, 16, 8, 1_000_000, 8_000_000, 1 << 30)
DIMS = MoeDims(
    n_layers=8, n_embd=1024, n_ff=512, n_heads=8, n_heads_kv=4, n_vocab=2048, n_experts=32, n_used=4
)


class Nothing:
    """Implements hooks of each kind, and does nothing in them."""

    def __init__(self) -> None:
        self._io = SimpleNamespace(name="nothing", choose=lambda info: "direct")
        self._cache = SimpleNamespace(name="nothing", choose=lambda info: "lfru")

    @hookimpl
    def nexus_io_policy(self) -> Any:
        return self._io

    @hookimpl
    def nexus_cache_policy(self) -> Any:
        return self._cache

    @hookimpl
    def nexus_request_done(self, info: RequestInfo) -> None:
        pass


def per_call(call: Callable[[], object], n: int) -> float:
    """Return the seconds of one call, the best of five loops."""
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(n):
            call()
        best = min(best, time.perf_counter() - begin)
    return best / n


def calls(n: int) -> None:
    plugins, builtins = load_plugins(Nothing()), load_plugins()
    io = IoInfo(1 << 30, 1 << 30, 1 << 33, None)
    cache = CacheInfo(24, 64, 8, 16)
    for what, call in (
        ("ask an I/O policy (once a model)", lambda: plugins.choose_io(io)),
        ("ask a cache policy (once a model)", lambda: plugins.choose_cache(cache)),
        ("tell of a request (once a request)", lambda: plugins.request_done(REQUEST)),
        ("tell nobody of a request", lambda: builtins.request_done(REQUEST)),
    ):
        print(f"{what:<40} {per_call(call, n) * 1e6:8.2f} us")


def finding(rounds: int) -> None:
    code = "import nexus_ext; nexus_ext.list_plugins()"
    times: dict[str, list[float]] = {"none": [], "all": []}
    for _ in range(rounds):
        for side, seconds in times.items():
            environ = {k: v for k, v in os.environ.items() if k != "NEXUS_LOAD_PLUGINS"}
            if side == "none":
                environ["NEXUS_LOAD_PLUGINS"] = "none"
            begin = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], env=environ, check=True)
            seconds.append(time.perf_counter() - begin)
    none, everything = (statistics.median(seconds) for seconds in times.values())
    print(f"{'a process that lists no plugins':<40} {none * 1e3:8.1f} ms")
    print(f"{'the same with all that are installed':<40} {everything * 1e3:8.1f} ms")


def decode(path: Path, plugins: Plugins, weights: int, n_tokens: int) -> float:
    """Return the seconds of a decoded token."""
    from nexus_ext import Llama

    with use_plugins(plugins):
        options = {"n_ctx": 512, "n_threads": 2, "verbose": False, "policy": "direct"}
        common = {"hardware": machine(), "warm_start": False, **options}
        try:
            llm = Llama(path, weights=weights, **common)
        except DoesNotFit as error:
            llm = Llama(path, weights=error.smallest_bytes, **common)
        try:
            generated = llm.generate(list(range(5, 37)), temp=0.0)
            for _ in islice(generated, n_tokens // 4):  # warm up
                pass
            begin = time.perf_counter()
            n = sum(1 for _ in islice(generated, n_tokens))
            seconds = time.perf_counter() - begin
            generated.close()
            return seconds / n
        finally:
            llm.close()


def decoding(path: Path, share: float, rounds: int, n_tokens: int) -> None:
    weights = int(path.stat().st_size * share / 100)
    sides = {"none": load_plugins(), "all": Plugins(environ={})}
    names = [r.name for r in sides["all"].list_plugins() if r.distribution != "nexus_ext"]
    print(f"\nplugins: {', '.join(names) or 'none are installed'}")
    times: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, plugins in sides.items():
            times[side].append(decode(path, plugins, weights, n_tokens))
    for side, seconds in times.items():
        rates = [1 / s for s in seconds]
        print(
            f"{side:<6} {statistics.median(rates):8.2f} tok/s ({min(rates):.2f}..{max(rates):.2f})"
        )
    pairs = [a / b for a, b in zip(times["none"], times["all"], strict=True)]
    print(f"all against none: {statistics.median(pairs):.3f} ({min(pairs):.3f}..{max(pairs):.3f})")
    for record in sides["all"].list_plugins():
        if record.error:
            print(f"{record.name}: {record.error}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--dir", default=None, help="where the synthetic model is written")
    parser.add_argument("--share", type=float, default=50, help="percent of the weights in memory")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--calls", type=int, default=20_000)
    arguments = parser.parse_args()
    calls(arguments.calls)
    finding(arguments.rounds)
    if arguments.model is not None:
        decoding(arguments.model, arguments.share, arguments.rounds, arguments.tokens)
        return
    with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
        [path] = write_moe(Path(folder) / "moe.gguf", dims=DIMS)
        decoding(path, arguments.share, arguments.rounds, arguments.tokens)


if __name__ == "__main__":
    main()
