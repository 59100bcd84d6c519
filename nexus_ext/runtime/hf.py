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
from nexus_ext.runtime.quantizer import QUANT_BITS, TERNARY_TYPES, quantize, quantized_nbytes

TYPES = (AUTO, *FLOAT_TYPES, *QUANT_BITS)

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
    if options.type_name not in QUANT_BITS:
        conversion = HfConversion(
            source, float_type=options.type_name, pre=options.pre, name=options.name
        )
        return conversion.write(
            target, overwrite=options.overwrite, progress=_phase(progress, "converting")
        )
    conversion = HfConversion(source, pre=options.pre, name=options.name)
    report = conversion.report
    float_bits = FLOATS[report.type_name].itemsize * 8
    expected = quantized_nbytes(report.nbytes, float_bits, options.type_name)
    check_space(os.path.dirname(os.path.abspath(target)), report.nbytes + expected)
    floats = f"{target}.floats"
    try:
        conversion.write(floats, overwrite=True, progress=_phase(progress, "converting"))
        notes = quantize(
            floats,
            target,
            options.type_name,
            n_threads=options.n_threads,
            overwrite=options.overwrite,
            expected_nbytes=expected,
            progress=_phase(progress, "quantizing"),
        )
    finally:
        with suppress(FileNotFoundError):
            os.unlink(floats)
    return _quantized(report, target, options.type_name, notes)


def _phase(progress: Progress | None, what: str) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    return lambda done, total: progress(what, done, total)


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
    if type_name in TERNARY_TYPES and not report.ternary:
        notes += (
            f"{type_name} keeps only the signs of weights: a model that was not trained ternary "
            "loses everything it has learned",
        )
    if type_name in TERNARY_TYPES and report.ternary and notes:
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
