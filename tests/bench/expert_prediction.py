"""Does reading predicted experts ahead pay? On and off in turn, past the page cache.

    python -m tests.bench.expert_prediction
    python -m tests.bench.expert_prediction --model tinymoe-41M-F16.gguf --share 25

Streams the experts of a model through a cache of `--share` percent of them, with direct reads, and
decodes blocks of tokens with each predictor in turn, A B C A B C, in one process. A synthetic
mixture of experts is written to `--dir` (and removed) unless `--model` names a file. Bytes are
counted by the engine and by the kernel (/proc/self/io). Then the controller decides by itself, and
says why. Before that, with caches that are empty: a prompt without and with reading ahead, and the
first tokens without and with what an earlier session has learned.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nexus_ext.core import ModelStats
from nexus_ext.placement import PlanRequest
from nexus_ext.runtime.disk_sample import drop_files
from nexus_ext.runtime.planning import plan_model
from nexus_ext.runtime.worker import device_read_bytes
from nexus_ext.testing.synthetic import MoeDims, write_moe
from nexus_ext.units import format_bytes
from tests.integration.test_experts import cached, core_model

SIDES = ("none", "gate", "previous", "popular")
WARMUP = 40  # tokens that fill the cache
AUTO = 320  # tokens that the controller is given


@dataclass(frozen=True, slots=True)
class Block:
    """What a block of tokens took and read."""

    seconds: float
    n_tokens: int
    before: ModelStats
    after: ModelStats
    device_bytes: int

    def per_token(self, name: str) -> float:
        return (getattr(self.after, name) - getattr(self.before, name)) / self.n_tokens


def tokens_of(n: int, n_vocab: int, seed: int) -> list[int]:
    """Tokens of a text that comes back to its topics: half of them from a window of a few."""
    state, recent, out = seed * 2654435761 + 1, [5] * 16, []
    for _ in range(n):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        fresh = (state >> 33) % (n_vocab - 3) + 3
        token = recent[(state >> 13) % 16] if state >> 63 else fresh
        recent = [*recent[1:], token]
        out.append(token)
    return out


class Decoder:
    """Feeds tokens one at a time, starting over when the context is full."""

    def __init__(self, llm: Any, n_ctx: int) -> None:
        self._llm, self._n_ctx, self._seed = llm, n_ctx, 0

    def block(self, n: int) -> Block:
        llm, model = self._llm, core_model(self._llm)
        if llm.n_tokens + n >= self._n_ctx:
            llm.reset()
        self._seed += 1
        tokens = tokens_of(n, llm.n_vocab(), self._seed)
        before, read, begin = model.stats(), device_read_bytes() or 0, time.perf_counter()
        for token in tokens:
            llm.eval([token])
        seconds = time.perf_counter() - begin
        return Block(seconds, n, before, model.stats(), (device_read_bytes() or 0) - read)


def show(side: str, blocks: list[Block], base: list[Block]) -> None:
    def mean(name: str) -> float:
        return statistics.fmean(block.per_token(name) for block in blocks)

    rates = [block.n_tokens / block.seconds for block in blocks]
    pairs = [b.seconds / a.seconds for a, b in zip(blocks, base, strict=True)]
    started, used, wasted = mean("prefetched"), mean("prefetch_used"), mean("prefetch_wasted")
    device = statistics.fmean(block.device_bytes / block.n_tokens for block in blocks)
    useful = f"{used / started:.0%}" if started else "-"
    print(
        f"{side:<9} {statistics.median(rates):8.2f} ({min(rates):.2f}..{max(rates):.2f})"
        f" {statistics.median(pairs):6.3f}"
        f" {mean('wait_ns') / 1e6:8.2f} {mean('idle_ns') / 1e6:8.2f}"
        f" {mean('predict_ns') / 1e6:7.2f}"
        f" {1 - mean('expert_misses') / mean('expert_uses'):6.1%} {useful:>6}"
        f" {format_bytes(wasted):>10} {format_bytes(mean('bytes_read')):>10}"
        f" {format_bytes(device):>10}",
        flush=True,
    )


def opened(path: Path, slots: int, options: dict[str, Any], **more: Any) -> Any:
    drop_files([str(path)])
    return cached(path, slots, **{**options, **more})


def prefill(path: Path, slots: int, options: dict[str, Any], rounds: int, n: int) -> None:
    """A prompt of `n` tokens, each time in a model that was just opened."""
    seconds: dict[str, list[float]] = {"none": [], "auto": []}
    said: dict[str, ModelStats] = {}
    for _ in range(rounds):
        for side, times in seconds.items():
            with opened(path, slots, options) as llm:
                core_model(llm).set_predictor(side)
                tokens, begin = tokens_of(n, llm.n_vocab(), 1), time.perf_counter()
                llm.eval(tokens)
                times.append(time.perf_counter() - begin)
                said[side] = core_model(llm).stats()
    print(f"\nprompt of {n} tokens, empty caches, {rounds} times each in turn")
    for side, times in seconds.items():
        stats = said[side]
        print(
            f"{side:<9} {statistics.median(times):6.2f} s ({min(times):.2f}..{max(times):.2f}), "
            f"wait {stats.wait_ns / 1e9:.2f} s, read {format_bytes(stats.bytes_read)}, ahead "
            f"{format_bytes(stats.prefetched)}, used {format_bytes(stats.prefetch_used)}"
        )


def first_tokens(path: Path, slots: int, options: dict[str, Any], rounds: int, n: int) -> None:
    """The first `n` tokens after loading, without and with what an earlier session has learned."""
    with opened(path, slots, options, warm_start=True) as llm:
        Decoder(llm, 512).block(200)
    print(f"\nfirst {n} tokens, {rounds} times each in turn")
    blocks: dict[bool, list[Block]] = {False: [], True: []}
    for _ in range(rounds):
        for warm, of_side in blocks.items():
            with opened(path, slots, options, warm_start=warm) as llm:
                if llm.nexus.warm_start is not None:
                    llm.nexus.warm_start.wait()  # the time of a user who types
                decoder = Decoder(llm, 512)
                decoder._seed = 77  # another text than what was learned
                of_side.append(decoder.block(n))
    for warm, of_side in blocks.items():
        rates = [b.n_tokens / b.seconds for b in of_side]
        hits = [1 - b.per_token("expert_misses") / b.per_token("expert_uses") for b in of_side]
        print(
            f"{'warm' if warm else 'cold':<9} {statistics.median(rates):8.2f} tok/s "
            f"({min(rates):.2f}..{max(rates):.2f}), hits {statistics.median(hits):.1%}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a mixture of experts")
    parser.add_argument("--share", type=int, default=50, help="percent of experts with a slot")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16, help="of a block")
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--skew", type=float, default=1.0, help="popularity of its experts")
    parser.add_argument("--layers", type=int, default=12, help="of the synthetic model")
    parser.add_argument("--embd", type=int, default=1024)
    parser.add_argument("--dir", default=None, help="where the model goes; a disk, not a tmpfs")
    args = parser.parse_args()
    with ExitStack() as stack:
        path = args.model
        if path is None:
            directory = stack.enter_context(tempfile.TemporaryDirectory(dir=args.dir))
            path = Path(directory, "model.gguf")
            dims = MoeDims(args.layers, args.embd, 512, 16, 4, 8192, n_experts=128, n_used=8)
            write_moe(
                path, arch="gpt-oss", dims=dims, quant="Q8_0", expert_quant="Q4_0", skew=args.skew
            )
        shape = plan_model(path, PlanRequest(weights_bytes=1 << 40, gpu_bytes=0)).catalog.shape
        slots = max(shape.n_experts * args.share // 100, shape.n_experts_used)
        os.environ["NEXUS_CACHE_DIR"] = stack.enter_context(tempfile.TemporaryDirectory())
        drop_files([str(path)])
        options = {"n_ctx": 512, "n_threads": args.threads, "logits_all": False}
        prefill(path, slots, options, args.rounds // 2, args.prompt)
        first_tokens(path, slots, options, args.rounds // 2, 24)
        llm = stack.enter_context(cached(path, slots, **options))
        model, decoder = core_model(llm), Decoder(llm, 512)
        print(f"{path.name}: {slots} of {shape.n_experts} experts a layer, {args.threads} threads")
        model.set_predictor("none")
        decoder.block(WARMUP)
        blocks: dict[str, list[Block]] = {side: [] for side in SIDES}
        for _ in range(args.rounds):
            for side in SIDES:
                model.set_predictor(side)
                blocks[side].append(decoder.block(args.tokens))
        print(
            f"{'predictor':<9} {'tok/s (lowest..highest)':>24} {'x none':>6} {'wait ms':>8} "
            f"{'idle ms':>8} {'own ms':>7} {'hits':>6} {'useful':>6} {'wasted':>10} {'read':>10} "
            f"{'device':>10}   a token"
        )
        for side in SIDES:
            show(side, blocks[side], blocks["none"])
        model.set_predictor("auto")
        for _ in range(AUTO // args.tokens):
            decoder.block(args.tokens)
        print(f"by itself: prediction {llm.nexus.stats().prediction}")


if __name__ == "__main__":
    main()
