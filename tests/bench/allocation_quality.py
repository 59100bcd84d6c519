"""Mixed-precision allocation against llama.cpp's own mixtures of the same size.

    python -m tests.bench.allocation_quality TEXT F16.gguf [F16.gguf ...]

The first third of the text calibrates (importance matrix, sensitivities), the rest is what all
models are measured on, so nothing is measured on what it was fitted to. Baselines with and without
the same importance matrix; allocations of the size of Q4_K_M, of Q3_K_M, and of 3.5 bits a weight
(beside Q3_K_M, which is larger).

Whether an allocation is better than the mixture is told by paired differences: both read the same
windows, and what one window is harder than another cancels. The interval is that of the mean over
windows (1.96 standard errors); one that holds 0 says that this text cannot tell the two apart.
Windows are cut twice, the second time half a window later, so that every token but the first and
last few is predicted once; two neighbours, which are 512 tokens in a row, count as one value.
What the figures depend on is in `held_out`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from nexus_ext.formats import open_gguf
from nexus_ext.placement import PlanRequest
from nexus_ext.quality.allocation import Allocation
from nexus_ext.quality.metrics import Scores
from nexus_ext.runtime.allocation import measure, types_named
from nexus_ext.runtime.imatrix import collect_imatrix
from nexus_ext.runtime.planning import plan_model
from nexus_ext.runtime.quantize import quantize
from nexus_ext.runtime.refinement import ROUNDS, refine
from nexus_ext.runtime.weights import Weights
from tests.bench.held_out import HeldOut, request_of, split_text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--windows", type=int, help="of evaluation; default: all")
    parser.add_argument("--method", default="measured", choices=["measured", "error"])
    parser.add_argument("--types", default="default", help="that may be chosen, or `compact`")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of refinement")
    parser.add_argument("--sizes", default="q4_k_m,q3_k_m", help="mixtures to compare with")
    parser.add_argument("--bits", type=float, default=3.5, help="0: only the sizes of mixtures")
    parser.add_argument("--most", type=int, default=8, help="windows that types are chosen on")
    args = parser.parse_args()
    calibration, evaluation = split_text(args.text.read_bytes())
    request = request_of(args)
    for model in args.models:
        print(f"{model}: {open_gguf(model).nbytes} bytes")
        with tempfile.TemporaryDirectory(prefix="nexus-bench-") as directory:
            compare(model, calibration, evaluation, request, directory, args)
    return 0


def compare(
    model: str,
    calibration: bytes,
    evaluation: bytes,
    request: PlanRequest,
    directory: str,
    args: argparse.Namespace,
) -> None:
    target = str(Path(directory) / "quantized.gguf")
    imatrix = collect_imatrix(
        model, calibration, plan_model(model, request), request, n_ctx=args.ctx
    )
    with HeldOut(model, target, evaluation, request, directory, args.windows) as held_out:
        report = held_out.report
        sizes: dict[str, tuple[float, Scores]] = {}
        for base in args.sizes.split(","):
            made = quantize(model, target, base, overwrite=True)
            report(base.upper(), made)
            made = quantize(model, target, base, imatrix=imatrix, overwrite=True)
            scores = report(f"{base.upper()} + imatrix", made)
            sizes[f"as large as {base.upper()}"] = (made.bits_per_weight, scores)
        if args.bits:  # beside the smallest mixture
            sizes[f"{args.bits:g} bits a weight"] = (args.bits, scores)
        begin = time.perf_counter()
        known = measure(
            model,
            imatrix,
            calibration,
            n_ctx=args.ctx,
            most=args.most,
            n_threads=args.threads,
            method=args.method,
            types=types_named(args.types),
        )
        measured_s = time.perf_counter() - begin
        for name, (bits, mixture) in sizes.items():
            found = known.allocation(bits)
            made = quantize(
                model, target, "q4_k_m", imatrix=imatrix, types=found.types, overwrite=True
            )
            report(f"allocated, {name}", made, mixture)
            show(found)
            if not args.rounds:
                continue
            begin = time.perf_counter()
            found = refine(
                Weights(open_gguf(model)),
                known,
                found,
                known.budget_nbytes(bits),
                imatrix,
                calibration,
                n_ctx=args.ctx,
                most=args.most,
                rounds=args.rounds,
                n_threads=args.threads,
            )
            took_s = time.perf_counter() - begin
            made = quantize(
                model, target, "q4_k_m", imatrix=imatrix, types=found.types, overwrite=True
            )
            report(f"refined, {name}", made, mixture)
            show(found)
            print(f"      refining took {took_s:.0f} s")
        print(f"  measuring what types cost took {measured_s:.0f} s")


def show(found: Allocation) -> None:
    used = sorted(found.types.values())
    print("      " + ", ".join(f"{used.count(t)} {t}" for t in dict.fromkeys(used)))


if __name__ == "__main__":
    raise SystemExit(main())
