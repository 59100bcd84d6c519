"""`nexus plan`: where every byte of the budget would go, and how fast that would be."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from nexus_ext.cli.library import MODEL
from nexus_ext.cli.options import PlanOptions, output_options, plan_options, save
from nexus_ext.cli.output import Output
from nexus_ext.units import format_bytes

if TYPE_CHECKING:
    from nexus_ext.placement import Description
    from nexus_ext.runtime.planning import Planned


@click.command()
@click.argument("model", type=MODEL)
@plan_options
@click.option("-o", "--output", "file", metavar="FILE", help="Write the plan, for `run --plan`.")
@click.option(
    "--residual",
    "residual_file",
    metavar="FILE",
    help="Leave room for these residuals, for `run --residual`.",
)
@output_options
def plan(
    model: str,
    planning: PlanOptions,
    file: str | None,
    residual_file: str | None,
    output: Output,
) -> None:
    """Show where every byte of MODEL would go, and the speed to expect.

    Nothing is loaded. Without --ram or --weights the budget is 80 % of the memory that is free.
    With --json, the plan itself is written: what `run --plan` reads.

    \b
    Examples:
      nexus plan model.gguf --ram 4G
      nexus plan model.gguf --ram 4G --ctx 8192 --kv-type-k q8_0 -o plan.json
      nexus plan model.gguf --ram 8G --hardware laptop-16gb-nvidia-8gb
      nexus plan model.gguf --ram 8G --residual model.gguf.nxr -o plan.json
      nexus plan model.gguf --weights 1G --pin "ffn_down=ram" --pin "attn_(q|k|v)=nvme"
    """
    from nexus_ext.formats import open_model
    from nexus_ext.placement import describe
    from nexus_ext.runtime import plan_model

    request = planning.request(open_model(model))
    if residual_file is not None:
        from nexus_ext.formats.residuals import read_residuals
        from nexus_ext.runtime.residual import memory_nbytes

        room = memory_nbytes(read_residuals(residual_file))
        request = replace(request, residual_bytes=room)
    planned = plan_model(model, request, hardware=planning.hardware(model))
    text = planned.plan.to_json()
    if file is not None:
        save(file, text, "the plan")
    if output.mode == "json":
        output.result(json.loads(text))
        return
    show_plan(output, model, planned, describe(planned.plan, planned.catalog))
    if file is not None:
        output.note(f"The plan is in {file}: nexus run {model} --plan {file}")


def show_plan(output: Output, model: str, planned: Planned, description: Description) -> None:
    """Write the tables of a plan."""
    catalog, made = planned.catalog, planned.plan
    output.line(
        f"{model}: {catalog.shape.architecture}, {format_bytes(catalog.nbytes)} of weights in "
        f"{len(catalog.tensors)} tensors"
    )
    budget = sum(made.breakdown.values())
    output.heading("Memory")
    rows = [(name, format_bytes(size), _share(size, budget)) for name, size in description.memory]
    rows.append(("budget", format_bytes(budget), ""))
    output.table(("for", ">bytes", ">share"), rows, total=True)
    if description.gpu:
        output.heading(f"GPU memory ({made.n_gpu_layers} layers)")
        total = ("budget", format_bytes(sum(size for _, size in description.gpu)))
        gpu = [(name, format_bytes(size)) for name, size in description.gpu]
        output.table(("for", ">bytes"), [*gpu, total], total=True)
    output.heading("Weights")
    tiers = [tier for tier, size in description.totals.tier_bytes.items() if size]
    output.table(
        ("role", *(f">{tier}" for tier in tiers), ">total"),
        [
            (
                row.role,
                *(format_bytes(row.tier_bytes[t]) if row.tier_bytes[t] else "-" for t in tiers),
                format_bytes(row.total_bytes),
            )
            for row in (*description.roles, description.totals)
        ],
        total=True,
    )
    output.heading("Speed")
    output.facts(_speed(planned, description))
    for note in description.notes:
        output.line(f"note: {note}")


def _share(size: int, total: int) -> str:
    return f"{size / total:.1%}" if total else ""


def _speed(planned: Planned, description: Description) -> list[tuple[str, str]]:
    disk_bytes_s = planned.hardware.disk.sequential_bytes_s
    facts = [("predicted", f"{description.tok_s:.2f} tok/s, limited by {description.limit}")]
    if math.isfinite(description.bound_tok_s):
        streamed = format_bytes(description.streamed_bytes_per_token)
        facts += [
            (
                "bound",
                f"{description.bound_tok_s:.2f} tok/s: {streamed} a token at "
                f"{format_bytes(disk_bytes_s)}/s, and nothing else",
            ),
            ("reading", f"{_time(description.read_s)} a token, {planned.io_mode} reads"),
        ]
    facts += [
        ("computing", f"{_time(description.compute_s)} a token"),
        ("prefill", f"{description.prefill_tok_s:.1f} tok/s"),
    ]
    return facts


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"
