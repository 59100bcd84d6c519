"""Quantize a GGUF with llama.cpp's own quantizer, with an importance matrix and types by tensor.

The quantizer runs in a process of its own: it can be stopped at any time, and an abort in it ends
that process alone. The result appears under its name when it is complete. The worker's half is
`quantize_worker`.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from nexus_ext.errors import NexusError, UsageError, WriteFailed
from nexus_ext.formats import open_gguf
from nexus_ext.formats.ggml_types import GgmlType, ggml_types
from nexus_ext.formats.new_file import NewFile
from nexus_ext.quality.importance import ImportanceMatrix
from nexus_ext.runtime.interrupts import cleaned_up_when_ended
from nexus_ext.types import Catalog

# What `--base` takes: file types of llama.cpp with the type that most of their weights have.
BASES: Mapping[str, str] = {
    **{name: name.upper() for name in ("f16", "bf16", "q8_0", "q6_k", "q5_0", "q5_1", "q4_0")},
    **{name: name.upper() for name in ("q4_1", "iq4_nl", "iq4_xs", "iq3_s", "iq3_xxs", "iq2_s")},
    **{name: name.upper() for name in ("iq2_xs", "iq2_xxs", "iq1_m", "iq1_s", "tq2_0", "tq1_0")},
    **{f"q5_k_{size}": "Q5_K" for size in "ms"},
    **{f"q4_k_{size}": "Q4_K" for size in "ms"},
    **{f"q3_k_{size}": "Q3_K" for size in "lms"},
    "q2_k": "Q2_K",
    "q2_k_s": "Q2_K",
    "iq3_m": "IQ3_S",
    "iq3_xs": "IQ3_S",
    "iq2_m": "IQ2_S",
}
TERNARY: Sequence[str] = ("tq1_0", "tq2_0")
# Below about three bits llama.cpp asks for an importance matrix.
_WITH_IMATRIX = ("iq3_xxs", "iq3_xs", "iq2_m", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s")
UNAIDED: Sequence[str] = tuple(n for n in BASES if n not in (*_WITH_IMATRIX, "q2_k_s"))
"""The file types that can be made without an importance matrix."""
ALIASES: Mapping[str, str] = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}
_PLAIN = ("F32", "F16", "BF16")
_STDERR_LINES = 20  # of a worker that died
_MIXTURE = 1.3  # embedding, output and some others get more bits than the rest

Progress = Callable[[str, int, int], None]
"""Called with the tensor that is worked on, its number and how many there are."""


class QuantizationFailed(NexusError, RuntimeError):
    """llama.cpp's quantizer gave up; the message has its own words."""

    code = "quantization_failed"


@dataclass(frozen=True, slots=True)
class QuantizeJob:
    """What the worker does."""

    source: str
    target: str
    file_type: str  # a key of BASES
    types: Mapping[str, int]  # tensor -> ggml type
    imatrix: str | None  # .npz: tensor -> float32
    n_threads: int
    allow_requantize: bool
    dry_run: bool = False  # decide on types, write nothing


@dataclass(frozen=True, slots=True)
class Quantized:
    """A model that was written."""

    path: str
    nbytes: int  # of the file
    weight_nbytes: int
    bits_per_weight: float
    seconds: float
    fallbacks: tuple[str, ...]  # tensors whose rows the type does not divide, as llama.cpp says it
    tensor_types: Mapping[str, str]


def base_name(given: str) -> str:
    """Return the key of BASES that a user means. UsageError when there is none."""
    name = ALIASES.get(given.lower(), given.lower())
    if name not in BASES:
        close = difflib.get_close_matches(name, BASES, n=3)
        raise UsageError(
            f"there is no quantization {given!r}",
            hint=f"did you mean {' or '.join(close)}?" if close else f"one of {', '.join(BASES)}",
        )
    return name


def type_named(name: str) -> GgmlType:
    """Return the ggml type of this name. UsageError when there is none."""
    for kind in ggml_types().values():
        if kind.name == name.upper():
            return kind
    raise UsageError(f"ggml has no type {name!r}", hint="types are named like Q4_K or Q8_0")


def weights_in(catalog: Catalog) -> int:
    """Return the number of weights of a model: what bits per weight are counted by."""
    total = 0
    for tensor in catalog.tensors:
        n = 1
        for extent in tensor.shape:
            n *= extent
        total += n
    return total


def bits_per_weight(catalog: Catalog) -> float:
    return 8 * catalog.nbytes / weights_in(catalog)


def check_source(catalog: Catalog, *, allow_requantize: bool) -> None:
    """Raise UsageError when a model was quantized before and that was not allowed."""
    done = [t for t in catalog.tensors if len(t.shape) > 1 and t.type_name not in _PLAIN]
    if done and not allow_requantize:
        raise UsageError(
            f"{catalog.files[0].path} is quantized already: {len(done)} tensors, the first is "
            f"{done[0].name} in {done[0].type_name}",
            hint="quantize the F16 original; --allow-requantize does it anyway and loses more",
        )


@cleaned_up_when_ended()
def quantize(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    base: str,
    *,
    imatrix: ImportanceMatrix | None = None,
    types: Mapping[str, str] | None = None,
    n_threads: int = 0,
    allow_requantize: bool = False,
    overwrite: bool = False,
    progress: Progress = lambda tensor, done, total: None,
    finish: Callable[[str], None] = lambda path: None,
) -> Quantized:
    """Write `source`, a GGUF in F16, F32 or BF16, as `target` in the file type `base`.

    `types` names tensors that get a type of their own instead of the one that the file type gives
    them. `n_threads` 0 takes one a core. `finish` may change the file before it gets its name.
    Raises UsageError, FormatError, ReadFailed, WriteFailed, or QuantizationFailed with llama.cpp's
    own message.
    """
    source, target = os.fspath(source), os.fspath(target)
    name = base_name(base)
    catalog = open_gguf(source)
    check_source(catalog, allow_requantize=allow_requantize)
    if os.path.exists(target) and any(os.path.samefile(target, f.path) for f in catalog.files):
        raise UsageError(f"{target} is the source itself", hint="write to another file")
    numbers = _type_numbers(catalog, types or {})
    begin = time.perf_counter()
    expected = min(catalog.nbytes, quantized_nbytes(weights_in(catalog), name))
    with NewFile(
        target, expected_nbytes=expected + len(catalog.header), overwrite=overwrite
    ) as file:
        with tempfile.TemporaryDirectory(prefix="nexus-") as directory:
            job = QuantizeJob(
                source=os.path.abspath(catalog.files[0].path),  # of a split model the first part
                target=os.path.abspath(file.part_path),
                file_type=name,
                types=numbers,
                imatrix=_written(imatrix, catalog, Path(directory)),
                n_threads=n_threads,
                allow_requantize=allow_requantize,
            )
            fallbacks, _ = _run_worker(job, directory, progress)
        finish(file.part_path)
        file.commit()
    made = open_gguf(target)
    return Quantized(
        path=target,
        nbytes=made.file_nbytes,
        weight_nbytes=made.nbytes,
        bits_per_weight=bits_per_weight(made),
        seconds=time.perf_counter() - begin,
        fallbacks=tuple(fallbacks),
        tensor_types={t.name: t.type_name for t in made.tensors},
    )


@cleaned_up_when_ended()
def planned_types(source: str | os.PathLike[str], base: str) -> dict[str, str]:
    """Return the types that llama.cpp would give the tensors that it would quantize."""
    name = base_name(base)
    with tempfile.TemporaryDirectory(prefix="nexus-") as directory:
        job = QuantizeJob(
            source=os.path.abspath(open_gguf(source).files[0].path),
            target=os.path.join(directory, "none.gguf"),
            file_type=name,
            types={},
            imatrix=None,
            n_threads=0,
            allow_requantize=True,
            dry_run=True,
        )
        return _run_worker(job, directory, lambda tensor, done, total: None)[1]


def _type_numbers(catalog: Catalog, types: Mapping[str, str]) -> dict[str, int]:
    tensors = {t.name: t for t in catalog.tensors}
    numbers = {}
    for name, type_name in types.items():
        if name not in tensors:
            raise UsageError(f"the model has no tensor {name!r}", hint="see `nexus inspect`")
        kind, n_row = type_named(type_name), tensors[name].shape[0]
        if n_row % kind.block_elements:
            raise UsageError(
                f"{name} has rows of {n_row} weights, and {kind.name} packs "
                f"{kind.block_elements} at a time",
                hint="give this tensor a type with smaller blocks, for instance Q8_0 or IQ4_NL",
            )
        numbers[name] = kind.number
    return numbers


def quantized_nbytes(n_weights: int, base: str) -> int:
    """Return about how many bytes so many weights will take, rather more than fewer."""
    kind = type_named(BASES[base])
    return int(_MIXTURE * n_weights * kind.block_nbytes / kind.block_elements)


def _written(imatrix: ImportanceMatrix | None, catalog: Catalog, directory: Path) -> str | None:
    if imatrix is None:
        return None
    matrices = {t.name: t for t in catalog.tensors}
    arrays = {}
    for name, entry in imatrix.entries.items():
        tensor = matrices.get(name)
        if tensor is None:
            continue
        values = entry.mean_squares
        experts = tensor.shape[2] if len(tensor.shape) > 2 else 1
        if values.shape != (experts, tensor.shape[0]):
            raise UsageError(
                f"the importance matrix has {values.shape[1]} channels in {values.shape[0]} "
                f"matrices for {name}, the model {tensor.shape[0]} in {experts}",
                hint="collect it from this model",
            )
        arrays[name] = values.ravel()
    if not arrays:
        raise UsageError(
            "the importance matrix knows no tensor of this model", hint="collect it from this model"
        )
    path = directory / "imatrix.npz"
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return str(path)


def _run_worker(job: QuantizeJob, cwd: str, progress: Progress) -> tuple[list[str], dict[str, str]]:
    """Run the worker to its end; return fallbacks, and of a dry run the types."""
    command = [sys.executable, "-m", "nexus_ext.runtime.quantize_worker"]
    fallbacks: list[str] = []
    types: dict[str, str] = {}
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, cwd=cwd
        )
        try:
            assert child.stdin is not None and child.stdout is not None
            with contextlib.suppress(BrokenPipeError):  # a worker that is dead says nothing below
                child.stdin.write(json.dumps(asdict(job)).encode())
                child.stdin.close()
            end = _events(child.stdout, progress, fallbacks, types)
            child.wait()
        except BaseException:
            child.kill()
            child.wait()
            raise
        finally:
            if child.stdout is not None:
                child.stdout.close()
        if end is None:
            errors.seek(0)
            text = errors.read().decode("utf-8", "replace").strip().splitlines()
            raise QuantizationFailed(
                f"the quantizer ended with status {child.returncode} and no result: "
                + "\n".join(text[-_STDERR_LINES:]),
                hint="llama.cpp may not know this architecture",
            )
    if end["failed"] is not None:
        raise _failure(job, str(end["failed"]))
    return fallbacks, types


def _events(
    stream: IO[bytes], progress: Progress, fallbacks: list[str], types: dict[str, str]
) -> dict[str, Any] | None:
    """Follow the worker's events to the last one; None when it left without."""
    for line in stream:
        event: dict[str, Any] = json.loads(line)
        if "failed" in event:
            return event
        if "fallback" in event:
            fallbacks.append(event["fallback"])
        elif "type" in event:
            types[event["tensor"]] = event["type"].upper()
        else:
            progress(event["tensor"], event["done"], event["total"])
    return None


def _failure(job: QuantizeJob, text: str) -> NexusError:
    if re.search("requires an imatrix|importance matrix", text, re.IGNORECASE):
        return UsageError(
            f"{job.file_type} cannot be made without an importance matrix",
            hint="give a text of the model's kind with --calibrate, or a file with --imatrix",
        )
    if "iostream" in text or "basic_ios" in text:
        return WriteFailed(
            f"{job.target}: cannot be written", hint="see how much space is left", path=job.target
        )
    return QuantizationFailed(
        f"llama.cpp cannot quantize {job.source}: {text}",
        hint="the model may need a newer llama-cpp-python",
    )
