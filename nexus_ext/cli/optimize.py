"""`nexus optimize`: store a model anew, as its use and this machine's disk and cores want it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from nexus_ext.cli.convert import Meter
from nexus_ext.cli.live import Live
from nexus_ext.cli.options import SIZE, output_options
from nexus_ext.cli.output import Output
from nexus_ext.errors import OutputDiffers, UsageError
from nexus_ext.units import format_bytes

if TYPE_CHECKING:
    from nexus_ext.codecs import Codecs
    from nexus_ext.formats.nxf_choose import Choice
    from nexus_ext.formats.sources import Source
    from nexus_ext.routing import RoutingTrace

KEEP: Final = "keep"
AUTO: Final = "auto"


@click.command()
@click.argument("source")
@click.argument("target")
@click.option(
    "--trace",
    "trace_file",
    metavar="FILE",
    help="Order the records of experts by what this trace says (`nexus trace`).",
)
@click.option(
    "--codec",
    default=AUTO,
    metavar="NAME",
    help="auto: what is measured to pay on this disk; keep: as they are; or the name of a codec.  "
    "[default: auto]",
)
@click.option(
    "--disk",
    "disk_bytes_s",
    type=SIZE,
    metavar="SIZE",
    help="Bytes a second that the disk reads.  [default: measured where SOURCE is]",
)
@click.option("--force", "overwrite", is_flag=True, help="Overwrite what is at TARGET.")
@output_options
def optimize(
    source: str,
    target: str,
    trace_file: str | None,
    codec: str,
    disk_bytes_s: int | None,
    overwrite: bool,
    output: Output,
) -> None:
    """Store the model SOURCE (NXF or GGUF) as the NXF TARGET, laid out for its use.

    With --trace, experts that are used often and together lie together. The codec of each type is
    chosen by its ratio and decode rate, measured on samples, and the rate of the disk. What TARGET
    holds is compared with SOURCE, byte by byte.

    \b
    Examples:
      nexus optimize model.nxf fast.nxf --trace model.nxtrace
      nexus optimize model.nxf small.nxf --codec ans
    """
    from nexus_ext.formats.diff import diff
    from nexus_ext.formats.nxf_convert import to_nxf
    from nexus_ext.formats.nxf_layout import Rules
    from nexus_ext.formats.sources import open_source
    from nexus_ext.plugins import plugins

    if Path(target).exists() and Path(target).samefile(source):
        raise UsageError(
            f"{target}: is the model itself",
            hint="name another file: the result is compared with what it was made of",
        )
    codecs = plugins().codecs()
    live = Live(output)
    opened = open_source(source, codecs)
    try:
        orders = _orders(opened, trace_file)
        named, choices = _codecs(opened, codecs, codec, disk_bytes_s)
        report = to_nxf(
            opened,
            target,
            rules=Rules(default="raw", named=named),
            order=lambda layer, count: orders.get(layer, (range(count), 0.0, 0.0))[0],
            overwrite=overwrite,
            codecs=codecs,
            progress=Meter(live),
        )
    finally:
        opened.close()
    found = diff(source, target, codecs=codecs, progress=Meter(live))
    live.clear()
    if found:
        raise OutputDiffers(
            f"{target}: {found[0].item}: {found[0].what}", hint="this is a bug: report it"
        )
    _show(output, choices, orders)
    output.line(f"{format_bytes(report.file_nbytes)}, contents equal to {source}")
    output.result(
        {
            "paths": report.paths,
            "file_bytes": report.file_nbytes,
            "equal": True,
            "codecs": choices,
            "layers": [
                {"layer": layer, "runs_before": before, "runs_after": after}
                for layer, (_, before, after) in orders.items()
            ],
        }
    )


_Orders = dict[int, tuple[tuple[int, ...] | range, float, float]]


def _orders(source: Source, trace_file: str | None) -> _Orders:
    """Return layer -> (order of records, runs a token before and after)."""
    if trace_file is None:
        return {}
    from nexus_ext.routing import RoutingTrace
    from nexus_ext.routing.order import record_order, runs_per_token

    try:
        data = Path(trace_file).read_bytes()
    except OSError as error:
        raise UsageError(f"{trace_file}: cannot be read: {error.strerror}") from error
    trace: RoutingTrace = RoutingTrace.from_bytes(data, source=trace_file)
    if trace.fingerprint != source.catalog.fingerprint:
        raise UsageError(
            f"{trace_file}: is of the model {trace.fingerprint}, {source.path} is "
            f"{source.catalog.fingerprint}",
            hint="record one with `nexus trace`",
        )
    orders: _Orders = {}
    for layer in trace.layers:
        order = record_order(layer)
        plain = tuple(range(layer.n_experts))
        orders[layer.layer] = (order, runs_per_token(layer, plain), runs_per_token(layer, order))
    return orders


def _codecs(
    source: Source, codecs: Codecs, codec: str, disk_bytes_s: int | None
) -> tuple[Mapping[str, str], tuple[Choice, ...]]:
    from nexus_ext.formats.nxf_choose import choose_codecs

    if codec == KEEP:
        return source.codecs_by_tensor(), ()
    if codec != AUTO:
        return {tensor.name: codec for tensor in source.catalog.tensors}, ()
    if disk_bytes_s is None:
        from nexus_ext.runtime import hardware_profile

        rate = hardware_profile(source.path).disk.sequential_bytes_s
    else:
        rate = float(disk_bytes_s)
    if rate <= 0:
        raise UsageError("the disk was not measured", hint="say how fast it reads: --disk 2G")
    return choose_codecs(source, codecs, "ans", rate)


def _show(output: Output, choices: tuple[Choice, ...], orders: _Orders) -> None:
    if choices:
        output.table(
            ("type", ">ratio", ">decodes", ">arrives", "codec"),
            [
                (
                    choice.type_name,
                    f"{choice.ratio:.3f}",
                    f"{format_bytes(choice.decode_bytes_s)}/s",
                    f"{format_bytes(choice.arrives_bytes_s)}/s",
                    choice.codec,
                )
                for choice in choices
            ],
        )
    if orders:
        before = sum(item[1] for item in orders.values()) / len(orders)
        after = sum(item[2] for item in orders.values()) / len(orders)
        output.line(
            f"{len(orders)} layers ordered: the experts of a token are in {after:.2f} runs of "
            f"records, {before:.2f} by number"
        )
