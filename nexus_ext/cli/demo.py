"""`nexus demo`: a bundled model in less memory than its weights, proven equal to a stock run."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from nexus_ext.cli import accounting
from nexus_ext.cli.live import Live
from nexus_ext.cli.options import SIZE, PlanOptions, output_options
from nexus_ext.cli.output import Output
from nexus_ext.errors import Interrupted, OutputDiffers
from nexus_ext.units import format_bytes

if TYPE_CHECKING:
    from nexus_ext.cli.session import Answer
    from nexus_ext.runtime import Planned
    from nexus_ext.runtime.verify import Verification

MODEL: Final = Path(__file__).resolve().parents[1] / "data" / "bitllama-3M-q8_0.gguf"
PROMPT: Final = "Once upon a time, there was a little dragon"
_N_CTX: Final = 256


@click.command()
@click.option("-n", "--predict", "n_predict", type=click.IntRange(2, 200), default=64, metavar="N",
              help="Tokens to generate.  [default: 64]")  # fmt: skip
@click.option("--weights", "weights_bytes", type=SIZE, default="1M", metavar="SIZE",
              help="Budget for weights and their pools.  [default: 1M]")  # fmt: skip
@click.option("--prompt", default=PROMPT, metavar="TEXT", help="What the text begins with.")
@click.option("--hardware", "hardware_file", metavar="FILE", help="As for `nexus run`.")
@output_options
def demo(
    n_predict: int, weights_bytes: int, prompt: str, hardware_file: str | None, output: Output
) -> int:
    """Run a small model that comes with the package in less memory than its weights.

    Most weights are read from the disk again for every token. The same is then done by llama.cpp as
    it comes, and tokens and logits are compared: status 1 if any bit differs.

    \b
    Examples:
      nexus demo
      nexus demo --weights 700K -n 100
    """
    from nexus_ext.runtime.verify import verify_model

    planning = _planning(weights_bytes, hardware_file)
    live = Live(output)
    planned, answer = _run_streamed(planning, prompt, n_predict, output, live)
    if answer.finish == "interrupted":
        return Interrupted.exit_status
    request = planning.request(planned.catalog)
    live.status("comparing with stock llama.cpp")
    expected = _stock_tokens(request.n_ctx, prompt, len(answer.tokens))
    verification = verify_model(
        str(MODEL), planned, request, prompt=prompt, n_decode=len(answer.tokens), note=live.status
    )
    live.clear()
    same_tokens = expected == answer.tokens
    output.heading("Accounting")
    output.facts(_facts(planned, answer, verification, same_tokens))
    output.result(
        {
            "model": MODEL,
            "text": prompt + answer.text,
            "weights_bytes": planned.catalog.nbytes,
            "budget_bytes": weights_bytes,
            "resident_bytes": planned.plan.weights_bytes,
            "streamed_bytes": verification.streamed_nbytes,
            "accounting": accounting.fields(answer),
            "identical": same_tokens and verification.identical,
            "same_tokens": same_tokens,
            "comparison": verification.comparison,
        }
    )
    if same_tokens and verification.identical:
        return 0
    if output.mode != "json":  # there, the result says it
        output.error(_difference(verification, same_tokens))
    return OutputDiffers.exit_status


def _planning(weights_bytes: int, hardware_file: str | None) -> PlanOptions:
    return PlanOptions(
        ram_bytes=None,
        weights_bytes=weights_bytes,
        gpu_bytes=0,
        pins=(),
        io_mode="direct",  # the page cache would hold all of so small a model
        hardware_file=hardware_file,
        n_ctx=_N_CTX,
        n_batch=_N_CTX,
        n_ubatch=_N_CTX,
        n_threads=1,  # so small a model gains nothing from more
        kv_type_k="f16",
        kv_type_v="f16",
        flash_attn=False,
    )


def _run_streamed(
    planning: PlanOptions, prompt: str, n_predict: int, output: Output, live: Live
) -> tuple[Planned, Answer]:
    """Plan, load and answer greedily with streamed weights, showing the text as it comes."""
    from nexus_ext.cli.run import open_session
    from nexus_ext.cli.session import Sampling
    from nexus_ext.runtime import Planned

    with open_session(str(MODEL), planning, None, 64, live) as session:
        handle = session.llm.nexus
        output.line(
            f"{MODEL.name}: {format_bytes(handle.catalog.nbytes)} of weights, "
            f"{format_bytes(planning.weights_bytes or 0)} of memory for them.\n"
        )
        live.text(prompt)
        answer = session.generate(
            session.complete(prompt),
            sampling=Sampling(temp=0.0),
            seed=0,
            limit=n_predict,
            on_text=live.text,
        )
        live.end_line()
        return Planned(handle.catalog, handle.hardware, handle.plan, handle.io_mode), answer


def _stock_tokens(n_ctx: int, prompt: str, n_tokens: int) -> tuple[int, ...]:
    """Return what llama.cpp generates by itself, greedily, with all weights in its own memory."""
    from nexus_ext.runtime.stock import stock_llama

    llm = stock_llama(
        str(MODEL), n_ctx=n_ctx, n_batch=n_ctx, n_ubatch=n_ctx, n_threads=1, verbose=False
    )
    try:
        tokens = llm.tokenize(prompt.encode(), special=True)
        return tuple(islice(llm.generate(tokens, temp=0.0), n_tokens))
    finally:
        llm.close()


def _facts(
    planned: Planned, answer: Answer, verification: Verification, same_tokens: bool
) -> list[tuple[str, str]]:
    plan, stats = planned.plan, answer.decode
    facts = [
        ("weights", format_bytes(planned.catalog.nbytes)),
        ("budget", format_bytes(plan.budget.weights_bytes or 0)),
        ("resident", f"{format_bytes(plan.weights_bytes)}, pools included"),
        ("streamed", f"{format_bytes(verification.streamed_nbytes)} of the weights"),
        ("speed", f"{accounting.rate(answer.tok_s)}, predicted {plan.prediction.tok_s:.0f}"),
    ]
    if stats is not None:
        facts += [
            (
                "read",
                f"{format_bytes(stats.bytes_read)} from the disk ({stats.io_mode}, "
                f"{stats.io_engine}), {format_bytes(stats.read_per_pass_bytes)} a token",
            ),
            ("hit rate", f"{stats.hit_rate:.0%} of the slabs were there when they were needed"),
            ("I/O wait", f"{accounting.wait_fraction(stats):.0%} of the time"),
        ]
        if stats.bound_fraction is not None:
            facts.append(("bound", f"{stats.bound_fraction:.0%} of what the disk allows"))
    compared = verification.comparison
    verdict = "identical" if compared.identical else "DIFFERENT"
    facts += [
        ("tokens", f"{'identical' if same_tokens else 'DIFFERENT'} to stock llama.cpp"),
        ("logits", f"{verdict}: {compared.n_values} compared bit by bit"),
    ]
    return facts


def _difference(verification: Verification, same_tokens: bool) -> OutputDiffers:
    first = verification.comparison.first
    what = (
        f"{first.n_different} logits of position {first.position}, by up to {first.max_abs_diff:g}"
        if first is not None
        else "tokens, but no logits"
    )
    return OutputDiffers(
        f"the streamed run differs from stock llama.cpp: {what}",
        hint="run `nexus doctor`, and report this with its output",
    )
