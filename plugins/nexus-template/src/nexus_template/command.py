"""`nexus template MODEL`: what a model is made of."""

from __future__ import annotations

import json

import click


@click.command("template")
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(model: str, as_json: bool) -> None:
    """Show how many bytes the tensors of MODEL have, by what they do."""
    from nexus_ext.formats import open_model

    sizes: dict[str, int] = {}
    for tensor in open_model(model).tensors:
        sizes[tensor.role.value] = sizes.get(tensor.role.value, 0) + tensor.nbytes
    if as_json:
        click.echo(json.dumps(sizes))
        return
    for role, nbytes in sorted(sizes.items(), key=lambda item: -item[1]):
        click.echo(f"{nbytes:>14,}  {role}")
