"""What residuals repair and cost, and what the same memory or bytes would have bought instead.

    python -m tests.bench.residual_quality F16.gguf TEXT [--windows 6]

Every matrix but the embedding (Q8_0) is Q3_K, then Q2_K; residuals of all of them, shares of the
input channels from none to all. Tokens are evaluated one at a time, as in decoding, through the
kernels that users have. Beside that: every plain type, with its size, which is also what a token
reads; so the rows of equal memory and of equal bytes per token can be compared. Last, what it would
take to fetch the chosen channels from this disk instead, once per matrix and token.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from nexus_ext.formats.residuals import read_residuals, row_nbytes
from nexus_ext.placement import PlanRequest
from nexus_ext.quality.report import QualityReport, summarize
from nexus_ext.runtime.planning import hardware_profile, plan_model
from nexus_ext.runtime.predictions import opened
from nexus_ext.runtime.quality import record_reference, scores_against
from nexus_ext.runtime.quantize import Quantized, planned_types, quantize
from nexus_ext.runtime.reference import ReferenceFile
from nexus_ext.runtime.residual import SUFFIX, Residuals, make_residuals

SHARES = (0.0, 0.015, 0.03, 0.06, 0.12, 0.25, 0.5, 1.0)
CLAIMED_SHARE = 0.06
PLAIN = ("Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")


@contextmanager
def one_at_a_time(model: str, request: PlanRequest, **more: Any) -> Iterator[Any]:
    with opened(model, plan_model(model, request), request, **more) as llm:
        llm.n_batch = 1
        yield llm


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    n = args.ctx
    request = PlanRequest(
        n_ctx=n, n_batch=n, n_ubatch=n, n_threads=args.threads, gpu_bytes=0, logits_all=True
    )
    matrices = planned_types(args.model, "q4_k_m")

    def made(kind: str, target: str) -> Quantized:
        types = {name: kind for name in matrices if name != "token_embd.weight"}
        types["token_embd.weight"] = "Q8_0"
        return quantize(args.model, target, "q4_k_m", types=types, overwrite=True)

    def report(llm: Any, kept: ReferenceFile) -> QualityReport:
        return summarize(scores_against(llm, kept), n_windows=len(kept.windows), n_ctx=n)

    with tempfile.TemporaryDirectory(prefix="nexus-bench-") as directory:
        target = str(Path(directory) / "quantized.gguf")
        with one_at_a_time(args.model, request) as llm:
            kept = record_reference(llm, args.text.read_bytes(), n_ctx=n, most=args.windows)
        with kept:
            print(f"{kept.n_predictions} predictions, one token at a time")
            print("plain types: size, and bytes of weights that a token reads")
            for kind in PLAIN:
                plain = made(kind, target)
                with one_at_a_time(target, request) as llm:
                    line(kind, report(llm, kept), plain.weight_nbytes, plain.weight_nbytes)
            for kind in ("Q3_K", "Q2_K"):
                corrected(args, kind, made(kind, target), target, request, kept, report)
    return 0


def corrected(
    args: argparse.Namespace,
    kind: str,
    base: Quantized,
    target: str,
    request: PlanRequest,
    kept: ReferenceFile,
    report: Any,
) -> None:
    begin = time.perf_counter()
    table = make_residuals(args.model, target, overwrite=True, n_threads=args.threads)
    print(
        f"{kind} and residuals ({table.nbytes} bytes, made in {time.perf_counter() - begin:.1f} s)"
    )
    reports: dict[float, QualityReport] = {}
    sidecar = target + SUFFIX
    with one_at_a_time(target, request, residual=sidecar, residual_share=0.0) as llm:
        residuals: Residuals = llm.nexus.residuals
        for share in SHARES:
            residuals.set_share(share)
            found = reports[share] = report(llm, kept)
            read = base.weight_nbytes + residuals.bytes_per_token()
            line(
                f"{100 * share:5.1f} % of channels", found, base.weight_nbytes + table.nbytes, read
            )
        token = [int(llm.token_bos())]

        def decode() -> None:
            llm._ctx.kv_cache_clear()
            llm._batch.set_batch(batch=token, n_past=0, logits_all=False)
            llm._ctx.decode(llm._batch)

        times = residuals.tune(decode, n=200)
    kl = [reports[share].kl_mean.value for share in SHARES]
    closed = 100 * (1 - reports[CLAIMED_SHARE].kl_mean.value / kl[0])
    gap = [reports[share].log_perplexity_ratio for share in (0.0, CLAIMED_SHARE)]
    falls = all(b < a for a, b in pairwise(kl))
    print(f"  divergence falls with every step: {'yes' if falls else 'NO'}")
    print(
        f"  {100 * CLAIMED_SHARE:g} % of the channels close {closed:.0f} % of the divergence; "
        f"ln(perplexity ratio) {gap[0].value:+.4f} -> {gap[1].value:+.4f} "
        f"(± {gap[1].error:.4f})"
    )
    print("  ms a token: " + ", ".join(f"{100 * s:g} %: {1e3 * t:.3f}" for s, t in times.items()))
    disk = hardware_profile(target).disk
    fetch_s = 0.0
    for stored in read_residuals(sidecar).tensors:
        n_bytes = round(CLAIMED_SHARE * stored.n_in) * max(4096, row_nbytes(stored.n_out))
        fetch_s += n_bytes / disk.random_bytes_s(max(4096, row_nbytes(stored.n_out)))
    print(
        f"  the same channels from this disk: at least {1e3 * fetch_s:.1f} ms a token "
        f"(read cold, and only once they are known)"
    )


def line(name: str, report: QualityReport, ram_nbytes: int, read_nbytes: int) -> None:
    ratio = report.log_perplexity_ratio
    print(
        f"  {name:<20} {ram_nbytes:>9} bytes of memory {read_nbytes:>9} a token  "
        f"PPL {report.perplexity.value:8.4f}  ln ratio {ratio.value:+.5f} ± {ratio.error:.5f}  "
        f"KL {report.kl_mean.value:.6f} ± {report.kl_mean.error:.6f}",
        flush=True,
    )


if __name__ == "__main__":
    raise SystemExit(main())
