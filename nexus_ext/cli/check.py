"""`nexus check` and `nexus diff`: are the bytes of a model those that they should be."""

from __future__ import annotations

import click

from nexus_ext.cli.convert import Meter
from nexus_ext.cli.library import MODEL
from nexus_ext.cli.live import Live
from nexus_ext.cli.options import output_options
from nexus_ext.cli.output import Output
from nexus_ext.errors import UsageError
from nexus_ext.units import format_bytes

_MOST_LINES = 50


@click.command()
@click.argument("model", type=MODEL)
@output_options
def check(model: str, output: Output) -> int:
    """Read the NXF MODEL from its first to its last byte and report what is damaged.

    Compares the hash of every chunk, decodes it, and looks at the bytes in between. A GGUF has no
    hashes: `nexus inspect` checks its header, `nexus diff` compares it with another.

    \b
    Examples:
      nexus check model.nxf
      nexus check model.nxf --json
    """
    from nexus_ext.formats.nxf_file import is_nxf
    from nexus_ext.formats.nxf_verify import check_file
    from nexus_ext.plugins import plugins

    if not is_nxf(model):
        raise UsageError(
            f"{model}: is no NXF, and has no hashes to check",
            hint="compare it with another file by `nexus diff`",
        )
    live = Live(output)
    report = check_file(model, codecs=plugins().codecs(), progress=Meter(live))
    live.clear()
    for finding in report.findings[:_MOST_LINES]:
        output.line(finding.what)
    if len(report.findings) > _MOST_LINES:
        output.line(f"... and {len(report.findings) - _MOST_LINES} more")
    for codec in report.not_decoded:
        output.note(f"The codec {codec!r} is not installed: its chunks were not decoded.")
    output.line(
        f"{report.n_chunks} chunks, {format_bytes(report.stored_nbytes)}: "
        + (f"{len(report.findings)} damaged" if report.findings else "all good")
    )
    output.result(report)
    return 1 if report.findings else 0


@click.command()
@click.argument("a")
@click.argument("b")
@output_options
def diff(a: str, b: str, output: Output) -> int:
    """Compare the models A and B, GGUF or NXF, by what they hold.

    How an NXF stores its weights (codecs, order of records, shards) is no difference. Exit status 1
    when there is one.

    \b
    Examples:
      nexus diff model.gguf model.nxf
      nexus diff model.nxf optimized.nxf
    """
    from nexus_ext.formats.diff import diff as differences_of
    from nexus_ext.plugins import plugins

    live = Live(output)
    found = differences_of(a, b, codecs=plugins().codecs(), progress=Meter(live))
    live.clear()
    for difference in found[:_MOST_LINES]:
        output.line(f"{difference.item}: {difference.what}")
    output.line(f"{len(found)} differences" if found else "equal")
    output.result({"equal": not found, "differences": found})
    return 1 if found else 0
