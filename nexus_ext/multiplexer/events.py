"""What the multiplexer did, one readable line an event."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from nexus_ext.units import format_bytes

Kind = Literal["load", "unload", "evict", "restore", "save", "resume", "fail", "wait"]

_log = logging.getLogger("nexus_ext.multiplexer")


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened to one model."""

    t_ns: int  # of time.monotonic_ns
    kind: Kind
    model: str
    nbytes: int  # that came or went
    ns: int  # that it took
    why: str  # a sentence without its full stop

    def __str__(self) -> str:
        return (
            f"{self.kind:<7} {self.model}  {format_bytes(self.nbytes)} in {self.ns / 1000:,.0f} us"
            f"  {self.why}"
        )


class EventLog:
    """Keeps the newest events, logs each, and tells listeners."""

    def __init__(self, keep: int = 4096) -> None:
        self._events: deque[Event] = deque(maxlen=keep)
        self._listeners: list[Callable[[Event], None]] = []
        self._lock = threading.Lock()

    def add(self, kind: Kind, model: str, why: str, *, nbytes: int = 0, ns: int = 0) -> None:
        event = Event(time.monotonic_ns(), kind, model, nbytes, ns, why)
        with self._lock:
            self._events.append(event)
            listeners = list(self._listeners)
        _log.info("%s", event)
        for listener in listeners:
            listener(event)

    def listen(self, listener: Callable[[Event], None]) -> None:
        """Call `listener` for each event from now on, in the thread where it happens."""
        with self._lock:
            self._listeners.append(listener)

    def events(self) -> list[Event]:
        """Return the events that are kept, oldest first."""
        with self._lock:
            return list(self._events)
