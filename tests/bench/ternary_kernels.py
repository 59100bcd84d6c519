"""Products with ternary matrices: our kernels beside ggml's, interleaved in one process.

    python -m tests.bench.ternary_kernels [--types tq2_0,tq1_0,q2_0] [--rounds 7] [--dram 640M]

ggml computes a graph of products on its own CPU backend (rounding activations included: about 2 us
a column of 2560), ours the same blocks after packing ("packed": resident weights) or as they are
("stored": weights that are streamed, experts); results are compared bit by bit. "cache": 1.3 MB of
packed weights, again and again; "DRAM": a matrix of --dram packed bytes, passed once for each
measurement. Medians over the rounds. GB/s are of the bytes that are read, beside what memory was
measured to give just before.

"of ports": the bound of what comes out of a cache, on a core that runs each 512-bit operation on
one of two ports. A packed block of 8 rows of TQ2_0 or TQ1_0 (2048 weights) takes for c columns 24
operations to unpack, 32 c that sum 64 products of bytes each, and 12 c to scale; the column says
which part of the rate of such operations with nothing else (measured before and after) that is.
By the same count four columns cannot cost less than (24 + 44 * 4) / (24 + 44) = 2.9 times one
with these kernels, where memory is not the limit.

Tiles of AMX lower that bound, but not to where one would like it. ggml's order of summing keeps
8 sums of 32 products apart in each row and block, and AMX wants rows side by side. From the packed
layout that is, for each packed block, 24 operations to transpose, 56 to unpack, and 12 c to add
what sums begin at, convert and scale: 128 for four columns, 1.9 times one, and 32 + 4 c stores of
64 bytes, at one a cycle, beside them. A kernel of that kind gave the same bits, but took 1.3 to 1.7
times as long as VNNI for 8 columns (7 to 10 times one), about as long for 16 and 32, and 0.8 to 1.0
for 512; therefore it is not here. Its steps of the tile unit, with their loads and stores, took 5
to 6 ns alone and some 20 ns in the kernel; the cause was not found.
A layout with rows side by side would save the transposition.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from nexus_ext import core, kernels
from nexus_ext.runtime import ggml
from nexus_ext.runtime.own_kernels import TYPES
from nexus_ext.units import parse_bytes

N_IN = 2560
CACHE_ROWS = 2048
TYPE_NUMBERS = {"tq1_0": 34, "tq2_0": 35, "q1_0": 41, "q2_0": 42}


class _InitParams(ctypes.Structure):
    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


class GgmlProduct:
    """One matrix and some columns in ggml, and a graph that multiplies them `repeat` times."""

    def __init__(self, type_name: str, rows: np.ndarray, n_columns: int, repeat: int) -> None:
        pointer, size = ctypes.c_void_p, ctypes.c_size_t
        call = ggml.function
        n_out = len(rows)
        self._free = call("ggml_free", None, pointer)
        overhead = (repeat + 8) * 512 + (1 << 20)
        params = _InitParams(
            rows.nbytes + 4 * n_columns * (N_IN + repeat * n_out) + overhead, None, False
        )
        self.context = call("ggml_init", pointer, _InitParams)(params)
        tensor = call(
            "ggml_new_tensor_2d", pointer, pointer, ctypes.c_int, ctypes.c_int64, ctypes.c_int64
        )
        data = call("ggml_get_data", pointer, pointer)
        w = tensor(self.context, TYPE_NUMBERS[type_name], N_IN, n_out)
        x = tensor(self.context, 0, N_IN, n_columns)
        ctypes.memmove(data(w), rows.ctypes.data, rows.nbytes)
        rng = np.random.default_rng(1)
        self.x = rng.normal(size=(n_columns, N_IN)).astype(np.float32)
        ctypes.memmove(data(x), self.x.ctypes.data, self.x.nbytes)
        mul_mat = call("ggml_mul_mat", pointer, pointer, pointer, pointer)
        self.graph = call("ggml_new_graph_custom", pointer, pointer, size, ctypes.c_bool)(
            self.context, repeat + 8, False
        )
        expand = call("ggml_build_forward_expand", None, pointer, pointer)
        for _ in range(repeat):
            last = mul_mat(self.context, w, x)
            expand(self.graph, last)
        self._result, self._shape = data(last), (n_columns, n_out)
        by_type = call("ggml_backend_dev_by_type", pointer, ctypes.c_int)
        self.backend = call("ggml_backend_dev_init", pointer, pointer, ctypes.c_char_p)(
            by_type(0), None
        )
        self._threads = call("ggml_backend_cpu_set_n_threads", None, pointer, ctypes.c_int)
        self._compute = call("ggml_backend_graph_compute", ctypes.c_int, pointer, pointer)
        self._free_backend = call("ggml_backend_free", None, pointer)

    def run(self, n_threads: int) -> None:
        self._threads(self.backend, n_threads)
        assert self._compute(self.backend, self.graph) == 0

    def result(self) -> np.ndarray:
        count = self._shape[0] * self._shape[1]
        raw = (ctypes.c_float * count).from_address(self._result)
        return np.frombuffer(raw, np.float32).reshape(self._shape).copy()

    def close(self) -> None:
        self._free_backend(self.backend)
        self._free(self.context)


def random_rows(type_name: str, n_out: int) -> np.ndarray:
    """Stored blocks of a ternary matrix with one scale: uint8 (n_out, bytes of a row)."""
    kind = kernels.TERNARY[type_name]
    block, nbytes = core.lib.nx_ternary_block(kind), core.lib.nx_ternary_block_bytes(kind)
    rng = np.random.default_rng(0)
    n_blocks = min(n_out, 1021) * (N_IN // block)
    blocks = rng.integers(0, 256, (n_blocks, nbytes), dtype=np.uint8)
    if type_name != "q1_0" and type_name != "tq1_0":  # 2 bits: the values 0, 1, 2
        trits = rng.integers(0, 3, (n_blocks, nbytes - 2, 4), dtype=np.uint8)
        packed = (trits << np.array([0, 2, 4, 6], dtype=np.uint8)).sum(axis=2)
        first = type_name == "q2_0"
        blocks[:, 2:] = packed if first else blocks[:, 2:]
        blocks[:, :-2] = blocks[:, :-2] if first else packed
    at = 0 if type_name in ("q2_0", "q1_0") else nbytes - 2
    blocks[:, at : at + 2] = np.frombuffer(np.float16(0.05).tobytes(), np.uint8)
    some = blocks.reshape(-1, N_IN // block * nbytes)
    return np.ascontiguousarray(np.resize(some, (n_out, some.shape[1])))


def in_threads(n: int, work: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=work, args=(i,)) for i in range(1, n)]
    for thread in threads:
        thread.start()
    work(0)
    for thread in threads:
        thread.join()


class OurProduct:
    """The same, by our kernels: each thread has a range of rows and repeats its product."""

    def __init__(
        self, type_name: str, rows: np.ndarray, x: np.ndarray, repeat: int, layout: str
    ) -> None:
        kind = kernels.StoredMatrix if layout == "stored" else kernels.PackedMatrix
        self.matrix = kind(type_name, rows, N_IN)
        self.x, self.repeat = x, repeat
        self.y = np.empty((len(x), len(rows)), np.float32)
        self.columns = self.matrix.activate(x)

    def run(self, n_threads: int) -> None:
        unit = self.matrix.row_unit
        units = -(-len(self.y[0]) // unit)

        def part(i: int) -> None:
            begin, end = units * i // n_threads * unit, units * (i + 1) // n_threads * unit
            end = min(end, len(self.y[0]))
            for _ in range(self.repeat):
                self.matrix.multiply_into(self.columns, self.y, begin, end)

        in_threads(n_threads, part)


def seconds(run: Callable[[int], None], n_threads: int) -> float:
    begin = time.perf_counter()
    run(n_threads)
    return time.perf_counter() - begin


def measure(
    type_name: str,
    n_out: int,
    n_columns: int,
    n_threads: int,
    rounds: int,
    repeat: int,
    layout: str,
) -> dict[str, Any]:
    rows = random_rows(type_name, n_out)
    theirs = GgmlProduct(type_name, rows, n_columns, repeat)
    ours = OurProduct(type_name, rows, theirs.x, repeat, layout)
    del rows
    theirs.run(n_threads)
    ours.run(n_threads)
    same = bool(np.array_equal(theirs.result().view(np.uint32), ours.y.view(np.uint32)))
    pairs = [(seconds(theirs.run, n_threads), seconds(ours.run, n_threads)) for _ in range(rounds)]
    theirs.close()
    weights = N_IN * n_out * n_columns * repeat
    a, b = (statistics.median(p[i] for p in pairs) for i in (0, 1))
    return {
        "same": same,
        "ggml": weights / a / 1e9,
        "ours": weights / b / 1e9,
        "ratio": statistics.median(p[0] / p[1] for p in pairs),
        "gb_s": ours.matrix.nbytes * repeat / b / 1e9,
        "seconds": b,
    }


def of_ports(type_name: str, layout: str, n_columns: int, g_weights_s: float, dots: float) -> str:
    """Return the part of a core's bound that was reached, see above; "" where none is known."""
    if layout != "packed" or type_name not in ("tq1_0", "tq2_0") or not dots:
        return ""
    columns = min(n_columns, 4)  # of one pass
    operations = (24 + 44 * columns) / (2048 * columns)  # for one weight and column
    return f"{g_weights_s * 1e9 * operations / dots:.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", default=",".join(TYPES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dram", default="640M", help="packed bytes of the large matrix")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--layouts", default="packed,stored")
    parser.add_argument("--places", default="cache,DRAM")
    parser.add_argument("--columns", default="1,4,8")
    args = parser.parse_args()
    large = parse_bytes(args.dram, what="--dram") * 4 // N_IN
    print(kernels.why())
    memory = {n: core.memory_bandwidth(n, 1 << 29) / 1e9 for n in map(int, args.threads.split(","))}
    print("memory:", ", ".join(f"{n} threads {rate:.1f} GB/s" for n, rate in memory.items()))
    print(
        f"{'type':<6} {'layout':<6} {'from':<6} {'thr':>3} {'col':>3} "
        f"{'ggml':>8} {'ours':>8} {'ratio':>6} {'GB/s':>6} {'of memory':>9} "
        f"{'of ports':>8} {'to 1 col':>8}  bits"
    )
    sizes = {"cache": CACHE_ROWS, "DRAM": large}
    for type_name, layout, place, (n_threads, rate) in itertools.product(
        args.types.split(","), args.layouts.split(","), args.places.split(","), memory.items()
    ):
        one = 0.0
        for n_columns in map(int, args.columns.split(",")):
            slow = 20 if type_name == "q2_0" else 1
            repeat = max(1, 200 // slow // n_columns) if place == "cache" else 1
            rounds = args.rounds if place == "cache" or slow == 1 else 3
            dots = kernels.dots_per_second()
            row = measure(type_name, sizes[place], n_columns, n_threads, rounds, repeat, layout)
            dots = max(dots, kernels.dots_per_second())
            per_pass = row["seconds"] / repeat
            one = one or per_pass
            print(
                f"{type_name:<6} {layout:<6} {place:<6} {n_threads:>3} {n_columns:>3} "
                f"{row['ggml']:>8.1f} {row['ours']:>8.1f} {row['ratio']:>6.2f} "
                f"{row['gb_s']:>6.1f} {row['gb_s'] / rate:>9.0%} "
                f"{of_ports(type_name, layout, n_columns, row['ours'] / n_threads, dots):>8} "
                f"{per_pass / one:>8.2f}  "
                f"{'same' if row['same'] else 'differ'}",
                flush=True,
            )
    print("rates in G weights/s (times columns)")


if __name__ == "__main__":
    main()
