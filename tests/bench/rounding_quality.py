"""Compensated rounding against llama.cpp's own, at the same size and with the same types.

    python -m tests.bench.rounding_quality TEXT F16.gguf [F16.gguf ...]

A third of the text calibrates (importance matrix, products of channels, sensitivities), the rest
is what all models are measured on. First mixtures of llama.cpp with the importance matrix, each
rounded in both ways; then an allocation of 3.5 bits a weight, rounded in both ways and compared
with Q3_K_M, which is larger. Differences are paired, as in `allocation_quality`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from nexus_ext.formats import open_gguf
from nexus_ext.placement import PlanRequest
from nexus_ext.runtime.allocation import measure, types_named
from nexus_ext.runtime.imatrix import collect_imatrix
from nexus_ext.runtime.planning import plan_model
from nexus_ext.runtime.quantize import quantize
from nexus_ext.runtime.refinement import refine
from nexus_ext.runtime.rounding import compensate
from nexus_ext.runtime.weights import Weights
from tests.bench.held_out import HeldOut, request_of, split_text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--windows", type=int, help="of evaluation; default: all")
    parser.add_argument("--split", default="first", choices=["first", "stories"])
    parser.add_argument("--types", default="default", help="that may be chosen, or `compact`")
    parser.add_argument("--mixtures", default="q2_k,q3_k_m,q4_k_m")
    parser.add_argument("--bits", type=float, default=3.5, help="of the allocation; 0: none")
    parser.add_argument("--beside", default="q3_k_m", help="the mixture to compare it with")
    parser.add_argument("--rounds", type=int, default=0, help="of refinement of the allocation")
    args = parser.parse_args()
    calibration, evaluation = split_text(args.text.read_bytes(), args.split)
    request = request_of(args)
    for model in args.models:
        print(model)
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
    planned = plan_model(model, request)
    imatrix = collect_imatrix(model, calibration, planned, request, n_ctx=args.ctx)

    def finish(path: str) -> None:
        begin = time.perf_counter()
        done = compensate(
            model,
            path,
            calibration,
            imatrix,
            planned,
            request,
            n_ctx=args.ctx,
            n_threads=args.threads,
        )
        print(
            f"      rounding {len(done.rounded)} tensors took {time.perf_counter() - begin:.1f} s, "
            f"{len(done.left)} were left"
        )

    with HeldOut(model, target, evaluation, request, directory, args.windows) as held_out:
        for base in filter(None, args.mixtures.split(",")):
            made = quantize(model, target, base, imatrix=imatrix, overwrite=True)
            nearest = held_out.report(f"{base.upper()} + imatrix", made)
            made = quantize(model, target, base, imatrix=imatrix, overwrite=True, finish=finish)
            held_out.report(f"{base.upper()}, compensated", made, nearest, "nearest")
        if not args.bits:
            return
        made = quantize(model, target, args.beside, overwrite=True)
        plain = held_out.report(f"{args.beside.upper()}, plain", made)
        made = quantize(model, target, args.beside, imatrix=imatrix, overwrite=True)
        mixture = held_out.report(f"{args.beside.upper()} + imatrix", made)
        known = measure(
            model,
            imatrix,
            calibration,
            n_ctx=args.ctx,
            n_threads=args.threads,
            types=types_named(args.types),
        )
        found = known.allocation(args.bits)
        if args.rounds:
            found = refine(
                Weights(open_gguf(model)),
                known,
                found,
                known.budget_nbytes(args.bits),
                imatrix,
                calibration,
                n_ctx=args.ctx,
                rounds=args.rounds,
                n_threads=args.threads,
            )
        types = found.types
        used = sorted(types.values())
        print("      " + ", ".join(f"{used.count(t)} {t}" for t in dict.fromkeys(used)))
        name = f"{args.bits:g} bits"
        made = quantize(model, target, "q4_k_m", imatrix=imatrix, types=types, overwrite=True)
        held_out.report(f"{name}, nearest", made, mixture, "mixture + imatrix")
        made = quantize(
            model, target, "q4_k_m", imatrix=imatrix, types=types, overwrite=True, finish=finish
        )
        scores = held_out.report(f"{name}, compensated", made, mixture, "mixture + imatrix")
        held_out.difference(scores, plain, "plain mixture")


if __name__ == "__main__":
    raise SystemExit(main())
