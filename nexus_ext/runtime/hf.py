"""From a model folder of the hub to a GGUF of any type: the converter, then the quantizer."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

from nexus_ext.formats import open_gguf
from nexus_ext.formats.floats import FLOATS
from nexus_ext.formats.hf import AUTO, FLOAT_TYPES, ConvertReport, HfConversion
from nexus_ext.formats.new_file import check_space, refuse_existing
from nexus_ext.runtime.quantize import TERNARY, UNAIDED, quantize, quantized_nbytes
from nexus_ext.runtime.quantize import Progress as PerTensor

TYPES = (AUTO, *FLOAT_TYPES, *(name for name in UNAIDED if name not in FLOAT_TYPES))

# Called with (what is done, bytes done, bytes in all).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class HfOptions:
    """What a conversion can be told."""

    type_name: str = AUTO
    pre: str | None = None  # llama.cpp's pre-tokenizer, where the files do not tell
    name: str | None = None  # general.name
    n_threads: int = 0
    overwrite: bool = False


def convert_hf(
    source: str, target: str, options: HfOptions, progress: Progress | None = None
) -> ConvertReport:
    """Convert the folder `source` to the GGUF `target`.

    A quantized type goes through a file of floats beside the target, which is removed again.
    Raises what HfConversion and quantize raise.
    """
    refuse_existing(target, overwrite=options.overwrite)
    if options.type_name in (AUTO, *FLOAT_TYPES):
        conversion = HfConversion(
            source, float_type=options.type_name, pre=options.pre, name=options.name
        )
        return conversion.write(
            target, overwrite=options.overwrite, progress=_phase(progress, "converting")
        )
    conversion = HfConversion(source, pre=options.pre, name=options.name)
    report = conversion.report
    n_weights = report.nbytes // FLOATS[report.type_name].itemsize
    expected = quantized_nbytes(n_weights, options.type_name)
    check_space(os.path.dirname(os.path.abspath(target)), report.nbytes + expected)
    floats = f"{target}.floats"
    try:
        conversion.write(floats, overwrite=True, progress=_phase(progress, "converting"))
        made = quantize(
            floats,
            target,
            options.type_name,
            n_threads=options.n_threads,
            overwrite=options.overwrite,
            progress=_by_bytes(progress, report),
        )
    finally:
        with suppress(FileNotFoundError):
            os.unlink(floats)
    notes: tuple[str, ...] = ()
    if made.fallbacks:
        notes = (
            f"{len(made.fallbacks)} tensors have rows that do not fill the blocks of "
            f"{options.type_name}; llama.cpp gave them a larger type",
        )
    return _quantized(report, target, options.type_name, notes)


def _phase(progress: Progress | None, what: str) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    return lambda done, total: progress(what, done, total)


def _by_bytes(progress: Progress | None, report: ConvertReport) -> PerTensor:
    """Count the bytes of the floats that the quantizer has come to."""
    sizes = {tensor.name: tensor.nbytes for tensor in report.tensors}
    reached = 0

    def named(tensor: str, done: int, total: int) -> None:
        nonlocal reached
        reached += sizes.get(tensor, 0)
        if progress is not None:
            progress("quantizing", reached, sum(sizes.values()))

    return named


def _quantized(
    report: ConvertReport, target: str, type_name: str, notes: tuple[str, ...]
) -> ConvertReport:
    """Return the report with what the quantizer has made of the tensors."""
    catalog = open_gguf(target)
    written = {tensor.name: tensor for tensor in catalog.tensors}
    tensors = tuple(
        replace(t, written=written[t.name].type_name, nbytes=written[t.name].nbytes)
        for t in report.tensors
    )
    if type_name in TERNARY and not report.ternary:
        notes += (
            f"{type_name} keeps only the signs of weights: a model that was not trained ternary "
            "loses everything it has learned",
        )
    if type_name in TERNARY and report.ternary and notes:
        notes += (
            "the ternary weights in those tensors are no longer exact: q8_0 would keep them, but "
            "for the rounding of their scale",
        )
    return replace(
        report,
        type_name=type_name.upper(),
        nbytes=catalog.file_nbytes,
        tensors=tensors,
        notes=report.notes + notes,
    )
