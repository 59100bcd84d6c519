"""`nexus markov`: train a chain from traces, and say how good it is on another."""

from __future__ import annotations

import json
from typing import IO

import click


@click.group()
def markov() -> None:
    """Predict experts by what follows what."""


@markov.command()
@click.argument("traces", nargs=-1, required=True, type=click.File("rb"), metavar="TRACE...")
@click.option("-o", "--output", "file", required=True, metavar="FILE", help="Write the chain here.")
@click.option("--force", is_flag=True, help="Overwrite FILE.")
def train(traces: tuple[IO[bytes], ...], file: str, force: bool) -> None:
    """Count what follows what in TRACEs of one model (see `nexus trace`)."""
    from nexus_ext.routing import RoutingTrace, joined
    from nexus_predictor_markov.chain import train as train_chain

    found = joined([RoutingTrace.from_bytes(t.read(), source=t.name) for t in traces])
    chain = train_chain(found)
    size = chain.learned().write(file, overwrite=force)
    click.echo(
        f"{chain.architecture}: {len(chain.shape.layers)} layers of {chain.shape.n_experts} "
        f"experts, {chain.n_tokens} tokens; the token before counts {chain.time_weight:g}, "
        f"the layer before {chain.layer_weight:g}"
    )
    click.echo(f"The chain is in {file} ({size} bytes): export NEXUS_MARKOV={file}")


@markov.command()
@click.argument("file")
@click.argument("trace", type=click.File("rb"))
@click.option(
    "--slots", type=click.IntRange(min=1), help="Cached experts a layer.  [default: half]"
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def evaluate(file: str, trace: IO[bytes], slots: int | None, as_json: bool) -> None:
    """Say how well the chain in FILE predicts TRACE, which it must not have been trained with."""
    from nexus_ext.routing import RoutingTrace, compare, rank_previous
    from nexus_predictor_markov.chain import Chain

    chain = Chain.read(file)
    found = RoutingTrace.from_bytes(trace.read(), source=trace.name)
    rankings = {
        "markov": chain.rank(found),
        "popular": chain.rank_popular(found.n_tokens),
        "previous": rank_previous(found),
    }
    compared = compare(found, rankings, slots)
    click.echo(json.dumps(compared.to_dict()) if as_json else "\n".join(compared.lines()))
