"""Why experts are predicted or not, in words."""

from __future__ import annotations

from nexus_ext.core import Prediction


def describe(prediction: Prediction) -> str:
    """Return one sentence for the state of the controller (native/predict_control.c)."""
    p = prediction
    tried = f"a token took {p.on_s * 1e3:.1f} ms with it and {p.off_s * 1e3:.1f} ms without"
    return {
        "fixed": "on, as it was asked for" if p.on else "off, as it was asked for",
        "watching": "off: measuring what there is to gain",
        "no_stall": f"off: computing waits for the disk {p.stall:.0%} of the time",
        "no_idle": f"off: the disk has nothing to do {p.idle:.0%} of the time",
        "trying": f"{'on' if p.on else 'off'}: being compared (the disk is idle {p.idle:.0%})",
        "slower": f"off: {tried}",
        "faster": f"on: {tried}",
    }[p.state]
