"""A mixture of experts larger than its memory limit: paged against stock llama.cpp, interleaved.

    python -m tests.bench.experts_against_stock --skew 1.6 --limit 3560M
    python -m tests.bench.experts_against_stock --skew 0 --alone -- -p 64 -n 64 -c 768 --warmup 90

Writes a model of 8.7 GiB (26 layers of 128 experts, 8 a token, 4 bits) to `--dir` (removed again)
and prints how much of a token's routing repeats in the next one, which `--skew` decides. Then runs
`nexus bench` with `--baseline` and `--limit`: both sides in memory cgroups of that size, A B A B,
the disk measured after each run of ours. Whether prediction pays is known after some 60 tokens.
Needs the right to create a memory cgroup, and room for the model.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from nexus_ext.testing.synthetic import MoeDims, write_moe

DIMS = MoeDims(
    n_layers=26,
    n_embd=2048,
    n_ff=768,
    n_heads=32,
    n_heads_kv=4,
    n_vocab=32000,
    n_experts=128,
    n_used=8,
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--skew", type=float, default=1.6, help="popularity of experts; 0: none")
    parser.add_argument("--limit", default="3560M")
    parser.add_argument("--alone", action="store_true", help="without the other side")
    parser.add_argument("--dir", default=None, help="where the model goes; a disk, not a tmpfs")
    parser.add_argument("rest", nargs="*", help="more options of `nexus bench`, behind --")
    args = parser.parse_args()
    nexus = [sys.executable, "-m", "nexus_ext.cli"]
    with tempfile.TemporaryDirectory(prefix="nexus-bench-", dir=args.dir) as directory:
        path = Path(directory, "model.gguf")
        write_moe(
            path, arch="gpt-oss", dims=DIMS, quant="Q8_0", expert_quant="Q4_0", skew=args.skew
        )
        rng = random.Random(0)
        text = " ".join(str(rng.randrange(10**6)) for _ in range(60))
        trace = ["trace", str(path), text, "-n", "0", "-o", str(Path(directory, "t"))]
        subprocess.run([*nexus, *trace, "--ram", args.limit], cwd=directory, check=True)
        bench = ["bench", str(path), "--limit", args.limit]
        bench += [] if args.alone else ["--baseline"]
        return subprocess.run([*nexus, *bench, *args.rest], cwd=directory, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
