"""A quantized GGUF, its codes chosen anew so that the errors of a matrix make up for one another.

The file is what llama.cpp's quantizer made: types, sizes and layout stay, so whatever plays the one
plays the other. Matrix by matrix the codes and scales are replaced by those of `quality.rounding`,
which goes by the products of input channels over a calibration text. These take the square of the
channels in memory: as many passes over the text are made as a bound on that asks for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, Final

import numpy as np
import numpy.typing as npt

from nexus_ext.formats import open_gguf
from nexus_ext.formats.block_codes import Bytes, block_codes
from nexus_ext.formats.ggml_types import GgmlType
from nexus_ext.quality.importance import ImportanceMatrix
from nexus_ext.quality.rounding import Codes, Feedback, Grid, feedback, rounded
from nexus_ext.runtime import tensor_codec
from nexus_ext.runtime.activations import Inputs, collect_products
from nexus_ext.runtime.weights import Weights, kind_of
from nexus_ext.types import Role, TensorInfo

if TYPE_CHECKING:
    from nexus_ext.placement import PlanRequest
    from nexus_ext.runtime.planning import Planned

Floats = npt.NDArray[np.float32]
Tick = Callable[[str, int, int], None]

FEWEST_NBYTES: Final = 256 << 20  # of sums of products that are held at once, however tight it is
_SLAB = 1 << 22  # weights that are rounded at once, by each thread
_FEWEST_ROWS = 512  # of a slab: with fewer, numpy's calls cost more than what they compute
_PLAIN = ("F32", "F16", "BF16")


def encode(kind: GgmlType, rows: Floats, known: Feedback) -> bytes:
    """Quantize `rows` (n_rows, n) with compensation, to the bytes that `tensor_codec` makes.

    `kind` must be one of `block_codes`, and `known` for blocks of its size. Scales are ggml's own,
    of what is left to be rounded: weighed by what an error costs when later columns adapt, or by
    the squares of the inputs, whichever suits a row.
    """
    n_rows, n = rows.shape
    width, codes_of = kind.block_elements, block_codes()[kind.name]
    values = np.array(codes_of.levels, np.float32)
    ascending = values.argsort()
    to_code, rank = ascending.astype(np.uint8), ascending.argsort().astype(np.uint8)
    levels = values[ascending]
    importance = np.empty((2, n), np.float32)
    importance[:, known.order] = known.remaining, known.products.diagonal()
    proposed: dict[int, list[Bytes]] = {}
    out = np.empty((n_rows, n // width, kind.block_nbytes), np.uint8)

    def grid(blocks: Bytes) -> Grid:
        lowest, highest = (_at(kind, blocks, int(to_code[i])) for i in (0, -1))
        step = (highest - lowest) / (levels[-1] - levels[0])
        base = lowest - step * levels[0]
        return Grid(base.T, step.T, rank[codes_of.take(blocks)].T)

    def propose(begin: int, targets: Floats) -> list[Grid]:
        there = np.ascontiguousarray(targets.T)
        proposed[begin] = [
            np.frombuffer(
                tensor_codec.encode(kind, there, weights[begin : begin + width]), np.uint8
            ).reshape(n_rows, kind.block_nbytes)
            for weights in importance
        ]
        return [grid(blocks) for blocks in proposed[begin]]

    def put(begin: int, pick: npt.NDArray[np.intp], codes: Codes) -> None:
        blocks = np.stack(proposed.pop(begin))[pick, np.arange(n_rows)]
        codes_of.put(blocks, to_code[codes.T])
        out[:, begin // width] = blocks

    rounded(np.ascontiguousarray(rows.T), known, width, levels, propose, put)
    return out.tobytes()


def _at(kind: GgmlType, blocks: Bytes, code: int) -> Floats:
    """Return the weights that blocks have when all codes are `code`."""
    codes_of, changed = block_codes()[kind.name], blocks.copy()
    codes_of.put(changed, np.full((len(blocks), kind.block_elements), code, np.uint8))
    return tensor_codec.decode(kind, changed.tobytes(), kind.block_elements)


@dataclass(frozen=True, slots=True)
class Compensated:
    """What was done to a file."""

    rounded: tuple[str, ...]  # tensors
    left: Mapping[str, str]  # quantized tensors that stayed, and why
    n_passes: int  # over the text


def compensate(
    source: str,
    path: str,
    text: bytes,
    imatrix: ImportanceMatrix,
    planned: Planned,
    request: PlanRequest,
    *,
    n_ctx: int,
    most: int | None = None,
    n_threads: int = 0,
    products_nbytes: int | None = None,
    tick: Tick = lambda what, done, total: None,
) -> Compensated:
    """Round the tensors of `path`, a GGUF that was made of `source`, with compensation.

    `planned` and `request` are how `source` is run; `imatrix` is of the same text. Holds sums of
    products of at most `products_nbytes` (half of what the plan leaves free) or those of a single
    matrix; factoring the products of n channels takes another 30 n^2 bytes. Changes `path` in
    place. Raises UsageError when the text is too short, and what a run may raise.
    """
    exact, catalog = Weights(open_gguf(source)), open_gguf(path)
    left: dict[str, str] = {}
    groups: dict[bytes, list[TensorInfo]] = {}  # by what goes into them
    for tensor in catalog.tensors:
        if len(tensor.shape) < 2 or tensor.type_name in _PLAIN:
            continue
        reason = _reason(tensor, imatrix)
        if reason:
            left[tensor.name] = reason
        else:
            groups.setdefault(_input_of(tensor, imatrix), []).append(tensor)
    if products_nbytes is None:
        products_nbytes = max(FEWEST_NBYTES, planned.plan.breakdown["free"] // 2)
    passes = _passes(list(groups.values()), products_nbytes)
    n = sum(len(tensors) for tensors in groups.values())
    done: list[str] = []
    n_threads = n_threads or os.cpu_count() or 1
    with open(path, "r+b") as file, ThreadPoolExecutor(n_threads) as pool:
        for number, parts in enumerate(passes):
            what = f"products of channels, pass {number + 1} of {len(passes)}"
            products = collect_products(
                source,
                [inputs for inputs, _ in parts],
                text,
                planned,
                request,
                n_ctx=n_ctx,
                most=most,
                tick=lambda at, total, what=what: tick(what, at, total),  # type: ignore[misc]
            )
            for i, (inputs, tensors) in enumerate(parts):
                for matrix in range(inputs.first, inputs.last):
                    known: dict[int, Feedback] = {}
                    for tensor in tensors:
                        tick("rounding", len(done), n)
                        width = kind_of(tensor).block_elements
                        if width not in known:
                            known[width] = feedback(products[i][matrix - inputs.first], width)
                        _write(file, pool, exact, tensor, matrix, known[width], n_threads)
                products[i] = np.zeros(0, np.float32)  # its memory is free again
                done += [t.name for t in tensors if inputs.last == _matrices(t)]
    return Compensated(tuple(done), left, len(passes))


def _reason(tensor: TensorInfo, imatrix: ImportanceMatrix) -> str:
    """Return why a tensor keeps its codes, or nothing."""
    if tensor.type_name not in block_codes():
        return f"{tensor.type_name} has codes for several weights at once"
    if tensor.name not in imatrix.entries:
        return "no input of it was seen"
    if tensor.role is Role.TOKEN_EMBEDDING:
        return "its rows are also taken as they are"
    return ""


def _input_of(tensor: TensorInfo, imatrix: ImportanceMatrix) -> bytes:
    """Return what tells the input of a tensor: sums that are equal to the last bit are of one."""
    entry = imatrix.entries[tensor.name]
    if not entry.counts.any():
        return tensor.name.encode()
    return entry.sums.tobytes() + entry.counts.tobytes()


def _matrices(tensor: TensorInfo) -> int:
    return tensor.shape[2] if len(tensor.shape) > 2 else 1


def _passes(
    groups: Sequence[list[TensorInfo]], most_nbytes: int
) -> list[list[tuple[Inputs, list[TensorInfo]]]]:
    """Return what is collected in each pass: at least one matrix, else what fits."""
    passes: list[list[tuple[Inputs, list[TensorInfo]]]] = [[]]
    room = most_nbytes
    for tensors in groups:
        n, first = tensors[0].shape[0], 0
        while first < _matrices(tensors[0]):
            fitting = room // (4 * n * n)
            if fitting < 1 and passes[-1]:
                passes.append([])
                room = most_nbytes
                continue
            last = min(_matrices(tensors[0]), first + max(1, fitting))
            inputs = Inputs(tensors[0].name, n, first, last)
            passes[-1].append((inputs, tensors))
            room -= inputs.nbytes
            first = last
    return passes


def _write(
    file: BinaryIO,
    pool: ThreadPoolExecutor,
    exact: Weights,
    tensor: TensorInfo,
    matrix: int,
    known: Feedback,
    n_threads: int,
) -> None:
    """Round one matrix of a tensor in slabs of rows, which do not depend on one another."""
    kind, original = kind_of(tensor), exact.tensors[tensor.name]
    n_rows = tensor.n_rows // _matrices(tensor)
    step = max(_FEWEST_ROWS, min(_SLAB // tensor.shape[0], -(-n_rows // n_threads)))

    def slab(begin: int) -> bytes:
        first = matrix * n_rows + begin
        rows = exact.rows(original, slice(first, first + min(step, n_rows - begin)))
        return encode(kind, rows, known)

    file.seek(tensor.offset + matrix * n_rows * tensor.row_nbytes)
    for data in pool.map(slab, range(0, n_rows, step)):
        file.write(data)
