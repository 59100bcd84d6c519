"""`nexus probe`: what this machine can do, measured."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from nexus_ext.cli.options import Finite, output_options, save
from nexus_ext.cli.output import Output
from nexus_ext.units import format_bytes

if TYPE_CHECKING:
    from nexus_ext.hardware import HardwareProfile


@click.command()
@click.argument("path", default=".")
@click.option("--refresh", is_flag=True, help="Measure again, whatever was measured before.")
@click.option(
    "--seconds",
    type=Finite(min=0.1, max=3600.0),
    default=8.0,
    metavar="S",
    help="Time for reading the disk.  [default: 8]",
)
@click.option("-o", "--output", "file", metavar="FILE", help="Write the profile, for --hardware.")
@output_options
def probe(path: str, refresh: bool, seconds: float, file: str | None, output: Output) -> None:
    """Measure processor, memory, GPUs, and the disk that holds PATH (a model or a directory).

    Bandwidths are measured once and remembered for a month. In a directory, or beside a small
    file, a scratch file of up to 1 GiB is written and removed.

    \b
    Examples:
      nexus probe model.gguf
      nexus probe /mnt/nvme --refresh
      nexus probe model.gguf -o laptop.json
    """
    from nexus_ext.runtime import hardware_profile

    profile = hardware_profile(path, refresh=refresh, disk_seconds=seconds)
    text = profile.to_json()
    if file is not None:
        save(file, text, "the profile")
    output.result(json.loads(text))  # with its version: what --hardware reads
    show_profile(output, profile)


def show_profile(output: Output, profile: HardwareProfile) -> None:
    """Write a profile for people."""
    cpu, memory, disk = profile.cpu, profile.memory, profile.disk
    facts = [
        ("processor", f"{cpu.name}, {cpu.n_usable_cores} cores, {cpu.n_threads} threads"),
        ("instructions", " ".join(cpu.isa) or "-"),
        (
            "memory",
            f"{format_bytes(memory.available_bytes)} free of "
            f"{format_bytes(memory.usable_bytes)}, {format_bytes(memory.bandwidth_bytes_s)}/s",
        ),
    ]
    if memory.limit_bytes is not None:
        limit = f"{format_bytes(memory.limit_bytes)} ({memory.limit_source})"
        facts.append(("memory limit", limit))
    for gpu in profile.gpus:
        kind = ", shares main memory" if gpu.unified else ""
        facts.append(("GPU", f"{gpu.name}, {format_bytes(gpu.total_bytes)}{kind}"))
    how = "direct reads" if disk.direct else f"buffered reads ({disk.direct_reason})"
    facts += [
        ("disk", f"{disk.device}, {disk.filesystem}, {how}, {disk.engine}"),
        ("at best", f"{format_bytes(disk.sequential_bytes_s)}/s"),
        ("how cold", disk.how_cold),
    ]
    output.facts(facts)
    output.heading("Disk")
    output.table(
        ("pattern", ">block", ">in flight", ">rate"),
        [
            (
                point.pattern,
                format_bytes(point.block_bytes),
                str(point.depth),
                f"{format_bytes(point.bytes_s)}/s",
            )
            for point in disk.points
        ],
    )
