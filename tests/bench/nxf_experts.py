"""Experts that miss, read from a GGUF, from records of an NXF, and from encoded records.

    python -m tests.bench.nxf_experts --dir DISK [--quant BF16]

Writes a mixture of experts (4 layers of 64 experts, 8 a token) as a GGUF and converts it, raw and
with `ans`. Then decodes the same tokens with each, direct reads, in turns A B C A B C, with so few
slots that many experts miss. Prints for each the median time of a token, bytes read per token, the
time waited for reads, and its speed beside the GGUF's, as the median of the ratios of neighbours.
Logits are compared bit by bit on the way.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from nexus_ext import Llama
from nexus_ext.formats import open_model
from nexus_ext.formats.nxf_convert import to_nxf
from nexus_ext.formats.nxf_layout import Rules
from nexus_ext.formats.sources import open_source
from nexus_ext.testing.synthetic import MoeDims, write_moe

DIMS = MoeDims(
    n_layers=4,
    n_embd=1024,
    n_ff=512,
    n_heads=16,
    n_heads_kv=4,
    n_vocab=4000,
    n_experts=64,
    n_used=8,
)


def decode(path: Path, weights: int, n_tokens: int) -> tuple[float, int, float, float, bytes]:
    """Return (seconds, bytes read, seconds waited, share of misses) per token, and a digest."""
    llm = Llama(
        path, weights=weights, policy="direct", n_ctx=256, n_batch=32, verbose=False,
        warm_start=False, n_threads=2, logits_all=True,
    )  # fmt: skip
    try:
        rng = np.random.default_rng(1)
        llm.eval([1])
        llm.nexus.reset_stats()
        begin = time.perf_counter()
        for token in rng.integers(3, DIMS.n_vocab, n_tokens):
            llm.eval([int(token)])
        seconds = time.perf_counter() - begin
        assert llm.nexus.model is not None
        stats = llm.nexus.model.stats()
        bits = llm.scores[: llm.n_tokens].tobytes()
        missed = stats.expert_misses / max(stats.expert_uses, 1)
        waited = stats.wait_ns / 1e9
        return seconds / n_tokens, stats.bytes_read // n_tokens, waited / n_tokens, missed, bits
    finally:
        llm.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dir", default=None, help="where the models go; a disk, not a tmpfs")
    parser.add_argument("--quant", default="BF16", help="type of the experts")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=40)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nexus-bench-", dir=args.dir) as directory:
        models = {"gguf": Path(directory, "model.gguf")}
        write_moe(models["gguf"], arch="qwen3moe", dims=DIMS, quant="Q8_0", expert_quant=args.quant)
        for codec in ("raw", "ans"):
            models[f"nxf {codec}"] = Path(directory, f"{codec}.nxf")
            source = open_source(models["gguf"])
            to_nxf(source, models[f"nxf {codec}"], rules=Rules(codec))
            source.close()
        weights = open_model(models["gguf"]).nbytes // 4
        runs: dict[str, list[list[float]]] = {name: [] for name in models}
        bits: set[bytes] = set()
        for round_ in range(args.rounds + 1):
            for name, path in models.items():
                *numbers, logits = decode(path, weights, args.tokens)
                bits.add(logits)
                if round_:  # the first one warms what is not measured
                    runs[name].append(numbers)
        for name, found in runs.items():
            columns = [statistics.median(column) for column in zip(*found, strict=True)]
            ratio = statistics.median(g[0] / n[0] for g, n in zip(runs["gguf"], found, strict=True))
            print(
                f"{name:8} {models[name].stat().st_size / 1e6:6.0f} MB  "
                f"{1e3 * columns[0]:7.2f} ms/token  {columns[1] / 1e6:6.2f} MB read, "
                f"{1e3 * columns[2]:6.2f} ms waited, {columns[3]:4.0%} missed  x{ratio:.3f}"
            )
        print("logits identical" if len(bits) == 1 else "LOGITS DIFFER")
        return 0 if len(bits) == 1 else 1


if __name__ == "__main__":
    raise SystemExit(main())
