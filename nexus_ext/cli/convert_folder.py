"""`nexus convert` of a model folder of the Hugging Face hub."""

from __future__ import annotations

import os
import time
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING

from nexus_ext.cli.convert import Meter, Wishes, kind_of_target, show, to_nxf
from nexus_ext.cli.live import Live
from nexus_ext.cli.output import Output
from nexus_ext.errors import UsageError
from nexus_ext.formats.new_file import refuse_existing
from nexus_ext.units import format_bytes

if TYPE_CHECKING:
    from nexus_ext.formats.hf import ConvertReport


def convert_folder(
    source: str,
    target: str,
    type_name: str | None,
    pre: str | None,
    name: str | None,
    wishes: Wishes,
    output: Output,
    *,
    tensors: bool,
) -> None:
    """Convert the folder `source`; to an NXF by way of a GGUF that is removed again."""
    from nexus_ext.runtime.hf import TYPES, HfOptions, convert_hf

    chosen = (type_name or TYPES[0]).lower()
    if chosen not in TYPES:
        raise UsageError(f"--type is {type_name!r}", hint=f"There are: {', '.join(TYPES)}.")
    live = Live(output)
    start_s = time.monotonic()
    meters: dict[str, Meter] = {}

    def progress(what: str, done: int, total: int) -> None:
        meters.setdefault(what, Meter(live))(done, total)

    options = HfOptions(
        type_name=chosen,
        pre=pre,
        name=name,
        n_threads=wishes.n_threads or 0,
        overwrite=wishes.overwrite,
    )
    if kind_of_target(target) == "gguf":
        report = convert_hf(source, target, options, progress)
        live.clear()
        _show(output, report, target, time.monotonic() - start_s, tensors=tensors)
        return
    refuse_existing(target, overwrite=wishes.overwrite)
    between = f"{target}.between.gguf"
    try:
        report = convert_hf(source, between, options, progress)
        laid_out = to_nxf(between, target, wishes, Meter(live))
    finally:
        with suppress(FileNotFoundError):
            os.unlink(between)
    live.clear()
    show(output, laid_out, time.monotonic() - start_s, tensors=tensors)
    _notes(output, report)


def _show(
    output: Output, report: ConvertReport, target: str, seconds: float, *, tensors: bool
) -> None:
    fields = {name: getattr(report, name) for name in report.__slots__ if name != "tensors"}
    fields |= {"tensors": report.tensors} if tensors else {}
    output.result({"seconds": seconds, "paths": (target,), **fields})
    output.facts(
        [
            ("architecture", report.architecture + (", ternary" if report.ternary else "")),
            ("tokenizer", report.tokenizer),
            ("weights", f"{report.type_name}, {len(report.tensors)} tensors"),
        ]
    )
    if tensors:
        rows = [
            (t.name, " x ".join(map(str, t.shape)), t.stored, t.written, format_bytes(t.nbytes))
            for t in report.tensors
        ]
        output.table(("name", "shape", "stored", "written", ">bytes"), rows)
    else:
        counts: Counter[tuple[str, str]] = Counter()
        sizes: Counter[tuple[str, str]] = Counter()
        for tensor in report.tensors:
            counts[tensor.stored, tensor.written] += 1
            sizes[tensor.stored, tensor.written] += tensor.nbytes
        output.table(
            ("stored", "written", ">tensors", ">bytes"),
            [(*kind, str(counts[kind]), format_bytes(n)) for kind, n in sizes.most_common()],
        )
    rate = report.nbytes / max(seconds, 1e-3)
    output.line(f"{format_bytes(report.nbytes)}, {seconds:.1f} s, {format_bytes(rate)}/s")
    _notes(output, report)


def _notes(output: Output, report: ConvertReport) -> None:
    for note in report.notes:
        output.note(f"note: {note}")
