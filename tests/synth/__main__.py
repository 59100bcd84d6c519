"""Command line: `python -m tests.synth llama OUT.gguf --size 6G --quant q4_k`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from nexus_ext.testing.synthetic.models import (
    LLAMA_PRESETS,
    MOE_ARCHITECTURES,
    MoeDims,
    llama_dims_for_size,
    write_llama,
    write_moe,
    write_preset,
)
from nexus_ext.units import format_bytes, parse_bytes


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.synth", description="Write a synthetic model.")
    kinds = parser.add_subparsers(dest="kind", required=True)
    llama = kinds.add_parser("llama", help="dense, of a size or a preset")
    how = llama.add_mutually_exclusive_group(required=True)
    how.add_argument("--size", help="size of the file, for instance 6G (units are binary)")
    how.add_argument("--preset", choices=sorted(LLAMA_PRESETS))
    llama.add_argument("--tied", action="store_true", help="no output head of its own")
    moe = kinds.add_parser("moe", help="mixture of experts")
    moe.add_argument("--arch", choices=MOE_ARCHITECTURES, default="qwen3moe")
    moe.add_argument("--expert-quant", type=str.upper, help="type of the experts, if another")
    moe.add_argument("--skew", type=float, help="of the popularity of experts (gpt-oss)")
    moe.add_argument("--fused", action="store_true", help="gate and up projection in one tensor")
    for name, default in asdict(MoeDims()).items():
        moe.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    for sub in (llama, moe):
        sub.add_argument("out", type=Path)
        sub.add_argument("--quant", type=str.upper, default="Q4_0")
        sub.add_argument("--split", type=int, help="number of files")
        sub.add_argument("--seed", type=int, default=0)
        sub.add_argument("--sparse", action="store_true", help="leave the weights out as holes")
    args = parser.parse_args(arguments)
    common = {"quant": args.quant, "split": args.split, "seed": args.seed, "sparse": args.sparse}
    start = time.perf_counter()
    if args.kind == "moe":
        dims = MoeDims(**{name: getattr(args, name) for name in asdict(MoeDims())})
        paths = write_moe(
            args.out,
            arch=args.arch,
            dims=dims,
            expert_quant=args.expert_quant,
            fused=args.fused,
            skew=args.skew,
            **common,
        )
    elif args.preset:
        paths = write_preset(args.out, args.preset, tied=args.tied, **common)
    else:
        size = llama_dims_for_size(parse_bytes(args.size, what="--size"), args.quant)
        paths = write_llama(args.out, **asdict(size), tied=args.tied, **common)
    seconds = time.perf_counter() - start
    nbytes = sum(path.stat().st_size for path in paths)
    for path in paths:
        print(path)
    print(f"{format_bytes(nbytes)} in {seconds:.1f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
