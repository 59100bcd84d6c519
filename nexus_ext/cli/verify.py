"""`nexus verify`: streamed against resident, bit by bit, for the user's own model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import click

from nexus_ext.cli.library import MODEL
from nexus_ext.cli.options import PlanOptions, output_options, plan_options
from nexus_ext.cli.output import Output
from nexus_ext.errors import OutputDiffers, UsageError
from nexus_ext.units import format_bytes

if TYPE_CHECKING:
    from nexus_ext.runtime.verify import Verification


@click.command()
@click.argument("model", type=MODEL)
@plan_options
@click.option("--plan", "plan_file", metavar="FILE", help="Use this plan (`nexus plan -o`).")
@click.option("--prompt", metavar="TEXT", help="Text to evaluate, instead of arbitrary tokens.")
@click.option(
    "--prompt-tokens",
    "n_prompt",
    default=64,
    type=click.IntRange(min=1),
    metavar="N",
    help="Number of arbitrary tokens.  [default: 64]",
)
@click.option(
    "-n",
    "--decode-tokens",
    "n_decode",
    default=32,
    type=click.IntRange(min=0),
    metavar="N",
    help="Tokens decoded after the prompt.  [default: 32]",
)
@click.option("--scratch", metavar="DIR", help="Where the logits go, two files.")
@output_options
def verify(
    model: str,
    planning: PlanOptions,
    plan_file: str | None,
    prompt: str | None,
    n_prompt: int,
    n_decode: int,
    scratch: str | None,
    output: Output,
) -> None:
    """Compare MODEL streamed with MODEL resident: the logits of every position, bit by bit.

    The reference is stock llama.cpp with mmap and plain CPU buffers. Without a budget half of the
    weights are streamed. Exit status 0: identical, 1: not.

    \b
    Examples:
      nexus verify model.gguf
      nexus verify model.gguf --ram 4G --prompt "Once upon a time" -n 64
      nexus verify model.gguf --weights 500M --flash-attn --ubatch 32
    """
    from nexus_ext.formats import open_model
    from nexus_ext.runtime.verify import plan_to_verify, verify_model

    planning.check_plan_file(plan_file)
    if planning.gpu_bytes:
        raise UsageError(
            f"--gpu-mem is {planning.gpu_bytes}, but a GPU rounds differently from the CPU",
            hint="leave it out: both sides compute on the CPU",
        )
    request = replace(planning, gpu_bytes=0).request(open_model(model))
    planned = plan_to_verify(
        model,
        request,
        hardware_file=planning.hardware_file,
        plan=plan_file,
    )
    result = verify_model(
        model,
        planned,
        request,
        prompt=prompt,
        n_prompt=n_prompt,
        n_decode=n_decode,
        scratch_dir=scratch,
        note=output.note,
    )
    if result.identical:
        show(result, output)
        output.result({"identical": True, **_fields(result)})
        return
    raise OutputDiffers(sentence(result), hint="report this, with the model and the command")


def _fields(result: Verification) -> dict[str, object]:
    return {name: getattr(result, name) for name in result.__slots__}


def show(result: Verification, output: Output) -> None:
    """Write what was compared."""
    c = result.comparison
    output.line(
        f"identical: {c.n_values} logits of {c.n_positions} positions "
        f"({result.n_prompt} of prompt, {result.n_decode} decoded)"
    )
    output.line(
        f"{format_bytes(result.streamed_nbytes)} of weights streamed ({result.io_mode}), "
        f"{format_bytes(result.resident_nbytes)} resident, "
        f"{format_bytes(result.streamed_read_bytes)} read, flash attention "
        + ("on" if result.flash_attn else "off")
    )


def sentence(result: Verification) -> str:
    """Say where streamed and resident differ first, and how much in all."""
    c = result.comparison
    assert c.first is not None
    f = c.first
    return (
        f"streamed and resident logits of {result.model} differ: first in the {f.phase} at "
        f"position {f.position} (token {f.token}), where {f.n_different} of {result.n_vocab} "
        f"logits differ by up to {f.max_abs_diff:g}; in all {c.n_values_different} of "
        f"{c.n_values} logits at {c.n_positions_different} of {c.n_positions} positions, by up to "
        f"{c.max_abs_diff:g}"
    )
