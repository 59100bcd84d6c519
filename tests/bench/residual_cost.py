"""What correcting with residuals costs: time per token at several k, and what a disk would make it.

    python -m tests.bench.residual_cost [--quant Q3_K] [--rounds 5] [--layers 8]

Writes a synthetic llama with layers of 2560 and 6912 channels, resident, and attaches random
residuals to ffn_down, attn_v and attn_output of every layer. Decodes with k of 0 to 12 % of the
input channels in turn, all in one process; the time of a token is that of the fastest tenth. "of
products" is relative to the time that the corrected products take without residuals, taken to be
their part of the bytes read per token; "bytes" is what
the residuals add to what those products read: where memory is the limit no kernel can cost less.
Residuals have 4 bits a weight, so a share s of channels adds 4 s / b to a type of b bits a weight:
5 % more is s = b / 80, which is 3.3 % of the channels for Q2_K (2.625 bits), 4.3 % for Q3_K
(3.4375), 5.6 % for Q4_K (4.5). Last: the time that the same rows would take from the disk, from
its measured rate of random reads of 4 KiB.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from nexus_ext import Llama, core, kernels
from nexus_ext.testing.synthetic.models import write_llama

KINDS = ("ffn_down", "attn_v", "attn_output")
PERCENT = (0, 2, 4, 6, 12)


def attach(llm: Any) -> tuple[list[tuple[str, int, int]], int]:
    """Attach residuals, all with k = 0: [(name, n_in, n_out)], bytes of the corrected weights."""
    rng = np.random.default_rng(0)
    attached, nbytes = [], 0
    for tensor in llm.nexus.catalog.tensors:
        if tensor.layer is None or not any(kind in tensor.name for kind in KINDS):
            continue
        n_in, n_out = tensor.shape[:2]
        codes = rng.integers(0, 256, (n_in, kernels.row_bytes(n_out)), dtype=np.uint8)
        scales = np.full(n_out, 1e-5, np.float32)
        llm.nexus.model.attach_residual(tensor.name, codes, scales, 0)
        attached.append((tensor.name, n_in, n_out))
        nbytes += tensor.nbytes
    return attached, nbytes


def decode(llm: Any, n: int) -> list[float]:
    """Seconds of each token."""
    times = []
    llm.reset()
    llm.eval([1, 2, 3])
    for i in range(n):
        begin = time.perf_counter()
        llm.eval([100 + i])
        times.append(time.perf_counter() - begin)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quant", default="Q3_K")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("-n", type=int, default=24)
    parser.add_argument("-t", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "model.gguf"
        write_llama(
            path,
            n_layers=args.layers,
            n_embd=2560,
            n_ff=6912,
            n_heads=20,
            n_heads_kv=5,
            n_vocab=4096,
            quant=args.quant,
        )
        # A weights budget just below the model keeps the backend in; what it streams is little.
        llm = Llama(
            path,
            weights=path.stat().st_size - (2 << 20),
            n_ctx=256,
            n_threads=args.t,
            verbose=False,
        )
        attached, corrected = attach(llm)
        total = sum(t.nbytes for t in llm.nexus.catalog.tensors if t.layer is not None)
        share = corrected / total
        print(f"{args.quant}: {len(attached)} tensors corrected, {share:.0%} of the layers' bytes")
        print(f"residuals: {llm.nexus.model.attached_bytes() / 1e6:.0f} MB; {kernels.why()}")
        times: dict[int, list[float]] = {percent: [] for percent in PERCENT}
        for _ in range(args.rounds):
            for percent in PERCENT:
                for name, n_in, _n_out in attached:
                    llm.nexus.model.set_residual_k(name, n_in * percent // 100)
                times[percent] += decode(llm, args.n)
        # What others on the machine do makes tokens slower, never faster.
        fast = {percent: statistics.quantiles(values, n=10)[0] for percent, values in times.items()}
        base = fast[0]
        block = 1 << 12
        read, ns, _direct, _engine = core.read_disk(str(path), block, 32, True, 1 << 26, 2 * 10**9)
        per_read = ns / (read / block) / 1e9
        names = ("k", "ms/token", "added", "of products", "bytes", "from disk")
        print("{:>4} {:>9} {:>7} {:>11} {:>7} {:>10}".format(*names))
        for percent in PERCENT:
            added = fast[percent] - base
            rows = sum(
                n_in * percent // 100 * -(-kernels.row_bytes(n_out) // block)
                for _, n_in, n_out in attached
            )
            more = sum(
                n_in * percent // 100 * kernels.row_bytes(n_out) + 4 * n_out * (percent > 0)
                for _, n_in, n_out in attached
            )
            print(
                f"{percent:>3}% {(base + added) * 1e3:>9.2f} {added * 1e3:>7.2f} "
                f"{added / (base * share):>11.1%} {more / corrected:>7.1%} "
                f"{rows * per_read * 1e3:>7.0f} ms"
            )
        llm.close()


if __name__ == "__main__":
    main()
