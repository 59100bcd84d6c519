"""`nexus bench`: prefill and decode, beside stock llama.cpp and beside the physical bound."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import click

from nexus_ext.cli.library import MODEL
from nexus_ext.cli.options import SIZE, PlanOptions, output_options, plan_options
from nexus_ext.cli.output import Output
from nexus_ext.units import format_bytes

if TYPE_CHECKING:
    from nexus_ext.runtime.bench import Bench, Run, Spread, Summary


@click.command()
@click.argument("model", type=MODEL)
@plan_options
@click.option("--plan", "plan_file", metavar="FILE", help="Use this plan (`nexus plan -o`).")
@click.option(
    "-p",
    "--prompt-tokens",
    "n_prompt",
    default=512,
    type=click.IntRange(min=1),
    metavar="N",
    help="Tokens of the prompt.  [default: 512]",
)
@click.option(
    "-n",
    "--decode-tokens",
    "n_decode",
    default=32,
    type=click.IntRange(min=1),
    metavar="N",
    help="Tokens decoded and measured.  [default: 32]",
)
@click.option(
    "--warmup",
    "n_warmup",
    default=1,
    type=click.IntRange(min=0),
    metavar="N",
    help="Tokens decoded before decoding is measured.  [default: 1]",
)
@click.option(
    "--repeat",
    default=3,
    type=click.IntRange(min=1),
    metavar="N",
    help="Runs of each side.  [default: 3]",
)
@click.option(
    "--cold/--warm",
    default=True,
    help="Drop the page cache before each run, or evaluate the prompt once first.  "
    "[default: --cold]",
)
@click.option("--baseline", is_flag=True, help="Interleave stock llama.cpp (mmap): A B A B.")
@click.option(
    "--limit",
    "limit_bytes",
    type=SIZE,
    metavar="SIZE",
    help="Run every side in a memory cgroup of this size.",
)
@output_options
def bench(
    model: str,
    planning: PlanOptions,
    plan_file: str | None,
    n_prompt: int,
    n_decode: int,
    n_warmup: int,
    repeat: int,
    cold: bool,
    baseline: bool,
    limit_bytes: int | None,
    output: Output,
) -> None:
    """Measure prefill and decode of MODEL, and what part of the physical bound is reached.

    The bound is the bytes read per token divided by the disk's cold bandwidth, measured in pauses
    of decoding: in sequence, or at random places and an expert at a time where experts are
    streamed. With --limit and no budget, --ram is the limit.

    \b
    Examples:
      nexus bench model.gguf --ram 4G
      nexus bench model.gguf --limit 4G --baseline --repeat 5
      nexus bench model.gguf --weights 1G -p 128 -n 64 --json > result.json
    """
    from nexus_ext.formats import open_model
    from nexus_ext.runtime.bench import bench_model, context_for
    from nexus_ext.runtime.planning import plan_model
    from nexus_ext.runtime.worker import session_of

    planning.check_plan_file(plan_file)
    if planning.n_ctx is None:
        planning = replace(planning, n_ctx=context_for(n_prompt, n_decode, n_warmup))
    unlimited = planning.ram_bytes is None and planning.weights_bytes is None
    if limit_bytes is not None and unlimited and plan_file is None:
        planning = replace(planning, ram_bytes=limit_bytes)
    request = planning.request(open_model(model))
    hardware = planning.hardware(model)
    if limit_bytes is not None:
        memory = hardware.memory
        hardware = replace(
            hardware,
            memory=replace(
                memory,
                limit_bytes=min(limit_bytes, memory.usable_bytes),
                available_bytes=min(limit_bytes, memory.available_bytes),
                limit_source="--limit",
            ),
        )
    planned = plan_model(model, request, hardware=hardware, plan=plan_file)
    result = bench_model(
        model,
        planned,
        session_of(request, planned),
        n_prompt=n_prompt,
        n_decode=n_decode,
        n_warmup=n_warmup,
        repeat=repeat,
        cold=cold,
        baseline=baseline,
        limit_bytes=limit_bytes,
        note=output.note,
    )
    show(result, output)
    output.result(result)


def show(result: Bench, output: Output) -> None:
    """Write the tables of a benchmark."""
    s = result.session
    output.line(f"{result.model}: {format_bytes(result.streamed_nbytes)} of weights streamed")
    output.line(
        f"prompt {result.n_prompt}, decode {result.n_decode} after {result.n_warmup} of warm-up, "
        f"context {s.n_ctx}, micro-batch {s.n_ubatch}, {s.n_threads} threads, flash attention "
        + ("on" if s.flash_attn else "off")
    )
    output.line(result.how)
    if result.limit:
        output.line(f"memory limit: {result.limit}")
    output.heading("Rates, median (lowest..highest)")
    sides = [side for side in (result.paged, result.stock) if side is not None]
    output.table(
        ("side", ">runs", ">load s", ">prefill tok/s", ">decode tok/s", ">read/token", ">peak"),
        [_row(side) for side in sides],
    )
    for side in sides:
        if side.n_died:
            output.line(f"{side.n_died} of {side.n_runs} runs of {side.side}: {side.died}")
    if result.decode_ratio is not None and result.prefill_ratio is not None:
        output.line(
            f"paged / stock: decode x{result.decode_ratio:.2f}, prefill x{result.prefill_ratio:.2f}"
        )
    stall = stall_of(result.runs)
    if stall:
        output.line(f"paged, while decoding: {stall}")
    output.heading("Physical bound of decoding")
    if result.bound is None:
        output.line("none: decoding read nothing from the disk")
    else:
        bound = result.bound
        output.line(
            f"{format_bytes(bound.read_per_token_bytes)} per token / "
            f"{_rate(bound.disk_bytes_s)} = {bound.tok_s:.2f} tok/s; reached: "
            f"{bound.fraction.median:.0%} ({bound.fraction.low:.0%}..{bound.fraction.high:.0%})"
        )
    if result.shares:
        output.heading("Overlap of reading and computing, of the median run")
        output.table(
            ("phase", ">reading s", ">computing s", ">took s", ">longer / took"),
            [
                (
                    s.phase,
                    *(f"{n:.2f}" for n in (s.read_s, s.compute_s, s.seconds)),
                    f"{s.fraction:.0%}",
                )
                for s in result.shares
            ],
        )
    if result.loading is not None:
        loading = result.loading
        output.line(
            f"loading: {format_bytes(loading.nbytes)} became resident at {_rate(loading.bytes_s)}, "
            f"{loading.fraction:.0%} of the disk"
        )
    for text in result.notes:
        output.note(text)


def _row(side: Summary) -> tuple[str, ...]:
    read = side.read_per_token_bytes
    return (
        side.side,
        str(side.n_runs),
        _spread(side.load_s),
        _spread(side.prefill_tok_s),
        _spread(side.decode_tok_s),
        "-" if read is None else format_bytes(read),
        "-" if side.peak_bytes is None else format_bytes(side.peak_bytes),
    )


def _spread(value: Spread | None) -> str:
    if value is None:
        return "killed"
    return f"{value.median:.2f} ({value.low:.2f}..{value.high:.2f})"


def _rate(value: Spread) -> str:
    low, high = format_bytes(value.low), format_bytes(value.high)
    return f"{format_bytes(value.median)}/s ({low}..{high})"


def stall_of(runs: tuple[Run, ...]) -> str:
    """Return what decoding waited for the disk, and read ahead of routers; "" if nothing paged."""
    phases = [
        run.decode for run in runs if run.decode is not None and run.decode.wait_s is not None
    ]
    if not phases:
        return ""
    seconds, n_tokens = sum(p.seconds for p in phases), sum(p.n_tokens for p in phases)
    text = f"waiting for reads {sum(p.wait_s or 0.0 for p in phases) / seconds:.0%} of the time"
    ahead = sum(p.prefetched_bytes or 0 for p in phases)
    if ahead:
        wasted = sum(p.prefetch_wasted_bytes or 0 for p in phases)
        text += (
            f"; {format_bytes(ahead / n_tokens)} of experts read ahead a token, "
            f"{format_bytes(wasted / n_tokens)} in vain"
        )
    return text
