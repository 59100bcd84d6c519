"""`nexus replay`: what caches of experts would have hit on a recorded trace."""

from __future__ import annotations

import importlib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from nexus_ext.cli.options import SIZE, Finite, output_options
from nexus_ext.cli.output import Output
from nexus_ext.errors import UsageError
from nexus_ext.units import format_bytes

if TYPE_CHECKING:
    from nexus_ext.routing import RoutingTrace, Row


@click.command()
@click.argument("trace")
@click.option("--cache", "cache_bytes", type=SIZE, metavar="SIZE", help="Memory for all records.")
@click.option("--share", metavar="PERCENT", help="Part of the experts that has a slot, as 25%.")
@click.option(
    "--policy",
    "policy_names",
    default="all",
    metavar="NAMES",
    help="Policies, with commas between, or all.  [default: all]",
)
@click.option("--plot", "plot_file", metavar="FILE", help="Draw hits against cache size (.png).")
@click.option(
    "--disk",
    "disk_bytes_s",
    type=SIZE,
    metavar="SIZE",
    help="Bytes a second that the disk reads.  [default: where the trace was recorded]",
)
@click.option(
    "--compute",
    "compute_ms",
    type=Finite(min=0),
    metavar="MS",
    help="Milliseconds to compute a token.  [default: as predicted for the recording]",
)
@output_options
def replay(
    trace: str,
    cache_bytes: int | None,
    share: str | None,
    policy_names: str,
    plot_file: str | None,
    disk_bytes_s: int | None,
    compute_ms: float | None,
    output: Output,
) -> None:
    """Replay TRACE through caches: hits of each policy beside the optimum, and the speed.

    Without --cache or --share, for sizes from one token's experts to all of them. "belady" knows
    the future: no policy can hit more. "none" has no cache; "global-lru" is one cache for all
    layers, which is not what NEXUS has.

    \b
    Examples:
      nexus replay model.nxtrace
      nexus replay model.nxtrace --cache 2G --policy all
      nexus replay model.nxtrace --share 25% --policy adaptive,lru,global-lru --disk 3G --compute 20
      nexus replay model.nxtrace --plot hits.png
    """
    from nexus_ext.native_plugins import replay_builtin
    from nexus_ext.routing import RoutingTrace, default_sizes, report, slots_of, slots_of_share

    policies = _policies(policy_names)
    if cache_bytes is not None and share is not None:
        raise UsageError("--cache and --share both name a size", hint="leave out one of them")
    part = None if share is None else _share(share)
    if plot_file is not None:
        _matplotlib()  # before minutes of work
    found = RoutingTrace.from_bytes(_read(trace), source=trace)
    if cache_bytes is not None:
        sizes = [slots_of(found, cache_bytes)]
    elif part is not None:
        sizes = [slots_of_share(found, part)]
    else:
        sizes = default_sizes(found)
    disk = found.disk_bytes_s if disk_bytes_s is None else float(disk_bytes_s)
    compute_s = found.compute_s if compute_ms is None else compute_ms / 1e3
    rows = report(
        found, policies, sizes, disk_bytes_s=disk, compute_s=compute_s, by_code=replay_builtin
    )
    _show(output, trace, found, rows, disk, compute_s)
    if plot_file is not None:
        # A curve needs more than the one size that was asked for.
        drawn = (
            rows
            if len(sizes) > 1
            else report(found, policies, default_sizes(found), by_code=replay_builtin)
        )
        plot(drawn, plot_file, f"{found.architecture}, {found.n_tokens} tokens")
        output.note(f"The plot is in {plot_file}.")
    output.result(
        {
            "trace": trace,
            "fingerprint": found.fingerprint,
            "architecture": found.architecture,
            "n_tokens": found.n_tokens,
            "token_bytes": found.token_bytes,
            "expert_bytes": found.expert_bytes,
            "disk_bytes_s": disk or None,
            "compute_s": compute_s,
            "rows": [asdict(row) for row in rows],
        }
    )


def _policies(text: str) -> list[str]:
    from nexus_ext.routing import BELADY, GLOBAL_LRU, NONE, ONLINE

    known = [*ONLINE, BELADY, NONE, GLOBAL_LRU]
    if text == "all":
        return [*ONLINE, BELADY, NONE]
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in known:
            raise UsageError(
                f"--policy names {name!r}, which is not a policy",
                hint=f"policies are {', '.join(known)}",
            )
    return names


def _share(text: str) -> float:
    try:
        value = float(text.removesuffix("%")) / (100.0 if text.endswith("%") else 1.0)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise UsageError(
            f"--share is {text!r}, which is not a part of the whole",
            hint="write 25% or 0.25",
        )
    return value


def _read(trace: str) -> bytes:
    try:
        return Path(trace).read_bytes()
    except OSError as error:
        raise UsageError(
            f"the trace {trace!r} cannot be read: {error.strerror}",
            hint="record one with `nexus trace MODEL -o FILE --prompt-file TEXT`",
        ) from error


def _show(
    output: Output,
    name: str,
    trace: RoutingTrace,
    rows: list[Row],
    disk_bytes_s: float,
    compute_s: float,
) -> None:
    output.line(
        f"{name}: {trace.architecture}, {trace.n_tokens} tokens, {len(trace.layers)} layers; a "
        f"token uses {format_bytes(trace.token_bytes)} of {format_bytes(trace.expert_bytes)} "
        "of experts"
    )
    if disk_bytes_s:
        output.line(
            f"speed at {format_bytes(disk_bytes_s)}/s and {compute_s * 1e3:.2f} ms of computing "
            "a token"
        )
    columns = ("slots", ">share", ">cache", "policy", ">hits", ">to Belady", ">read/token")
    output.table(
        tuple(f">{title}" if title == "slots" else title for title in (*columns, ">tok/s")),
        [
            (
                str(row.slots),
                f"{row.share:.0%}",
                format_bytes(row.cache_bytes),
                row.policy,
                f"{row.hit_rate:.1%}",
                f"{100 * row.below_belady:.1f}",
                format_bytes(row.bytes_per_token),
                "-" if row.tok_s is None else f"{row.tok_s:.2f}",
            )
            for row in rows
        ],
    )


def _matplotlib() -> Any:
    try:
        matplotlib = importlib.import_module("matplotlib")
        matplotlib.use("Agg")  # files only, no window
        return importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise UsageError(
            "--plot needs matplotlib, which is not installed",
            hint='install it with: pip install "nexus_ext[plot]"',
        ) from error


def plot(rows: list[Row], file: str, title: str) -> None:
    """Draw hit rate against cache size, a line for each policy."""
    pyplot = _matplotlib()
    figure, axes = pyplot.subplots(figsize=(8, 5))
    for policy in dict.fromkeys(row.policy for row in rows):
        points = [(row.cache_bytes / 2**20, row.hit_rate) for row in rows if row.policy == policy]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=policy)
    axes.set(xlabel="cache, MiB", ylabel="hit rate", ylim=(0, 1), title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    try:
        figure.savefig(file)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"the plot cannot be written to {file!r}: {error}",
            hint="name a .png, .svg or .pdf file in a directory that can be written",
        ) from error
    finally:
        pyplot.close(figure)
