"""A thread that tells plugins what happened, where a slow one would hold up everybody.

What is told keeps its order. What does not fit in the queue is dropped and counted: a plugin that
falls behind loses events and costs no memory.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from typing import Final

MOST_WAITING: Final = 1000

_log = logging.getLogger("nexus_ext.plugins")


class Background:
    """One daemon thread and its queue."""

    def __init__(self, most: int = MOST_WAITING) -> None:
        self._queue: queue.Queue[Callable[[], None]] = queue.Queue(most)
        self.dropped = 0
        threading.Thread(target=self._run, name="nexus-plugins", daemon=True).start()

    def add(self, tell: Callable[[], None]) -> None:
        """Have `tell` called; it must not raise."""
        try:
            self._queue.put_nowait(tell)
        except queue.Full:
            self.dropped += 1
            if self.dropped == 1:
                _log.warning("plugins fall behind: events are dropped from now on")

    def wait(self, seconds: float) -> bool:
        """Wait until everything is told that was added before; False when that takes too long."""
        done = threading.Event()
        try:
            self._queue.put(done.set, timeout=seconds)
        except queue.Full:
            return False
        return done.wait(seconds)

    def _run(self) -> None:
        while True:
            tell = self._queue.get()
            try:
                tell()
            except Exception:  # no plugin may end the thread that tells the others
                _log.exception("telling a plugin")
