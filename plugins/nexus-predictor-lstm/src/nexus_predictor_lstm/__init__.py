"""An LSTM that predicts experts from those of past tokens, trained from traces, for nexus_ext.

    nexus trace model.gguf -o model.nxtrace --prompt-file text.txt
    nexus lstm train model.nxtrace -o model.nxlstm
    NEXUS_LSTM=model.nxlstm nexus run model.gguf "Once upon a time" --ram 4G

Without NEXUS_LSTM the built-in predictor stays in charge.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from nexus_ext.hooks import hookimpl

if TYPE_CHECKING:
    import click

    from nexus_ext.hooks import ExpertPredictor

nexus_plugin_api = 1
FILE_VARIABLE = "NEXUS_LSTM"


@hookimpl
def nexus_expert_predictor() -> ExpertPredictor | None:
    """Predict by the network that NEXUS_LSTM names."""
    file = os.environ.get(FILE_VARIABLE)
    if not file:
        return None
    from nexus_predictor_lstm.follower import LstmPredictor
    from nexus_predictor_lstm.train import Lstm

    return LstmPredictor(Lstm.read(file))


@hookimpl
def nexus_register_commands(cli: click.Group) -> None:
    """Add `nexus lstm`."""
    from nexus_predictor_lstm.commands import lstm

    cli.add_command(lstm)
