"""`nexus quality`: what a model's predictions have lost against the model it was made from."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import click

from nexus_ext.cli.library import MODEL
from nexus_ext.cli.live import Live
from nexus_ext.cli.options import PlanOptions, output_options, plan_options
from nexus_ext.cli.output import Output

if TYPE_CHECKING:
    from nexus_ext.quality.metrics import Estimate
    from nexus_ext.quality.report import QualityReport

DEFAULT_CTX = 512  # tokens: what published perplexities are measured with


@click.command()
@click.argument("model", type=MODEL)
@click.option(
    "--against", type=MODEL, metavar="REF", help="The model to compare with, usually in F16."
)
@click.option("-f", "--text", "text_file", metavar="FILE", required=True, help="Text to predict.")
@click.option(
    "--windows",
    "most",
    type=click.IntRange(min=1),
    metavar="N",
    help="Use the first N windows of the text.  [default: all]",
)
@click.option("--scratch", metavar="DIR", help="Where the reference's predictions are kept.")
@plan_options
@output_options
def quality(
    model: str,
    against: str | None,
    text_file: str,
    most: int | None,
    scratch: str | None,
    planning: PlanOptions,
    output: Output,
) -> None:
    """Measure how well MODEL predicts a text, alone or against the model it was made from.

    Perplexity is the number that llama.cpp's perplexity tool prints for the same text and context
    (512 tokens unless --ctx says otherwise). Against a reference also: the divergence of the
    predicted distributions (KL, in nats) and how often both hold the same token for most likely.
    Both models run one after the other, each within the budget.

    \b
    Examples:
      nexus quality model-Q4_K_M.gguf --against model-F16.gguf --text wiki.test.raw
      nexus quality model-F16.gguf --text wiki.test.raw --ram 4G
    """
    from nexus_ext.formats import open_model
    from nexus_ext.runtime.predictions import opened, read_text
    from nexus_ext.runtime.quality import compare_models, measure_perplexity, quality_request

    text = read_text(text_file)
    if planning.n_ctx is None:
        planning = replace(planning, n_ctx=DEFAULT_CTX)
    live = Live(output)

    def tick(what: str, done: int, total: int) -> None:
        live.status(f"{what}: window {done + 1} of {total}")

    request = quality_request(planning.request(open_model(model)))
    hardware = planning.hardware(model)
    if against is None:
        from nexus_ext.runtime import plan_model

        planned = plan_model(model, request, hardware=hardware)
        with opened(model, planned, request) as llm:
            found = measure_perplexity(llm, text, n_ctx=request.n_ctx, most=most, tick=tick)
        live.clear()
        output.line(f"perplexity  {found.value:.4f} ± {found.error:.5f}")
        output.result({"model": model, "text": text_file, "perplexity": found})
        return
    report = compare_models(
        model, against, text, request, hardware=hardware, most=most, scratch_dir=scratch, tick=tick
    )
    live.clear()
    show(report, output)
    output.result({"model": model, "against": against, "text": text_file, "report": report})


def show(report: QualityReport, output: Output) -> None:
    """Write the figures of a comparison."""

    def cell(e: Estimate, digits: int, scale: float = 1.0) -> str:
        return f"{scale * e.value:.{digits}f}"

    def row(name: str, e: Estimate, digits: int, scale: float = 1.0) -> tuple[str, ...]:
        error = f"{scale * e.error:.{digits}f}" if e.error else ""
        between = ""
        if e.low is not None and e.high is not None:
            between = f"{scale * e.low:.{digits}f} to {scale * e.high:.{digits}f}"
        return name, cell(e, digits, scale), error, between

    output.line(
        f"{report.n_predictions} predictions in {report.n_windows} windows of {report.n_ctx} tokens"
    )
    rows = [
        row("perplexity", report.perplexity, 4),
        row("  of the reference", report.reference_perplexity, 4),
        row("  ln(ratio)", report.log_perplexity_ratio, 5),
        row("KL divergence, mean", report.kl_mean, 6),
        row("  99th percentile", report.kl_p99, 5),
        ("  largest", f"{report.kl_max:.5f}", "", ""),
        row("same most likely token, %", report.same_top, 3, 100),
        row("probability of the next token, RMS difference, %", report.p_difference_rms, 3, 100),
    ]
    output.table(("", ">value", ">standard error", ">95 % interval"), rows)
    output.note("Intervals come from drawing whole windows: they allow for correlated tokens.")
