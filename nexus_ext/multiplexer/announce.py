"""Tells plugins which models come and go, from a thread of their own: nobody waits for a plugin."""

from __future__ import annotations

from nexus_ext.multiplexer.entry import Entry
from nexus_ext.plugins import plugins
from nexus_ext.policies import ModelInfo


def tell_loaded(entry: Entry) -> None:
    """Tell that a model is ready."""
    if plugins().watched("nexus_model_loaded"):
        info = _info(entry)
        plugins().later(lambda: plugins().model_loaded(info))


def tell_closed(entry: Entry) -> None:
    """Tell that a model was unloaded."""
    if plugins().watched("nexus_model_closed"):
        info = _info(entry)
        plugins().later(lambda: plugins().model_closed(info))


def _info(entry: Entry) -> ModelInfo:
    catalog, resident = entry.plan.catalog, sum(entry.units[: entry.resident])
    return ModelInfo(
        path=entry.spec.path,
        fingerprint=catalog.fingerprint,
        architecture=catalog.shape.architecture,
        resident_bytes=entry.plan.sizes.permanent + resident,
        # Of experts a token uses a few: at most so much.
        streamed_bytes_per_token=sum(entry.units) - resident,
        io_mode=None,  # which it is changes with what is resident
    )
