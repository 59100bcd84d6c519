"""A ternary model of two billion weights end to end: our kernels beside stock llama.cpp.

    python -m tests.bench.ternary_decode [--quant tq2_0] [--weights 300M] [--experts] [--pin-cores]

Writes a synthetic model with the shapes of BitNet-b1.58-2B-4T (0.9 GB, output Q6_K), loads it twice
in one process and lets both decode in turn; with --experts, a mixture of 64 experts of which 6 are
used (0.6 GB). With --weights both stream what that leaves out, one
with ggml's kernels and one with ours. Prints tokens a second of prefill and decode, their medians
and ratios, and whether the logits are the same bits.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from nexus_ext import Llama
from nexus_ext.runtime.stock import stock_llama
from nexus_ext.testing.synthetic.models import LLAMA_PRESETS, MoeDims, write_llama, write_moe

MIXTURE = MoeDims(12, 1024, 1024, 16, 4, 32000, n_experts=64, n_used=6)


def run(llm: Any, prompt: list[int], n_decode: int) -> tuple[float, float, Any]:
    """Return tokens a second of prefill and of decode (its median), and the last logits."""
    llm.reset()
    begin = time.perf_counter()
    llm.eval(prompt)
    prefill = len(prompt) / (time.perf_counter() - begin)
    times = []
    for i in range(n_decode):
        begin = time.perf_counter()
        llm.eval([100 + i])
        times.append(time.perf_counter() - begin)
    logits = np.ctypeslib.as_array(llm._ctx.get_logits(), (llm.n_vocab(),))
    return prefill, 1 / statistics.median(times), logits.view(np.uint32).copy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quant", default="tq2_0", choices=("tq1_0", "tq2_0"))
    parser.add_argument("--folder", type=Path, help="keep the model here")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-n", type=int, default=24, help="tokens to decode")
    parser.add_argument("-p", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("-t", type=int, default=2, help="threads")
    parser.add_argument("--weights", help="resident weights and pools; the rest is streamed")
    parser.add_argument(
        "--pin-cores", action="store_true", help="our threads on cores of their own"
    )
    parser.add_argument("--experts", action="store_true", help="a mixture of experts instead")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        name = "mixture" if args.experts else "bitnet-2b"
        path = (args.folder or Path(temporary)) / f"{name}-{args.quant}.gguf"
        if not path.exists() and args.experts:
            write_moe(path, quant=args.quant, dims=MIXTURE)
        elif not path.exists():
            dims = asdict(LLAMA_PRESETS["bitnet-2b"])
            write_llama(path, **dims, quant=args.quant, output_quant="Q6_K")
        print(f"{path.stat().st_size / 1e9:.2f} GB")
        common: dict[str, Any] = {
            "n_ctx": 512,
            "n_batch": 256,
            "n_threads": args.t,
            "n_threads_batch": args.t,
            "flash_attn": True,
            "verbose": False,
        }
        ours = Llama(
            path, kernels="nexus", weights=args.weights, pin_cores=args.pin_cores, **common
        )
        if args.weights:
            stock: Any = Llama(path, kernels="ggml", weights=args.weights, **common)
        else:
            stock = stock_llama(str(path), **common)
        model = ours.nexus.model
        assert model is not None
        print(f"{model.n_packed()} weights packed, {model.attached_bytes() / 1e6:.0f} MB")
        streamed = ours.nexus.plan.streamed_bytes_per_token
        print(f"{streamed / 1e6:.0f} MB streamed for each token; processors {model.cores()}")
        prompt = [1, *(int(t) for t in np.random.default_rng(0).integers(3, 30000, args.p - 1))]
        pairs = []
        other = "ggml's" if args.weights else "stock"
        print(f"{'':>8} {other:>8} {'ours':>8} {'ratio':>6}   tok/s")
        for _ in range(args.rounds):
            a, b = run(stock, prompt, args.n), run(ours, prompt, args.n)
            pairs.append((a, b))
            for i, what in enumerate(("prefill", "decode")):
                print(f"{what:>8} {a[i]:8.2f} {b[i]:8.2f} {b[i] / a[i]:6.2f}", flush=True)
        for i, what in enumerate(("prefill", "decode")):
            a_median, b_median = (statistics.median(p[k][i] for p in pairs) for k in (0, 1))
            ratio = statistics.median(p[1][i] / p[0][i] for p in pairs)
            print(f"median {what}: {other} {a_median:.2f}, ours {b_median:.2f}, ratio {ratio:.2f}")
        same = all(np.array_equal(a[2], b[2]) for a, b in pairs)
        print(
            f"logits: {'the same bits' if same else 'differ'}; our products: {model.own_products()}"
        )
        ours.close()
        stock.close()


if __name__ == "__main__":
    main()
