"""The thread that opens models and reads weights back, beside the one that computes."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from nexus_ext import core
from nexus_ext.errors import ModelClosed
from nexus_ext.multiplexer.entry import Entry
from nexus_ext.multiplexer.runner import Runner
from nexus_ext.multiplexer.sessions import SessionStore
from nexus_ext.runtime.elastic import ElasticModel


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it. A runner with an error has what was read before the error."""

    runner: Runner | None
    nbytes: int  # of units that were read
    open_ns: int
    read_ns: int
    error: Exception | None


class Loader:
    """One piece of work at a time, each with a flag that stops it."""

    def __init__(self, sessions: SessionStore, post: Callable[[Callable[[], None]], None]) -> None:
        self._sessions = sessions
        self._post = post
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="nexus-load")
        self._n = 0  # touched by the scheduler's thread only

    @property
    def busy(self) -> bool:
        return self._n > 0

    def start(self, entry: Entry, done: Callable[[Entry, Outcome], None]) -> core.StopFlag:
        """Open a model where it is not open, and read its units up to `entry.resident`.

        `done` is called in the scheduler's thread. Returns the flag that stops it.
        """
        stop = core.StopFlag()
        runner, resident = entry.runner, entry.resident
        self._n += 1

        def work() -> None:
            outcome = self._work(entry, runner, resident, stop)

            def tell() -> None:
                self._n -= 1
                done(entry, outcome)

            self._post(tell)

        self._pool.submit(work)
        return stop

    def _work(
        self, entry: Entry, runner: Runner | None, resident: int, stop: core.StopFlag
    ) -> Outcome:
        begin = time.monotonic_ns()
        opened, nbytes, error = begin, 0, None
        try:
            if runner is None:
                runner = self._open(entry)
                opened = time.monotonic_ns()
            before = sum(entry.units[: runner.model.resident])
            entry.progress = _progress(runner.model.core, sum(entry.units[:resident]) - before)
            try:
                runner.model.set_resident(resident, stop)
                if opened != begin:
                    runner.model.warm()
            finally:
                nbytes = sum(entry.units[: runner.model.resident]) - before
        except Exception as caught:  # the scheduler decides what it means
            error = caught
        return Outcome(runner, nbytes, opened - begin, time.monotonic_ns() - opened, error)

    def _open(self, entry: Entry) -> Runner:
        model = ElasticModel(entry.plan)
        try:
            return Runner(model, self._sessions)
        except BaseException:
            model.close()
            raise

    def close(self, running: list[core.StopFlag]) -> None:
        """Stop what runs, and wait for it."""
        for stop in running:
            stop.set()
        self._pool.shutdown()


def _progress(model: core.Model, nbytes: int) -> Callable[[], float]:
    """Return a function that says how much of `nbytes` has been read since now."""
    begin = model.stats().bytes_loaded

    def done() -> float:
        try:
            read = model.stats().bytes_loaded - begin
        except ModelClosed:  # in this moment
            return 0.0
        return min(1.0, read / nbytes) if nbytes > 0 else 1.0

    return done
