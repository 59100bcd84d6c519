"""`nexus export`: tensors of a model as safetensors, for a look at them with other tools."""

from __future__ import annotations

from dataclasses import asdict

import click

from nexus_ext.cli.convert import Meter
from nexus_ext.cli.library import MODEL
from nexus_ext.cli.live import Live
from nexus_ext.cli.options import output_options
from nexus_ext.cli.output import Output
from nexus_ext.units import format_bytes


@click.command()
@click.argument("model", type=MODEL)
@click.argument("target")
@click.option(
    "--tensors",
    "pattern",
    default="",
    metavar="REGEX",
    help="Only tensors in whose names the expression is found.  [default: all]",
)
@click.option("--force", "overwrite", is_flag=True, help="Overwrite what is at TARGET.")
@output_options
def export(model: str, target: str, pattern: str, overwrite: bool, output: Output) -> None:
    """Write tensors of MODEL (GGUF or NXF) to the safetensors file TARGET.

    Weights are dequantized to float32. Names are those of GGUF, shapes those of PyTorch.

    \b
    Examples:
      nexus export model.gguf layer0.safetensors --tensors "^blk\\.0\\."
      nexus export model.nxf routers.safetensors --tensors ffn_gate_inp
    """
    from nexus_ext.formats.export import export_tensors
    from nexus_ext.plugins import plugins

    live = Live(output)
    tensors = export_tensors(
        model,
        target,
        pattern,
        overwrite=overwrite,
        codecs=plugins().codecs(),
        progress=Meter(live),
    )
    live.clear()
    nbytes = sum(tensor.nbytes for tensor in tensors)
    output.result({"path": target, "tensors": [asdict(tensor) for tensor in tensors]})
    output.table(
        ("name", "shape", "stored", "written", ">bytes"),
        [
            (t.name, " x ".join(map(str, t.shape)), t.stored, t.written, format_bytes(t.nbytes))
            for t in tensors
        ],
    )
    output.line(f"{len(tensors)} tensors, {format_bytes(nbytes)}, in {target}")
