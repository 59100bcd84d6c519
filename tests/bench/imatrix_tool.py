"""Compare our importance matrix with that of llama.cpp's own tool, on the same text.

    python -m tests.bench.imatrix_tool LLAMA_CPP_SOURCE MODEL TEXT [--weights 20M]

How to get the source: see perplexity_tool.py. Counts must be equal, sums as close as the tool's
float32 accumulation is. With --weights our side streams the model.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from nexus_ext.placement import PlanRequest
from nexus_ext.runtime.imatrix import collect_imatrix, load_imatrix
from nexus_ext.runtime.planning import plan_model
from nexus_ext.units import parse_bytes
from tests.bench.perplexity_tool import build, run_tool


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="llama.cpp's source")
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--weights", help="budget of our side; default: everything resident")
    parser.add_argument("--windows", type=int, default=16)
    args = parser.parse_args()
    weights = parse_bytes(args.weights, what="--weights") if args.weights else None
    request = PlanRequest(
        weights_bytes=weights, n_ctx=512, n_batch=512, n_ubatch=512, gpu_bytes=0, logits_all=True
    )
    planned = plan_model(args.model, request)
    begin = time.perf_counter()
    ours = collect_imatrix(
        args.model, args.text.read_bytes(), planned, request, n_ctx=512, most=args.windows
    )
    ours_s = time.perf_counter() - begin
    with tempfile.TemporaryDirectory(prefix="nexus-tool-") as directory:
        tool = build(args.source, "imatrix", Path(directory))
        out = str(Path(directory) / "imatrix.gguf")
        common = ["-m", args.model, "-f", str(args.text), "-c", "512", "-b", "512", "-nr"]
        common += ["-t", str(planned.hardware.cpu.n_usable_cores), "-fa", "off"]
        begin = time.perf_counter()
        run_tool(tool, *common, "--process-output", "--chunks", str(args.windows), "-o", out)
        theirs_s = time.perf_counter() - begin
        theirs = load_imatrix(out)
    only = ours.entries.keys() ^ theirs.entries.keys()
    worst = 0.0
    for name in ours.entries.keys() & theirs.entries.keys():
        a, b = ours.entries[name], theirs.entries[name]
        if not np.array_equal(a.counts, b.counts):
            raise SystemExit(f"{name}: counts {a.counts[:4]} and {b.counts[:4]}")
        worst = max(worst, float(np.abs(a.sums - b.sums).sum() / b.sums.sum()))
    print(f"{len(ours.entries)} weights, {ours.n_tokens} tokens; in one file only: {sorted(only)}")
    print(f"largest relative difference of the sums of a weight: {worst:.1e}")
    print(f"nexus {ours_s:.1f} s, llama-imatrix {theirs_s:.1f} s, both with loading")
    return 1 if only or worst > 1e-3 else 0


if __name__ == "__main__":
    raise SystemExit(main())
