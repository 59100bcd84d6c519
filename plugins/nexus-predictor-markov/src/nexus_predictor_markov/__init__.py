"""First-order prediction of experts, trained from traces, for nexus_ext.

    nexus trace model.gguf -o model.nxtrace --prompt-file text.txt
    nexus markov train model.nxtrace -o model.nxmarkov
    NEXUS_MARKOV=model.nxmarkov nexus run model.gguf "Once upon a time" --ram 4G

Without NEXUS_MARKOV the built-in predictor stays in charge.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from nexus_ext.hooks import hookimpl

if TYPE_CHECKING:
    import click

    from nexus_ext.hooks import ExpertPredictor

nexus_plugin_api = 1
FILE_VARIABLE = "NEXUS_MARKOV"


@hookimpl
def nexus_expert_predictor() -> ExpertPredictor | None:
    """Predict by the chain that NEXUS_MARKOV names."""
    file = os.environ.get(FILE_VARIABLE)
    if not file:
        return None
    from nexus_predictor_markov.chain import Chain
    from nexus_predictor_markov.follower import MarkovPredictor

    return MarkovPredictor(Chain.read(file))


@hookimpl
def nexus_register_commands(cli: click.Group) -> None:
    """Add `nexus markov`."""
    from nexus_predictor_markov.commands import markov

    cli.add_command(markov)
