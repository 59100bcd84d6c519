"""Tells plugins of the server's requests, from another thread: a slow one holds up nobody."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field

from nexus_ext.errors import NexusError
from nexus_ext.multiplexer.api import Done, GenerateRequest
from nexus_ext.plugin_registry import describe
from nexus_ext.plugins import plugins
from nexus_ext.policies import ModelInfo, Outcome, RequestInfo, RequestStart
from nexus_ext.server.describe import catalog_of
from nexus_ext.server.service import Service

_numbers = itertools.count(1)


@dataclass(slots=True)
class Lifecycle:
    """One request, from its start to its end."""

    service: Service
    request: GenerateRequest
    id: str = field(default_factory=lambda: f"server-{next(_numbers)}")
    started_unix_ns: int = field(default_factory=time.time_ns)

    def start(self) -> None:
        info = RequestStart(
            id=self.id,
            interface="server",
            model=self.request.model,
            n_prompt_tokens=len(self.request.prompt),
            started_unix_ns=self.started_unix_ns,
        )
        if plugins().watched("nexus_request_started"):
            plugins().later(lambda: plugins().request_started(info))

    def end(self, done: Done | None, error: BaseException | None) -> None:
        """Tell that it has ended: with its last event, with an error, or (neither) cancelled."""
        if not plugins().watched("nexus_request_done"):
            return
        ended_unix_ns = time.time_ns()
        outcome: Outcome = "cancelled"
        if isinstance(error, Exception):
            outcome = "error"
        elif done is not None and done.reason != "abort":
            outcome = done.reason

        def tell() -> None:
            info = RequestInfo(
                model=self._model(),
                n_prompt_tokens=len(self.request.prompt),
                n_tokens=done.n_tokens if done else 0,
                prefill_ns=done.prefill_ns if done else 0,
                decode_ns=done.decode_ns if done else 0,
                read_bytes=0,
                id=self.id,
                interface="server",
                model_name=self.request.model,
                outcome=outcome,
                error=describe(error) if isinstance(error, Exception) else "",
                n_cached_tokens=done.n_cached_tokens if done else 0,
                queue_ns=done.queue_ns if done else 0,
                load_ns=done.load_ns if done else 0,
                started_unix_ns=self.started_unix_ns,
                ended_unix_ns=ended_unix_ns,
            )
            plugins().request_done(info)

        plugins().later(tell)

    def _model(self) -> ModelInfo:
        """Describe the model by its header; by its name alone when it is gone by now."""
        name = self.request.model
        try:
            stored = self.service.library.find(name)
            catalog = catalog_of(stored)
        except (NexusError, OSError):
            return ModelInfo(name, "", "", 0, 0, None)
        held = next((s for s in self.service.engine.status() if s.name == name), None)
        resident = held.resident_bytes if held else 0
        return ModelInfo(
            path=stored.path,
            fingerprint=catalog.fingerprint,
            architecture=catalog.shape.architecture,
            resident_bytes=resident,
            streamed_bytes_per_token=0 if held and held.tier == "resident" else catalog.nbytes,
            io_mode=None,
        )
