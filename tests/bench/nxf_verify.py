"""What it costs to compare the hashes of chunks that an NXF stores as they are.

    python -m tests.bench.nxf_verify [--size 1G] [--share 0.6] [--tokens 6] [--repeat 3]

Opens the same model, of which --share fits, with NEXUS_VERIFY_CHUNKS as never, first and always,
interleaved, the page cache past (direct reads): seconds to load, of the first token and of later
ones (medians over all runs), and how fast hashes were compared.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from nexus_ext import Llama
from nexus_ext.formats.nxf_convert import to_nxf
from nexus_ext.formats.sources import open_source
from nexus_ext.runtime.manifest import VERIFY_VARIABLE
from nexus_ext.testing.synthetic.models import llama_dims_for_size, write_llama
from nexus_ext.units import format_bytes, parse_bytes


def run(model: Path, weights: int, n_tokens: int) -> tuple[float, float, list[float], int, float]:
    """Return seconds to load, of the first and of each later token, bytes compared, and seconds."""
    start = time.perf_counter()
    llm = Llama(
        model, weights=weights, policy="direct", n_ctx=128, n_batch=32, verbose=False
    )  # fmt: skip
    loaded_s = time.perf_counter() - start
    seconds = []
    for token in range(n_tokens):
        start = time.perf_counter()
        llm.eval([1 + token])
        seconds.append(time.perf_counter() - start)
    stats = llm.nexus.stats()
    llm.close()
    return loaded_s, seconds[0], seconds[1:], stats.raw_bytes, stats.decode_s


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.bench.nxf_verify")
    parser.add_argument("--size", default="1G")
    parser.add_argument("--share", type=float, default=0.6)
    parser.add_argument("--tokens", type=int, default=6)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", help="where the files go: the disk that is measured")
    args = parser.parse_args(arguments)
    with TemporaryDirectory(dir=args.folder) as name:
        gguf, nxf = Path(name, "m.gguf"), Path(name, "m.nxf")
        dims = llama_dims_for_size(parse_bytes(args.size, what="--size"), "Q4_K")
        write_llama(
            gguf, n_layers=dims.n_layers, n_embd=dims.n_embd, n_ff=dims.n_ff,
            n_heads=dims.n_heads, n_heads_kv=dims.n_heads_kv, n_vocab=dims.n_vocab, quant="Q4_K",
        )  # fmt: skip
        source = open_source(gguf)
        to_nxf(source, nxf, sha256=False)
        source.close()
        gguf.unlink()
        weights = int(nxf.stat().st_size * args.share)
        print(f"{format_bytes(nxf.stat().st_size)}, {format_bytes(weights)} for weights")
        runs: dict[str, list[tuple[float, float, list[float], int, float]]] = {}
        for _ in range(args.repeat):
            for mode in ("never", "first", "always"):
                os.environ[VERIFY_VARIABLE] = mode
                runs.setdefault(mode, []).append(run(nxf, weights, args.tokens))
        for mode, found in runs.items():
            load, first = (statistics.median(r[i] for r in found) for i in (0, 1))
            later = statistics.median(s for r in found for s in r[2])
            compared, compare_s = sum(r[3] for r in found), sum(r[4] for r in found)
            rate = f"{compared / compare_s / 1e9:.1f} GB/s" if compared else "nothing"
            print(
                f"  {mode:6}  load {load:.2f} s, first token {first:.3f} s, later {later:.3f} s; "
                f"compared {format_bytes(compared // len(found))} a run, {rate}"
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
