"""What quantizing each tensor costs: a computed error, times a measured sensitivity.

The error of a type is what it does to a matrix product, relative to the product: the sum over
outputs j and inputs i of E[x_i^2] (W - Wq)_ji^2, over the same sum of W_ji^2. It says nothing about
what the rest of the model makes of it. So each tensor (or group of like tensors, where a model has
many) is also quantized alone, in a copy of the model, and the divergence of the predictions from
those of the original is measured. The loss of a type is then estimated as that divergence, scaled
by the ratio of the errors: a proxy, right to second order for small errors.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nexus_ext.errors import UsageError
from nexus_ext.formats.floats import from_float32
from nexus_ext.formats.ggml_types import GgmlType
from nexus_ext.formats.new_file import check_space
from nexus_ext.quality.importance import ImportanceMatrix
from nexus_ext.runtime import tensor_codec
from nexus_ext.runtime.quality import record_reference, scores_against
from nexus_ext.runtime.scratch import scratch_directory
from nexus_ext.runtime.stock import stock_llama
from nexus_ext.runtime.weights import Weights
from nexus_ext.types import TensorInfo

_SAMPLE = 1 << 20  # weights of a tensor that its error is computed from
_SLAB = 1 << 22  # weights that are quantized at once
_MAX_PROBES = 64  # evaluations of the model
_LAYER = re.compile(r"blk\.(\d+)\.")

Tick = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """What is known about one tensor."""

    errors: Mapping[str, float]  # type -> relative error of the product
    divergence_per_error: float  # nats; 1.0 where nothing was measured


def sample_size() -> int:
    """Return how many weights of a tensor its error is computed from."""
    return _SAMPLE


def errors_of(
    weights: Weights,
    tensor: TensorInfo,
    kinds: Sequence[GgmlType],
    imatrix: ImportanceMatrix,
) -> dict[str, float]:
    """Return the relative error of each type, from evenly spaced rows of the tensor."""
    n, experts = tensor.shape[0], tensor.shape[2] if len(tensor.shape) > 2 else 1
    per_expert = tensor.n_rows // experts
    wanted = max(1, min(per_expert, _SAMPLE // (n * experts)))
    places = np.linspace(0, per_expert - 1, wanted).round().astype(np.int64)
    entry = imatrix.entries.get(tensor.name)
    lost = dict.fromkeys((kind.name for kind in kinds), 0.0)
    total = 0.0
    for expert in range(experts):
        rows = weights.rows(tensor, expert * per_expert + places)
        importance = None if entry is None else entry.mean_squares[expert]
        # Experts count by how often they are used, so sums and not means.
        weight = np.ones(n) if entry is None else entry.sums[expert]
        total += float(np.square(rows, dtype=np.float64).sum(axis=0) @ weight)
        for kind in kinds:
            data = tensor_codec.encode(kind, rows, importance)
            error = rows - tensor_codec.decode(kind, data, n)
            lost[kind.name] += float(np.square(error, dtype=np.float64).sum(axis=0) @ weight)
    return {name: value / total if total > 0 else 0.0 for name, value in lost.items()}


def all_errors(
    weights: Weights,
    tensors: Sequence[TensorInfo],
    kinds: Callable[[TensorInfo], Sequence[GgmlType]],
    imatrix: ImportanceMatrix,
    *,
    n_threads: int = 0,
    tick: Tick = lambda what, done, total: None,
) -> dict[str, dict[str, float]]:
    """Return `errors_of` all tensors, several at a time."""
    found = {}
    with ThreadPoolExecutor(n_threads or os.cpu_count() or 1) as pool:
        jobs = [(t, pool.submit(errors_of, weights, t, kinds(t), imatrix)) for t in tensors]
        for number, (tensor, job) in enumerate(jobs):
            tick("errors of types", number, len(jobs))
            found[tensor.name] = job.result()
    return found


def probe_groups(tensors: Sequence[TensorInfo], most: int | None = None) -> list[list[TensorInfo]]:
    """Return what is measured together: each tensor alone, or like ones of nearby layers."""
    most = most or _MAX_PROBES
    if len(tensors) <= most:
        return [[tensor] for tensor in tensors]
    kinds: dict[str, list[TensorInfo]] = {}
    for tensor in tensors:
        kinds.setdefault(_LAYER.sub("", tensor.name), []).append(tensor)
    parts = max(1, most // len(kinds))
    groups = []
    for members in kinds.values():
        members.sort(key=lambda t: t.layer if t.layer is not None else -1)
        n = min(parts, len(members))
        groups += [members[i * len(members) // n : (i + 1) * len(members) // n] for i in range(n)]
    return groups


class ModelCopy:
    """A copy of a model in one file, open in llama.cpp, whose weights can be changed.

    llama.cpp maps the file into memory (shared) and computes with what is there, so what is written
    to the file is what the next evaluation sees.
    """

    def __init__(self, weights: Weights, directory: str | None, n_ctx: int, n_threads: int) -> None:
        [source] = weights.catalog.files
        self._weights = weights
        self._directory = scratch_directory("nexus-quality-", directory)
        try:
            check_space(self._directory.name, source.nbytes)
            path = Path(self._directory.name) / "model.gguf"
            shutil.copyfile(source.path, path)
            self._file = open(path, "r+b", buffering=0)
            threads: dict[str, Any] = (
                {"n_threads": n_threads, "n_threads_batch": n_threads} if n_threads else {}
            )
            self.llm = stock_llama(
                str(path),
                n_ctx=n_ctx,
                n_batch=n_ctx,
                n_ubatch=min(512, n_ctx),
                n_gpu_layers=0,
                use_mmap=True,
                logits_all=True,
                verbose=False,
                **threads,
            )
        except BaseException:
            self._directory.cleanup()
            raise

    def __enter__(self) -> ModelCopy:
        return self

    def __exit__(self, *_: object) -> None:
        self.llm.close()
        self._file.close()
        self._directory.cleanup()

    @contextmanager
    def quantized(
        self, tensors: Sequence[TensorInfo], kind: GgmlType, imatrix: ImportanceMatrix
    ) -> Iterator[None]:
        """Within the block the model has these tensors as `kind` would keep them."""
        try:
            for tensor in tensors:
                self.write(tensor, kind, imatrix)
            yield
        finally:
            for tensor in tensors:
                self._file.seek(tensor.offset)
                self._file.write(self._weights.encoded(tensor).tobytes())

    def write(self, tensor: TensorInfo, kind: GgmlType, imatrix: ImportanceMatrix) -> None:
        """From now on the model has this tensor as `kind` would keep it."""
        entry = imatrix.entries.get(tensor.name)
        experts = tensor.shape[2] if len(tensor.shape) > 2 else 1
        per_expert, n = tensor.n_rows // experts, tensor.shape[0]
        step = max(1, _SLAB // n)
        for expert in range(experts):
            importance = None if entry is None else entry.mean_squares[expert]
            for begin in range(0, per_expert, step):
                first = expert * per_expert + begin
                last = expert * per_expert + min(per_expert, begin + step)
                rows = self._weights.rows(tensor, slice(first, last))
                data = tensor_codec.encode(kind, rows, importance)
                values = from_float32(tensor_codec.decode(kind, data, n), tensor.type_name)
                self._file.seek(tensor.offset + first * tensor.row_nbytes)
                self._file.write(values.tobytes())


def measure_divergences(
    weights: Weights,
    groups: Sequence[Sequence[TensorInfo]],
    kind: Callable[[TensorInfo], GgmlType],
    imatrix: ImportanceMatrix,
    text: bytes,
    *,
    n_ctx: int,
    most: int,
    n_threads: int = 0,
    scratch_dir: str | None = None,
    tick: Tick = lambda what, done, total: None,
) -> list[float]:
    """Return the mean divergence, in nats, of the model with one group at a time quantized.

    The model is copied to `scratch_dir` and computed by the CPU alone. Raises UsageError for a
    split model or one that is not in F32, F16 or BF16.
    """
    files = weights.catalog.files
    if len(files) != 1:
        raise UsageError(
            f"{files[0].path} is split into {len(files)} files, and sensitivity is measured in one",
            hint="merge them with llama-gguf-split --merge, or pass --sensitivity error",
        )
    found = []
    with ModelCopy(weights, scratch_dir, n_ctx, n_threads) as copy:
        with record_reference(
            copy.llm, text, n_ctx=n_ctx, most=most, scratch_dir=scratch_dir
        ) as reference:
            for number, group in enumerate(groups):
                tick("sensitivity", number, len(groups))
                with copy.quantized(group, kind(group[0]), imatrix):
                    found.append(max(0.0, float(scores_against(copy.llm, reference).kl.mean())))
    return found
