"""What residuals repair and cost, and what the same memory or bytes would have bought instead.

    python -m tests.bench.residual_quality TEXT F16.gguf [F16.gguf ...] [--windows 24]

Every matrix but the embedding (Q8_0) is Q3_K, then Q2_K; residuals of all of them that can be
corrected, shares of the input channels from none to all, the same for all kinds of matrices; at 6 %
also dealt out to the kinds as it is done when a model is opened, by what the first tokens that it
writes by itself show. Every token's products are those of decoding (columns by themselves, 32 at a
time). `limit` is the model with Wq + R as weights in F16: what all channels should come to.
Beside that: every plain type, with its size, which is also what a token reads; so the rows of equal
memory and of equal bytes per token can be compared. Gaps are ln(perplexity / that of F16), with
intervals of 95 % from drawing windows with replacement. Experts are not corrected.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from nexus_ext.formats import open_gguf
from nexus_ext.formats.floats import from_float32
from nexus_ext.formats.residuals import read_residual, read_residuals
from nexus_ext.kernels import Residual
from nexus_ext.placement import PlanRequest
from nexus_ext.quality.metrics import Scores
from nexus_ext.quality.report import summarize
from nexus_ext.runtime.planning import plan_model
from nexus_ext.runtime.predictions import opened
from nexus_ext.runtime.quality import record_reference, scores_against
from nexus_ext.runtime.quantize import Quantized, planned_types, quantize
from nexus_ext.runtime.reference import ReferenceFile
from nexus_ext.runtime.residual import SUFFIX, make_residuals
from nexus_ext.runtime.weights import Weights

SHARES = (0.0, 0.015, 0.03, 0.06, 0.12, 0.25, 0.5, 1.0)
CLAIMED = 0.06
PLAIN = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
COLUMNS = 32
EMBEDDING = "token_embd.weight"


@dataclass
class Bench:
    """One model and its reference."""

    source: str
    target: str
    request: PlanRequest
    kept: ReferenceFile
    base: Scores | None = None  # what gaps are closed of

    def made(self, kind: str) -> Quantized:
        types = dict.fromkeys(planned_types(self.source, "q4_k_m"), kind)
        types[EMBEDDING] = "Q8_0"
        return quantize(self.source, self.target, "q4_k_m", types=types, overwrite=True)

    def line(self, name: str, scores: Scores, ram_nbytes: int, read_nbytes: int) -> float:
        found = summarize(
            scores, n_windows=len(self.kept.windows), n_ctx=len(self.kept.windows[0].tokens)
        )
        ratio, kl = found.log_perplexity_ratio, found.kl_mean
        text = (
            f"  {name:<20} {ram_nbytes / 1e6:7.2f} MB {read_nbytes / 1e6:7.2f} MB a token  "
            f"PPL {found.perplexity.value:8.4f}  gap {ratio.value:+.5f} "
            f"({ratio.low:+.4f} to {ratio.high:+.4f})  KL {kl.value:.6f}"
        )
        if self.base is not None:
            low, high = self._closed(scores)
            gap = 1 - ratio.value / float((self.base.nll - self.base.nll_reference).mean())
            text += (
                f"  closes {100 * gap:.0f} % ({100 * low:.0f} to {100 * high:.0f}) of the gap, "
                f"{100 * (1 - kl.value / float(self.base.kl.mean())):.0f} % of KL"
            )
        print(text, flush=True)
        return ratio.value

    def _closed(self, scores: Scores) -> tuple[float, float]:
        """The interval of the part of the gap that is closed: both gaps from the same windows."""
        assert self.base is not None
        n = len(self.kept.windows)
        gaps = [(s.nll - s.nll_reference).reshape(n, -1).mean(axis=1) for s in (self.base, scores)]
        drawn = np.random.default_rng(0).integers(0, n, (2000, n))
        low, high = np.percentile(1 - gaps[1][drawn].mean(1) / gaps[0][drawn].mean(1), (2.5, 97.5))
        return float(low), float(high)


@contextmanager
def as_decoded(model: str, request: PlanRequest, **more: Any) -> Iterator[Any]:
    """The model, whose products are computed a column at a time."""
    small = {"n_batch": COLUMNS, "n_ubatch": COLUMNS}
    wish = PlanRequest(**{**{f: getattr(request, f) for f in request.__slots__}, **small})
    planned = plan_model(model, wish)
    with opened(model, planned, wish, **more) as llm:
        if llm.nexus.model is not None:
            llm.nexus.model.set_columns(True)
        yield llm


def limit_of(bench: Bench, sidecar: str) -> None:
    """Write a copy of the source whose corrected matrices are Wq + R, the others Wq, to target."""
    rough, exact = Weights(open_gguf(bench.target)), open_gguf(bench.source)
    table = read_residuals(sidecar)
    stored = {t.name: t for t in table.tensors}
    values: dict[str, Any] = {}
    for tensor in exact.tensors:
        quantized = rough.tensors[tensor.name]
        if quantized.type_name == tensor.type_name:
            continue
        rows = rough.rows(quantized, slice(None))
        if entry := stored.get(tensor.name):
            codes, scales = read_residual(table, entry)
            shape = np.frombuffer(codes, np.uint8).reshape(entry.n_in, -1)
            rows = rows + Residual(shape, np.frombuffer(scales, np.float32)).decode()
        values[tensor.name] = from_float32(rows, tensor.type_name)
    shutil.copyfile(bench.source, bench.target)
    with open(bench.target, "r+b") as file:
        for tensor in exact.tensors:
            if tensor.name in values:
                file.seek(tensor.offset)
                file.write(values[tensor.name].tobytes())


def corrected(bench: Bench, kind: str) -> None:
    made = bench.made(kind)
    table = make_residuals(bench.source, bench.target, overwrite=True)
    sidecar = bench.target + SUFFIX
    print(f"{kind} and residuals ({table.nbytes / 1e6:.2f} MB)")
    gaps, kls, kinds = [], [], {}
    bench.base = None
    ram_nbytes = made.weight_nbytes + table.nbytes
    with as_decoded(bench.target, bench.request, residual=sidecar, residual_share=0.0) as llm:
        residuals = llm.nexus.residuals
        llm.nexus.model.set_columns(False)
        seen = residuals.observe(llm)
        llm.nexus.model.set_columns(True)

        def measured(name: str) -> Scores:
            scores = scores_against(llm, bench.kept)
            read = made.weight_nbytes + residuals.bytes_per_token()
            gaps.append(bench.line(name, scores, ram_nbytes, read))
            kls.append(float(scores.kl.mean()))
            return scores

        for share in SHARES:
            residuals.set_share(share)
            scores = measured(f"{100 * share:5.1f} % of all kinds")
            bench.base = bench.base or scores
        falls = [all(b < a for a, b in pairwise(values)) for values in (gaps, kls)]
        residuals.spread(seen, CLAIMED)
        kinds = dict(residuals.shares)
        measured(f"{100 * residuals.share:5.1f} %, dealt out")
    limit_of(bench, sidecar)
    with as_decoded(bench.target, bench.request) as llm:
        bench.line("limit", scores_against(llm, bench.kept), 0, 0)
    print(f"  dealt out: {percent(kinds)}")
    print(f"  falls with every step: perplexity {yes(falls[0])}, KL {yes(falls[1])}")


def percent(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{kind} {100 * share:g} %" for kind, share in shares.items())


def yes(value: bool) -> str:
    return "yes" if value else "NO"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--types", nargs="+", default=["Q3_K", "Q2_K"])
    args = parser.parse_args()
    request = PlanRequest(n_ctx=args.ctx, n_threads=args.threads, gpu_bytes=0, logits_all=True)
    for source in args.models:
        with tempfile.TemporaryDirectory(prefix="nexus-bench-") as directory:
            target = str(Path(directory) / "quantized.gguf")
            with as_decoded(source, request) as llm:
                text = args.text.read_bytes()
                kept = record_reference(llm, text, n_ctx=args.ctx, most=args.windows)
            with kept:
                print(f"{source}: {kept.n_predictions} predictions in {len(kept.windows)} windows")
                bench = Bench(source, target, request, kept)
                for kind in PLAIN:
                    made = bench.made(kind)
                    with as_decoded(target, request) as llm:
                        scores = scores_against(llm, kept)
                    bench.line(kind, scores, made.weight_nbytes, made.weight_nbytes)
                for kind in args.types:
                    corrected(bench, kind)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
