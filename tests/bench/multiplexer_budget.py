"""Three models in a memory cgroup of half their size: answers, switching, throughput, leaks.

    python -m tests.bench.multiplexer_budget                        # all parts
    python -m tests.bench.multiplexer_budget --part switch --sizes 1G,800M,900M

Writes synthetic models to `--dir` (removed again; a disk, not a tmpfs). Every part runs in a
process of its own inside a memory cgroup of `--limit`, by default half of what the files take
together, and prints what the kernel saw as the peak. Parts:

    answers   random requests over three models; every answer beside stock llama.cpp alone
    switch    to a resident model; to an evicted one, as a part of the disk's measured bandwidth;
              a conversation that goes on after a swap
    parallel  4 requests at once against one by one: resident, and streaming
    leak      many loads and unloads: memory and descriptors at the end against those at the start

Needs the right to create a memory cgroup.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nexus_ext.units import MIB, format_bytes, parse_bytes

PARTS = ("answers", "switch", "parallel", "leak")
N_CTX, N_UBATCH, N_PARALLEL = 512, 128, 4


# -- in the cgroup ---------------------------------------------------------------------------------


def _multiplexer(config: dict[str, Any], **settings: Any) -> Any:
    from nexus_ext.multiplexer.api import ModelNotFound
    from nexus_ext.multiplexer.engine import Multiplexer
    from nexus_ext.multiplexer.settings import ModelSpec, Settings

    paths: dict[str, str] = config["paths"]

    def find(name: str) -> ModelSpec:
        if name not in paths:
            raise ModelNotFound(name)
        return ModelSpec(name, paths[name])

    values = {
        "budget_bytes": Settings.budget_of_ram(config["limit_bytes"]),
        "n_ctx": N_CTX,
        "n_ubatch": N_UBATCH,
        "n_parallel": N_PARALLEL,
        "n_threads": config["threads"],
        "kernels": config["kernels"],
        "session_disk_bytes": 1 << 30,
        "session_directory": config["directory"],
    }
    return Multiplexer(find, Settings(**{**values, **settings}))


async def _answer(
    mux: Any, model: str, prompt: list[int], n: int, session: str | None = None
) -> tuple[list[int], Any, float]:
    from nexus_ext.multiplexer.api import GenerateRequest, Piece, Sampling

    tokens: list[int] = []
    done, first = None, 0.0
    begin = time.perf_counter()
    request = GenerateRequest(
        model, prompt, Sampling(temperature=0.0), max_tokens=n, session=session
    )
    async for event in mux.generate(request):
        first = first or time.perf_counter() - begin
        if isinstance(event, Piece):
            tokens += event.tokens
        else:
            done = event
    return tokens, done, first


async def _answers(config: dict[str, Any]) -> dict[str, Any]:
    mux = _multiplexer(config)
    few = asyncio.Semaphore(12)
    over = 0

    async def ask(one: dict[str, Any]) -> bool:
        nonlocal over
        async with few:
            tokens, done, _ = await _answer(mux, one["model"], one["prompt"], one["n"])
            used, total = mux.budget()
            over += used > total
            right: list[int] = one["right"]
            ended = done.reason == "stop"
            return tokens == right[: len(tokens)] and (ended or len(tokens) == one["n"])

    begin = time.perf_counter()
    right = await asyncio.gather(*(ask(one) for one in config["requests"]))
    seconds = time.perf_counter() - begin
    events = mux.log.events()
    kinds = Counter(event.kind for event in events)
    unexplained = [
        e for e in events if e.kind in ("evict", "unload") and " for " not in f" {e.why}"
    ]
    for event in events[:8]:
        print(f"    {event}")
    await mux.close()
    return {
        "requests": len(right),
        "wrong": right.count(False),
        "seconds": round(seconds, 1),
        "over budget (own count)": over,
        "events": dict(kinds),
        "evictions without a reason": len(unexplained),
    }


def _disk(path: str) -> float:
    """Measure cold sequential reads of a file, bytes a second."""
    from nexus_ext import core

    nbytes, ns, *_ = core.read_disk(path, 1 << 20, 16, False, 512 << 20, 2_000_000_000)
    return nbytes / (ns / 1e9)


async def _switch(config: dict[str, Any]) -> dict[str, Any]:
    names = list(config["paths"])
    found: dict[str, Any] = {}
    # Two models that fit together: the way to a resident one.
    mux = _multiplexer(config, budget_bytes=8 << 30)
    for name in names[:2]:
        await _answer(mux, name, [5, 6, 7], 1)
    waits = []
    for i in range(20):
        _, done, _ = await _answer(mux, names[i % 2], [5 + i, 6, 7], 1)
        waits.append((done.queue_ns + done.load_ns) / 1e6)
    found["resident: ms to the first graph, median and worst"] = [
        round(statistics.median(waits), 2),
        round(max(waits), 2),
    ]
    await mux.close()
    del mux
    gc.collect()
    # Back and forth within the limit.
    mux = _multiplexer(config)
    prompt = [random.Random(1).randrange(3, 30000) for _ in range(60)]
    said, disk = [], []
    for turn in range(4):
        tokens, done, _ = await _answer(mux, names[0], prompt, 6, "talk")
        said.append((tokens, done.n_cached_tokens, len(prompt)))
        prompt = [*prompt, *tokens, 100 + turn, 200 + turn, 300 + turn]
        for name in names[1:]:
            disk.append(await asyncio.to_thread(_disk, config["paths"][name]))
            await _answer(mux, name, [5, 6, 7], 1)
        if turn == 2:
            await mux.unload(names[0])  # its state is saved and comes back
    events = mux.log.events()
    await mux.close()
    read = [e for e in events if e.kind == "restore" and e.nbytes > 32 * MIB]
    rates = [e.nbytes / (e.ns / 1e9) for e in read]
    found["brought back, GiB/s each"] = [round(r / 2**30, 2) for r in rates]
    found["disk in between, GiB/s each"] = [round(r / 2**30, 2) for r in disk]
    part = statistics.median(rates) / statistics.median(disk)
    found["brought back / disk, medians"] = round(part, 2)
    mux = _multiplexer(config)
    again = []
    prompt = [random.Random(1).randrange(3, 30000) for _ in range(60)]
    for turn in range(4):
        tokens, done, _ = await _answer(mux, names[0], prompt, 6, "talk")
        again.append((tokens, done.n_cached_tokens, len(prompt)))
        prompt = [*prompt, *tokens, 100 + turn, 200 + turn, 300 + turn]
    await mux.close()
    found["conversation with swaps as without"] = said == again
    found["tokens cached of tokens in the prompt"] = [f"{c} of {n}" for _, c, n in said]
    found["events"] = dict(Counter(event.kind for event in events))
    return found


async def _rate(mux: Any, model: str, at_once: int, n: int, seed: int) -> float:
    """Tokens a second of 4 requests, `at_once` of them side by side."""
    few = asyncio.Semaphore(at_once)

    async def ask(i: int) -> int:
        async with few:
            tokens, _, _ = await _answer(mux, model, [seed, 10 + i, *range(20, 36)], n)
            return len(tokens)

    begin = time.perf_counter()
    total = sum(await asyncio.gather(*(ask(i) for i in range(4))))
    return total / (time.perf_counter() - begin)


async def _passes(mux: Any, model: str, at_once: int, n: int, seed: int) -> dict[str, float]:
    """What one pass over the weights takes while `at_once` sequences are decoded."""
    core = mux._scheduler.entries[model].runner.model.core
    before = core.stats()
    rate = await _rate(mux, model, at_once, n, seed)
    after = core.stats()
    passes = after.passes - before.passes
    return {
        "tok/s": rate,
        "pass s": (after.pass_ns - before.pass_ns) / 1e9 / passes,
        "compute s": (after.compute_ns - before.compute_ns) / 1e9 / passes,
        "wait s": (after.wait_ns - before.wait_ns) / 1e9 / passes,
        "bytes": (after.bytes_read - before.bytes_read) / passes,
    }


async def _parallel(config: dict[str, Any]) -> dict[str, Any]:
    """The bound: one pass over the weights reads once for all, and computes for each of them.

    A pass takes at least its bytes at the disk's rate, and at least its compute; both are measured.
    So 4 at once are at most 4 max(read, compute of one) / max(read, compute of four) as fast.
    """
    name = max(config["paths"], key=lambda n: os.path.getsize(config["paths"][n]))
    found: dict[str, Any] = {}
    for what, budget, n in (("resident", 8 << 30, 24), ("streaming", config["stream_bytes"], 16)):
        mux = _multiplexer(config, budget_bytes=budget, session_ram_bytes=0)
        await _rate(mux, name, 4, 2, 400)  # warm
        ones, fours, disk = [], [], []
        for i in range(3):
            if what == "streaming":
                disk.append(await asyncio.to_thread(_disk, config["paths"][name]))
            ones.append(await _passes(mux, name, 1, n, 500 + 2 * i))
            fours.append(await _passes(mux, name, 4, n, 501 + 2 * i))
        one, four = (
            {key: statistics.median(run[key] for run in runs) for key in ones[0]}
            for runs in (ones, fours)
        )
        read = four["bytes"] / statistics.median(disk) if disk else 0.0
        bound = 4 * max(read, one["compute s"]) / max(read, four["compute s"])
        quotients = [b["tok/s"] / a["tok/s"] for a, b in zip(ones, fours, strict=True)]
        found[what] = {
            "tier": mux.status()[0].tier,
            "tok/s one by one": [round(run["tok/s"], 2) for run in ones],
            "tok/s 4 at once": [round(run["tok/s"], 2) for run in fours],
            "median of the quotients": round(statistics.median(quotients), 2),
            "bound": round(bound, 2),
            "a pass, ms": {
                who: {
                    "all": round(run["pass s"] * 1e3, 1),
                    "compute": round(run["compute s"] * 1e3, 1),
                    "wait": round(run["wait s"] * 1e3, 1),
                    "read at the disk's rate": round(read * 1e3, 1),
                }
                for who, run in (("one", one), ("four", four))
            },
        }
        await mux.close()
        gc.collect()
    return found


async def _leak(config: dict[str, Any]) -> dict[str, Any]:
    names = list(config["paths"])

    def now() -> tuple[int, int]:
        gc.collect()
        text = Path("/proc/self/status").read_text(encoding="ascii")
        rss = next(line for line in text.splitlines() if line.startswith("RssAnon"))
        return int(rss.split()[1]) * 1024, len(os.listdir("/proc/self/fd"))

    mux = _multiplexer(config)
    seen = []
    for cycle in range(config["cycles"]):
        for name in names:
            await _answer(mux, name, [5, 6, 7 + cycle], 2)
            await mux.unload(name)
        seen.append(now())
    await mux.close()
    early, late = seen[len(seen) // 4], seen[-1]
    return {
        "cycles of load and unload": config["cycles"] * len(names),
        "anonymous memory after a quarter, at the end": [
            format_bytes(early[0]),
            format_bytes(late[0]),
        ],
        "descriptors after a quarter, at the end": [early[1], late[1]],
    }


def _child(file: str) -> int:
    config = json.loads(Path(file).read_text(encoding="utf-8"))
    part: Callable[[dict[str, Any]], Coroutine[Any, Any, dict[str, Any]]] = {
        "answers": _answers,
        "switch": _switch,
        "parallel": _parallel,
        "leak": _leak,
    }[config["part"]]
    for what, value in asyncio.run(part(config)).items():
        print(f"  {what}: {value}")
    return 0


# -- outside ---------------------------------------------------------------------------------------


def _alone(config_file: str) -> int:
    """Answer the requests of the file with each model alone, in stock llama.cpp."""
    from tests.integration.alone import Alone

    config = json.loads(Path(config_file).read_text(encoding="utf-8"))
    for name, path in config["paths"].items():
        alone = Alone(path, N_CTX, N_UBATCH, config["threads"])
        for one in config["requests"]:
            if one["model"] == name:
                one["right"] = alone.tokens(one["prompt"], one["n"])
        alone.close()
    Path(config_file).write_text(json.dumps(config), encoding="utf-8")
    return 0


def _requests(names: list[str], n: int, longest: int, most: int) -> list[dict[str, Any]]:
    rng = random.Random(20)
    lengths = [min(longest, length) for length in (1, 2, 17, 60, 150)]
    return [
        {
            "model": rng.choice(names),
            "prompt": [rng.randrange(3, 30000) for _ in range(rng.choice(lengths))],
            "n": rng.randint(1, most),
        }
        for _ in range(n)
    ]


def _run(part: str, config: dict[str, Any], directory: str) -> int:
    from nexus_ext.runtime.memory_limit import run_limited

    file = Path(directory, f"{part}.json")
    file.write_text(json.dumps({**config, "part": part}), encoding="utf-8")
    command = [sys.executable, "-m", "tests.bench.multiplexer_budget"]
    if part == "answers":
        subprocess.run([*command, "--alone", str(file)], check=True)
    limit = config["limit_bytes"]
    if part in ("switch", "parallel"):  # these also show what happens when all fits
        limit += 2 * sum(os.path.getsize(p) for p in config["paths"].values())
    print(f"{part}:", flush=True)
    ran = run_limited([*command, "--child", str(file)], limit)
    peak = ran.usage.peak_bytes
    print(f"  peak {format_bytes(peak or 0)} of {format_bytes(limit)}, {ran.usage.oom_kills} kills")
    return ran.exit_status


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="600M,700M,800M")
    parser.add_argument("--quant", default="Q4_K")
    parser.add_argument("--limit", default=None, help="default: half of the models' sizes")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--longest-prompt", type=int, default=150)
    parser.add_argument("--most-tokens", type=int, default=6)
    parser.add_argument("--cycles", type=int, default=20)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--kernels", choices=("ggml", "auto", "nexus"), default="auto")
    parser.add_argument("--part", choices=PARTS, action="append")
    parser.add_argument("--dir", default=None, help="where the models go; a disk, not a tmpfs")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return _child(args.child)
    if args.alone:
        return _alone(args.alone)
    from nexus_ext.testing.synthetic import llama_dims_for_size, write_llama

    with tempfile.TemporaryDirectory(prefix="nexus-bench-", dir=args.dir) as directory:
        paths = {}
        for i, size in enumerate(args.sizes.split(",")):
            name = f"model-{size}"
            paths[name] = str(Path(directory, f"{name}.gguf"))
            dims = llama_dims_for_size(parse_bytes(size, what="--sizes"), args.quant)
            write_llama(paths[name], **asdict(dims), quant=args.quant, seed=i)
        total = sum(os.path.getsize(path) for path in paths.values())
        limit = parse_bytes(args.limit, what="--limit") if args.limit else total // 2
        config = {
            "paths": paths,
            "directory": directory,
            "limit_bytes": limit,
            "stream_bytes": limit // 2,
            "threads": args.threads or os.cpu_count() or 1,
            "kernels": args.kernels,
            "cycles": args.cycles,
            "requests": _requests(
                list(paths), args.requests, args.longest_prompt, args.most_tokens
            ),
        }
        print(f"models {format_bytes(total)}, limit {format_bytes(limit)}")
        statuses = [_run(part, config, directory) for part in args.part or PARTS]
    return max(abs(status) for status in statuses)


if __name__ == "__main__":
    raise SystemExit(main())
