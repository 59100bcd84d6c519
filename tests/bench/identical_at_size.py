"""A model of gigabytes, streamed: are its logits bit by bit those of stock llama.cpp?

    python -m tests.bench.identical_at_size                 # 6 GiB of Q4_K: about 15 minutes
    python -m tests.bench.identical_at_size --size 1G

For each length of prompt, stock llama.cpp's logits are kept (weights resident); then the model is
streamed with weight budgets of 30, 60 and 90 % of the file, in one file and in three, and two
models are decoded in turn in one process. Needs memory for the model, and room for two copies.
Exit status 0: all identical.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from nexus_ext import Llama
from nexus_ext.runtime.stock import stock_llama
from nexus_ext.testing.synthetic import llama_dims_for_size, write_llama
from nexus_ext.units import parse_bytes

PROMPTS = (1, 7, 64, 600)
BUDGETS = (30, 60, 90)  # percent of the file
N_DECODE = 4
SESSION: dict[str, Any] = {"n_ctx": 640, "n_batch": 640, "n_ubatch": 512, "verbose": False}


def tokens_of(n: int, n_vocab: int) -> list[int]:
    return [(i + 1) * 2654435769 % 2**32 * n_vocab >> 32 for i in range(n)]


def bits(llm: Any, n: int) -> np.ndarray:
    """The logits of `n` tokens of prompt and of what is decoded greedily after them."""
    llm.reset()
    llm.eval(tokens_of(n, llm.n_vocab()))
    for _ in range(N_DECODE):
        llm.eval([int(np.argmax(llm.scores[llm.n_tokens - 1]))])
    seen: np.ndarray = llm.scores[: llm.n_tokens].copy().view(np.uint32)
    return seen


def turns(llm: Any, n: int) -> Iterator[np.ndarray]:
    """The same token by token, so that two models can take turns."""
    llm.reset()
    llm.eval(tokens_of(n, llm.n_vocab()))
    for _ in range(N_DECODE):
        yield llm.scores[llm.n_tokens - 1].copy().view(np.uint32)
        llm.eval([int(np.argmax(llm.scores[llm.n_tokens - 1]))])


def resident(path: Path, lengths: tuple[int, ...]) -> dict[int, np.ndarray]:
    """What stock llama.cpp says, by length of prompt."""
    llm = stock_llama(str(path), logits_all=True, **SESSION)
    try:
        return {n: bits(llm, n) for n in lengths}
    finally:
        llm.close()


class Report:
    def __init__(self) -> None:
        self.n_different = 0

    def line(self, what: str, same: bool, seconds: float, read: int) -> None:
        self.n_different += not same
        text = "identical" if same else "DIFFERENT"
        print(f"{what:44} {text}   {seconds:6.1f} s, {read / 1e9:6.1f} GB streamed", flush=True)


def compare(path: Path, percent: int, expected: dict[int, np.ndarray], report: Report) -> None:
    nbytes = sum(file.stat().st_size for file in path.parent.glob("*.gguf"))
    with ExitStack() as stack:
        llm = Llama(path, weights=nbytes * percent // 100, logits_all=True, **SESSION)
        stack.callback(llm.close)
        for n, wanted in expected.items():
            llm.nexus.reset_stats()
            begin = time.monotonic()
            same = np.array_equal(bits(llm, n), wanted)
            read = llm.nexus.stats().bytes_read
            what = f"{path.parent.name}, {percent} %, prompt of {n}"
            report.line(what, same and read > 0, time.monotonic() - begin, read)


def two_at_once(paths: tuple[Path, Path], report: Report) -> None:
    with ExitStack() as stack:
        alone = []
        for path in paths:
            llm = stock_llama(str(path), logits_all=True, **SESSION)
            alone.append(list(turns(llm, 7)))
            llm.close()
        both = []
        for path in paths:
            nbytes = sum(file.stat().st_size for file in path.parent.glob("*.gguf"))
            both.append(Llama(path, weights=nbytes * 3 // 10, logits_all=True, **SESSION))
            stack.callback(both[-1].close)
        begin = time.monotonic()
        seen = list(zip(*(turns(llm, 7) for llm in both), strict=True))
        same = all(
            np.array_equal(a, wanted_a) and np.array_equal(b, wanted_b)
            for (a, b), wanted_a, wanted_b in zip(seen, *alone, strict=True)
        )
        read = sum(llm.nexus.stats().bytes_read for llm in both)
        report.line("two models in turn, 30 % each", same, time.monotonic() - begin, read)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="6G")
    parser.add_argument("--quant", default="Q4_K")
    parser.add_argument("--dir", default=None, help="where the models go; a disk, not a tmpfs")
    args = parser.parse_args()
    report = Report()
    with tempfile.TemporaryDirectory(prefix="nexus-bench-", dir=args.dir) as directory:
        dims = asdict(llama_dims_for_size(parse_bytes(args.size, what="--size"), args.quant))
        whole, split = Path(directory, "one file"), Path(directory, "three files")
        whole.mkdir()
        split.mkdir()
        write_llama(whole / "model.gguf", **dims, quant=args.quant)
        write_llama(split / "model.gguf", **dims, quant=args.quant, split=3)
        one, first = whole / "model.gguf", next(iter(sorted(split.glob("*-00001-of-*.gguf"))))
        expected = resident(one, PROMPTS)
        for percent in BUDGETS:
            compare(one, percent, expected, report)
        compare(first, 60, resident(first, (7, 64)), report)
        two_at_once((one, first), report)
    print(f"{report.n_different} of the comparisons differ")
    return report.n_different > 0


if __name__ == "__main__":
    sys.exit(main())
