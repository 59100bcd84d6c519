"""A synthetic model larger than its memory limit: paged against stock llama.cpp, interleaved.

    python -m tests.bench.paged_against_stock --size 2G --limit 1300M

Writes a model of `--size` to `--dir` (removed again), then runs `nexus bench` with `--baseline` and
`--limit`: both sides in memory cgroups of that size, A B A B, the disk measured
after each run of ours. Needs the right to create a memory cgroup, and room for the model.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from nexus_ext.testing.synthetic import llama_dims_for_size, write_llama
from nexus_ext.units import parse_bytes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="2G")
    parser.add_argument("--limit", default="1300M")
    parser.add_argument("--quant", default="Q4_0")
    parser.add_argument("--dir", default=None, help="where the model goes; a disk, not a tmpfs")
    parser.add_argument("rest", nargs="*", help="more options of `nexus bench`, behind --")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nexus-bench-", dir=args.dir) as directory:
        path = Path(directory, "model.gguf")
        dims = llama_dims_for_size(parse_bytes(args.size, what="--size"), args.quant)
        write_llama(path, **asdict(dims), quant=args.quant)
        command = [sys.executable, "-m", "nexus_ext.cli", "bench", str(path), "--baseline"]
        return subprocess.run(
            [*command, "--limit", args.limit, *args.rest], cwd=directory, check=False
        ).returncode


if __name__ == "__main__":
    raise SystemExit(main())
