"""The built-in predictor: the next layer's gate, while it is measured to help, for every model."""

from __future__ import annotations

from nexus_ext.hookspecs import hookimpl
from nexus_ext.policies.base import CacheInfo, ExpertPredictor, PredictorName


class MeasuredGate:
    """The controller of native/predict_control.c, whatever the model."""

    name = "measured-gate"

    def choose(self, info: CacheInfo) -> PredictorName:
        return "auto"


@hookimpl
def nexus_expert_predictor() -> ExpertPredictor:
    return MeasuredGate()
