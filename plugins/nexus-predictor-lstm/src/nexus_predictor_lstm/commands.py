"""`nexus lstm`: train a network from traces, and say how good it is on another."""

from __future__ import annotations

import json
from typing import IO

import click


@click.group()
def lstm() -> None:
    """Predict experts by an LSTM over those of past tokens."""


@lstm.command()
@click.argument("traces", nargs=-1, required=True, type=click.File("rb"), metavar="TRACE...")
@click.option(
    "-o", "--output", "file", required=True, metavar="FILE", help="Write the network here."
)
@click.option("--hidden", default=128, show_default=True, type=click.IntRange(1, 4096))
@click.option("--epochs", default=10, show_default=True, type=click.IntRange(1))
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@click.option(
    "--past-only",
    is_flag=True,
    help="Do not look at what the token has used one layer earlier.",
)
@click.option("--force", is_flag=True, help="Overwrite FILE.")
def train(
    traces: tuple[IO[bytes], ...],
    file: str,
    hidden: int,
    epochs: int,
    seed: int,
    past_only: bool,
    force: bool,
) -> None:
    """Train with TRACEs of one model (see `nexus trace`): minutes for some ten thousand tokens."""
    from nexus_ext.routing import RoutingTrace, joined
    from nexus_predictor_lstm.train import Settings
    from nexus_predictor_lstm.train import train as train_network

    found = joined([RoutingTrace.from_bytes(t.read(), source=t.name) for t in traces])
    settings = Settings(n_hidden=hidden, n_epochs=epochs, seed=seed, use_above=not past_only)
    network = train_network(
        found,
        settings,
        lambda epoch, loss, slots: click.echo(
            f"epoch {epoch + 1}: loss {loss:.3f} nats a layer, {slots:.1%} of slots right"
        ),
    )
    size = network.learned().write(file, overwrite=force)
    click.echo(f"The network is in {file} ({size} bytes): export NEXUS_LSTM={file}")


@lstm.command()
@click.argument("file")
@click.argument("trace", type=click.File("rb"))
@click.option(
    "--slots", type=click.IntRange(min=1), help="Cached experts a layer.  [default: half]"
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def evaluate(file: str, trace: IO[bytes], slots: int | None, as_json: bool) -> None:
    """Say how well the network in FILE predicts TRACE, which it must not have been trained with."""
    from nexus_ext.routing import RoutingTrace, compare, rank_previous
    from nexus_predictor_lstm.train import Lstm

    network = Lstm.read(file)
    found = RoutingTrace.from_bytes(trace.read(), source=trace.name)
    rankings = {"lstm": network.rank(found), "previous": rank_previous(found)}
    compared = compare(found, rankings, slots)
    click.echo(json.dumps(compared.to_dict()) if as_json else "\n".join(compared.lines()))
