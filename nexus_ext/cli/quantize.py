"""`nexus quantize`: a smaller model from an F16 one, its bits spent where they matter."""

from __future__ import annotations

import contextlib
import os
import sys
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from nexus_ext.cli.convert import Meter
from nexus_ext.cli.live import Live
from nexus_ext.cli.options import PlanOptions, output_options, plan_options
from nexus_ext.cli.output import Output
from nexus_ext.errors import UsageError
from nexus_ext.units import format_bytes

if TYPE_CHECKING:
    from nexus_ext.quality.allocation import Allocation
    from nexus_ext.quality.importance import ImportanceMatrix
    from nexus_ext.runtime.rounding import Compensated

DEFAULT_CTX = 512  # tokens in a window of calibration


@click.command()
@click.argument("source")
@click.option("-o", "--output", "target", metavar="FILE", required=True, help="Write the model.")
@click.option("--base", metavar="TYPE", required=True, help="For instance q4_k_m, q3_k_m, q2_k.")
@click.option("--calibrate", "text_file", metavar="TEXT", help="Text to measure importance with.")
@click.option("--imatrix", "imatrix_file", metavar="FILE", help="Importance measured before.")
@click.option("--save-imatrix", metavar="FILE", help="Keep the importance, as llama.cpp does.")
@click.option(
    "--allocate",
    "bits",
    type=click.FloatRange(min=1, max=16),
    metavar="BPW",
    help="Choose a type for each tensor, for so many bits per weight in all.",
)
@click.option(
    "--sensitivity",
    "method",
    type=click.Choice(["refined", "measured", "error"]),
    default="measured",
    help="What --allocate goes by: runs of the model with one tensor quantized at a time; beyond "
    "them, runs of the allocated model with one tensor changed at a time (refined: three times as "
    "long); or the errors of products alone.  [default: measured]",
)
@click.option(
    "--types",
    metavar="A,B,...",
    default="default",
    help="Types that --allocate may choose; `compact` adds IQ3_S and IQ3_XXS, which lose less "
    "below 4 bits and compute slower.",
)
@click.option(
    "--rounding",
    type=click.Choice(["nearest", "compensated"]),
    default="nearest",
    help="`compensated` rounds each column of a matrix so that it makes up for the errors of those "
    "before (GPTQ), by the --calibrate text: same size and types, less error, more computing.  "
    "[default: nearest, llama.cpp's own]",
)
@click.option(
    "--windows",
    "most",
    type=click.IntRange(min=1),
    metavar="N",
    help="Use the first N windows of the text.  [default: all]",
)
@click.option(
    "--residual",
    "with_residual",
    is_flag=True,
    help="Also keep what was lost, at four bits a weight, for `nexus run --residual`: as FILE.nxr, "
    "or inside of an NXF.",
)
@click.option("--scratch", metavar="DIR", help="Where the copy for sensitivities is made.")
@click.option("--allow-requantize", is_flag=True, help="Also quantize what is quantized.")
@click.option("--force", is_flag=True, help="Overwrite the target.")
@plan_options
@output_options
def quantize(
    source: str,
    target: str,
    base: str,
    text_file: str | None,
    imatrix_file: str | None,
    save_imatrix: str | None,
    bits: float | None,
    method: str,
    types: str,
    rounding: str,
    most: int | None,
    with_residual: bool,
    scratch: str | None,
    allow_requantize: bool,
    force: bool,
    planning: PlanOptions,
    output: Output,
) -> None:
    """Quantize SOURCE, a GGUF in F16, F32 or BF16, with llama.cpp's quantizer.

    With --calibrate the importance of every input channel is measured first, within the budget:
    SOURCE may be larger than memory. --allocate then also measures what each tensor can bear, and
    chooses the types that lose least for the size; that runs the model many times and needs a copy
    of it on disk.

    An output that ends in .nxf becomes an NXF: with the importance that was measured as its section
    `salience` (--imatrix takes it from there), and residuals as `residuals`.

    \b
    Examples:
      nexus quantize model-F16.gguf -o model-Q4_K_M.gguf --base q4_k_m --calibrate text.txt
      nexus quantize model-F16.gguf -o model.gguf --base q4_k_m --calibrate text.txt --allocate 4.5
      nexus quantize model-F16.gguf -o q.gguf --base q3_k_m --calibrate t.txt --rounding compensated
      nexus quantize model-F16.gguf -o model.gguf --base q3_k_m --residual
      nexus quantize model-F16.gguf -o model.nxf --base q3_k_m --residual
    """
    if rounding == "compensated" and "numpy" not in sys.modules:
        # Slabs of rows have threads of their own; a BLAS with more in each halves the speed.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from nexus_ext.formats import open_gguf
    from nexus_ext.runtime.predictions import read_text
    from nexus_ext.runtime.quantize import base_name, check_source
    from nexus_ext.runtime.quantize import quantize as make
    from nexus_ext.runtime.quantize_nxf import is_nxf_name, pack, place_for_gguf

    base = base_name(base)
    if text_file and imatrix_file and bits is None:
        raise UsageError("--calibrate and --imatrix both name the importance", hint="give one")
    if bits is not None and not (text_file or imatrix_file):
        raise UsageError("--allocate goes by a text", hint="give one with --calibrate")
    if rounding == "compensated" and not text_file:
        raise UsageError("--rounding compensated goes by a text", hint="give one with --calibrate")
    if save_imatrix and not text_file:
        raise UsageError("--save-imatrix has nothing to save", hint="give a --calibrate text")
    catalog = open_gguf(source)
    check_source(catalog, allow_requantize=allow_requantize)
    text = read_text(text_file) if text_file else None
    live = Live(output)
    planning = replace(planning, n_ctx=planning.n_ctx or DEFAULT_CTX, gpu_bytes=0)
    imatrix = _importance(source, text, imatrix_file, planning, most, live, output)
    if save_imatrix and imatrix:
        from nexus_ext.runtime.imatrix import save_imatrix as save

        save(save_imatrix, imatrix, overwrite=force)
    chosen = None
    if bits is not None and imatrix is not None:
        chosen = _allocation(
            source, imatrix, text, base, bits, method, types, planning, scratch, live
        )
    table, sections = None, {}
    compensated: Compensated | None = None

    def finish(path: str) -> None:
        nonlocal compensated
        if rounding == "compensated" and text is not None and imatrix is not None:
            compensated = _compensated(source, path, text, imatrix, planning, most, live)

    with contextlib.ExitStack() as stack:
        gguf = target
        if is_nxf_name(target):
            gguf = stack.enter_context(place_for_gguf(target, overwrite=force))
        made = make(
            source,
            gguf,
            base,
            imatrix=imatrix,
            types=chosen.types if chosen else None,
            n_threads=planning.n_threads,
            allow_requantize=allow_requantize,
            overwrite=force,
            progress=lambda tensor, done, total: live.status(f"{done} of {total}: {tensor}"),
            finish=finish,
        )
        if with_residual:
            from nexus_ext.runtime.residual import make_residuals

            table = make_residuals(
                source,
                gguf,
                n_threads=planning.n_threads,
                overwrite=force,
                progress=lambda tensor, done, total: live.status(f"residual {done} of {total}"),
            )
            sections["residuals"] = table.path
        if gguf != target:
            if imatrix:
                from nexus_ext.runtime.imatrix import save_imatrix as save

                sections["salience"] = gguf + ".imatrix"
                save(sections["salience"], imatrix)
            pack(gguf, target, sections, overwrite=force, progress=Meter(live))
            made = replace(made, path=target, nbytes=os.path.getsize(target))
    residual_path = target if gguf != target or table is None else table.path
    live.clear()
    if made.fallbacks:
        output.note(
            f"{len(made.fallbacks)} tensors got other types than asked for, the first: "
            f"{made.fallbacks[0]}"
        )
    used = Counter(made.tensor_types[t.name] for t in catalog.tensors if len(t.shape) > 1)
    output.line(
        f"{target}: {format_bytes(made.nbytes)}, {made.bits_per_weight:.2f} bits per weight, "
        f"from {format_bytes(catalog.file_nbytes)} in {made.seconds:.1f} s"
    )
    output.line("matrices: " + ", ".join(f"{n} {kind}" for kind, n in used.most_common()))
    if compensated is not None:
        output.line(f"rounded with compensation: {len(compensated.rounded)} tensors")
        if compensated.left:
            name, reason = next(iter(compensated.left.items()))
            output.note(
                f"{len(compensated.left)} tensors are rounded to nearest, the first: {name}, "
                f"because {reason}"
            )
    if table is not None:
        output.line(
            f"{residual_path}: residuals of {len(table.tensors)} matrices, "
            f"{format_bytes(table.nbytes)}"
        )
    output.result(
        {
            "source": source,
            "target": target,
            "base": base,
            "nbytes": made.nbytes,
            "bits_per_weight": made.bits_per_weight,
            "seconds": made.seconds,
            "fallbacks": made.fallbacks,
            "calibration_tokens": imatrix.n_tokens if imatrix else 0,
            "estimated_divergence": chosen.loss if chosen and method != "error" else None,
            "tensor_types": made.tensor_types,
            "compensated": compensated.rounded if compensated else (),
            "residual": {"path": residual_path, "nbytes": table.nbytes} if table else None,
        }
    )


def _importance(
    source: str,
    text: bytes | None,
    file: str | None,
    planning: PlanOptions,
    most: int | None,
    live: Live,
    output: Output,
) -> ImportanceMatrix | None:
    if file is not None:
        from nexus_ext.runtime.imatrix import load_imatrix

        return load_imatrix(file)
    if text is None:
        return None
    from nexus_ext.formats import open_gguf
    from nexus_ext.runtime import plan_model
    from nexus_ext.runtime.imatrix import collect_imatrix
    from nexus_ext.runtime.quality import quality_request

    request = quality_request(planning.request(open_gguf(source)))
    planned = plan_model(source, request, hardware=planning.hardware(source))
    found = collect_imatrix(
        source,
        text,
        planned,
        request,
        n_ctx=request.n_ctx,
        most=most,
        tick=lambda what, done, total: live.status(f"{what}: window {done + 1} of {total}"),
    )
    if found.unused:
        output.note(
            f"The text never reached {found.unused} experts: their channels count alike. "
            "A longer text reaches more."
        )
    return found


def _compensated(
    source: str,
    path: str,
    text: bytes,
    imatrix: ImportanceMatrix,
    planning: PlanOptions,
    most: int | None,
    live: Live,
) -> Compensated:
    from nexus_ext.formats import open_gguf
    from nexus_ext.runtime import plan_model
    from nexus_ext.runtime.quality import quality_request
    from nexus_ext.runtime.rounding import compensate

    request = quality_request(planning.request(open_gguf(source)))
    return compensate(
        source,
        path,
        text,
        imatrix,
        plan_model(source, request, hardware=planning.hardware(source)),
        request,
        n_ctx=request.n_ctx,
        most=most,
        n_threads=planning.n_threads,
        tick=lambda what, done, total: live.status(f"{what}: {done + 1} of {total}"),
    )


def _allocation(
    source: str,
    imatrix: ImportanceMatrix,
    text: bytes | None,
    base: str,
    bits: float,
    method: str,
    types: str,
    planning: PlanOptions,
    scratch: str | None,
    live: Live,
) -> Allocation:
    from nexus_ext.runtime.allocation import measure, types_named

    known = measure(
        source,
        imatrix,
        text,
        base=base,
        types=types_named(types),
        method="error" if method == "error" else "measured",
        n_ctx=planning.n_ctx or DEFAULT_CTX,
        n_threads=planning.n_threads,
        scratch_dir=scratch,
        tick=lambda what, done, total: live.status(f"{what}: {done + 1} of {total}"),
    )
    found = known.allocation(bits)
    if method != "refined" or text is None:
        return found
    from nexus_ext.formats import open_gguf
    from nexus_ext.runtime.refinement import refine
    from nexus_ext.runtime.weights import Weights

    return refine(
        Weights(open_gguf(source)),
        known,
        found,
        known.budget_nbytes(bits),
        imatrix,
        text,
        n_ctx=planning.n_ctx or DEFAULT_CTX,
        n_threads=planning.n_threads,
        scratch_dir=scratch,
        tick=lambda what, done, total: live.status(f"{what}: {done + 1} of {total}"),
    )
