"""The thread that owns all contexts: it takes requests, gives out memory, and computes in turns.

One graph runs at a time, whichever model it belongs to: two would only fight for the same cores. So
nothing here needs a lock but the list of commands and the list of what is being computed. Opening
models and reading weights back happens beside it, in the loader's thread.

Between two steps the loop asks: whose keep-alive or deadline has passed, which model needs memory
(`Keeper`), which requests can join a batch. Then the model that had the least of the processor's
time computes one step.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from nexus_ext.errors import DoesNotFit, Interrupted, ModelClosed, NexusError
from nexus_ext.multiplexer import deciding
from nexus_ext.multiplexer.api import Overloaded
from nexus_ext.multiplexer.embedding import EmbedJob, embed, embed_bytes
from nexus_ext.multiplexer.entry import Entry
from nexus_ext.multiplexer.events import EventLog
from nexus_ext.multiplexer.fairness import FairClock
from nexus_ext.multiplexer.job import Job
from nexus_ext.multiplexer.keeper import Keeper
from nexus_ext.multiplexer.settings import Settings
from nexus_ext.runtime.batch import BatchContext
from nexus_ext.units import format_bytes

_log = logging.getLogger("nexus_ext.multiplexer")

_LONGEST_WAIT_S = 0.5  # between two looks at deadlines


class Scheduler:
    """Runs the models of `entries`. Public methods may be called from any thread."""

    def __init__(self, settings: Settings, log: EventLog) -> None:
        self.settings = settings
        self.keeper = Keeper(settings, log, self.post, self._loaded)
        self.entries = self.keeper.entries
        self._wake = threading.Condition()
        self._commands: list[Callable[[], None]] = []
        self._queued = 0  # requests that are not admitted yet; guarded by _wake
        self._computing: tuple[BatchContext, list[Job]] | None = None  # guarded by _wake
        self._closing = False
        self._clock = FairClock()
        self._n_replaced = 0
        self._job_s = 1.0  # how long a request takes, smoothed
        self._thread = threading.Thread(target=self._run, name="nexus-multiplexer", daemon=True)
        self._thread.start()

    # -- from any thread ------------------------------------------------------------------------

    def post(self, command: Callable[[], None]) -> None:
        """Let the scheduler's thread run `command` between two steps."""
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    def submit(self, entry: Entry, job: Job) -> None:
        """Queue a request. Raises Overloaded when the queue is full, ModelClosed at the end."""
        with self._wake:
            if self._closing:
                raise ModelClosed("the multiplexer is closed")
            if self._queued >= self.settings.max_queue:
                raise Overloaded(
                    f"{self._queued} requests wait already, as many as are allowed",
                    hint="come back later, or raise max_queue",
                    retry_after_s=self.retry_after_s(),
                )
            self._queued += 1
        self.post(lambda: self._submitted(entry, job))

    def cancel(self, job: Job) -> None:
        """Nobody waits for this request any more. A step that serves only such ones is stopped."""
        with self._wake:
            job.cancelled = True
            if self._computing is not None:
                context, jobs = self._computing
                if all(other.cancelled for other in jobs):
                    context.stop()
            self._wake.notify()

    def retry_after_s(self) -> float:
        """Return when a request that is refused now should come back."""
        return min(60.0, max(1.0, self._job_s * self._queued / self.settings.n_parallel))

    def close(self) -> None:
        """End all requests, unload everything and wait for the thread."""
        with self._wake:
            self._closing = True
            if self._computing is not None:
                self._computing[0].stop()
            self._wake.notify()
        self._thread.join()

    # -- the loop -------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._wake:
                if not self._commands and not self._closing:
                    self._wake.wait(self._pause_s())
                commands, self._commands = self._commands, []
                closing = self._closing
            try:
                for command in commands:
                    command()
                if closing:
                    break
                self._serve(time.monotonic_ns())
                self._step()
            except Exception as error:  # a defect; one request must not end all others
                _log.exception("the scheduler failed")
                self._fail_all(NexusError(f"the multiplexer failed: {error!r}"))
        self._end()

    def _pause_s(self) -> float:
        entries = self.entries.values()
        if any(entry.computes and entry.stepping for entry in entries):
            return 0.0
        if any(entry.waiting or entry.until_ns is not None or entry.loaded for entry in entries):
            return _LONGEST_WAIT_S
        return 60.0

    def _serve(self, now: int) -> None:
        for entry in list(self.entries.values()):
            self._expire(entry, now)
        waiting = [e for e in self.entries.values() if e.has_requests]
        for entry in sorted(waiting, key=lambda e: e.waiting[0].submitted_ns if e.waiting else 0):
            if self._ready(entry, now):
                self._admit(entry)
        self.keeper.look(now)

    def _ready(self, entry: Entry, now: int) -> bool:
        """Whether a model can take requests; sets out to make it so."""
        if not entry.stepping or entry.unwanted:
            return False
        partial = entry.resident < len(entry.units)
        if entry.runner is None or (partial and not entry.settled and not entry.in_use):
            try:
                return self.keeper.activate(entry, now)
            except DoesNotFit as error:
                self._refuse(entry, error)
                return False
        return True

    def _loaded(self, entry: Entry, error: Exception | None, waited: bool) -> None:
        """The loader has ended its work for a model, for which requests may have waited."""
        if not waited:
            return
        if error is not None and not isinstance(error, Interrupted):
            self._refuse(entry, error)
        elif entry.runner is not None:
            self._admit(entry, at_once=True)  # or the next to ask could have it unloaded unused

    def _admit(self, entry: Entry, *, at_once: bool = False) -> None:
        """Let waiting requests join. at_once: also while others are to wait for a third."""
        runner = entry.runner
        assert runner is not None
        for told in entry.wanted:
            told(None)
        entry.wanted.clear()
        if self.keeper.holds_back(entry) and not at_once:
            return
        while entry.waiting and runner.has_room:
            job = entry.waiting.popleft()
            self._left_queue()
            if job.cancelled:
                job.close()
            else:
                runner.admit(job)

    # -- requests -------------------------------------------------------------------------------

    def _submitted(self, entry: Entry, job: Job) -> None:
        entry.waiting.append(job)
        self._asked(entry, job.keep_alive_s)

    def add_embed(self, entry: Entry, job: EmbedJob) -> None:
        """Queue prompts to embed (in the scheduler's thread)."""
        entry.embeds.append(job)
        self._asked(entry, job.keep_alive_s)

    def _asked(self, entry: Entry, keep_alive_s: float | None) -> None:
        entry.keep(keep_alive_s)
        self.keeper.hurry()

    def want(self, entry: Entry, keep_alive_s: float | None, told: Callable[..., None]) -> None:
        """Load a model (in the scheduler's thread); `told` gets None, or the error."""
        entry.wanted.append(told)
        self._asked(entry, keep_alive_s)

    def unwant(self, entry: Entry, told: Callable[..., None]) -> None:
        """Unload a model when its running requests are done (in the scheduler's thread)."""
        entry.unwanted.append(told)

    def register(self, entry: Entry, told: Callable[..., None]) -> None:
        """Know a model from now on (in the scheduler's thread), instead of another of its name.

        What was claimed for its vocabulary is its own now.

        What the other still has to do it does under a name of its own; it is not kept after.
        """
        self.keeper.unclaim(entry.plan.vocabulary_bytes)
        old = self.entries.pop(entry.name, None)
        self.entries[entry.name] = entry
        if old is not None:
            name = f"{old.name} (replaced {self._n_replaced})"
            self._n_replaced += 1
            old.spec = replace(old.spec, name=name, pinned=False)
            old.replaced = True
            old.keep_alive_s = 0.0
            old.keep(0.0)
            self.entries[name] = old
        told(None)

    def _left_queue(self) -> None:
        with self._wake:
            self._queued -= 1

    def _refuse(self, entry: Entry, error: BaseException) -> None:
        """Fail everything that waits for a model."""
        while entry.waiting:
            entry.waiting.popleft().fail(error)
            self._left_queue()
        while entry.embeds:
            entry.embeds.popleft().tell(error)
        for told in entry.wanted:
            told(error)
        entry.wanted.clear()
        entry.blocked_ns = 0

    def _expire(self, entry: Entry, now: int) -> None:
        """Drop requests that are cancelled or late, and models that nobody needs any more."""
        for job in [j for j in entry.waiting if j.cancelled or _late(j, now)]:
            entry.waiting.remove(job)
            self._left_queue()
            job.close() if job.cancelled else job.fail(self._too_late(job))
        if not entry.waiting and not entry.wanted:
            entry.blocked_ns = 0
        runner = entry.runner
        if runner is not None:
            for job in runner.jobs:
                if job.cancelled:
                    runner.drop(job)
                elif not job.first_ns and _late(job, now):
                    runner.drop(job)
                    job.fail(self._too_late(job))
        if entry.in_use:
            return
        kept = entry.has_requests or entry.until_ns is None or entry.until_ns > now
        if runner is not None and (entry.unwanted or not (kept or entry.spec.pinned)):
            self.keeper.unload(entry, "asked for" if entry.unwanted else "its keep-alive has ended")
        for told in entry.unwanted:
            told(None)
        entry.unwanted.clear()
        if entry.replaced and not entry.loaded and not entry.has_requests:
            del self.entries[entry.name]
            self._clock.forget(entry.name)

    def _too_late(self, job: Job) -> Overloaded:
        return Overloaded(
            f"no token after {job.request.deadline_s} s, which was the deadline",
            hint="come back later, or allow more time",
            retry_after_s=self.retry_after_s(),
        )

    def _fail_all(self, error: NexusError) -> None:
        for entry in self.entries.values():
            self._refuse(entry, error)
            if entry.runner is not None:
                for job in entry.runner.jobs:
                    entry.runner.drop(job)
                    job.fail(error)

    # -- computing ------------------------------------------------------------------------------

    def _step(self) -> None:
        able = {e.name: e for e in self.entries.values() if e.computes and e.stepping}
        name = self._clock.pick(able)
        if name is None:
            return
        entry = able[name]
        runner = entry.runner
        assert runner is not None
        begin = time.monotonic_ns()
        slots = runner.next_slots()
        jobs = [slot.job for slot in slots if slot.job is not None]
        if slots:
            with self._wake:
                runner.context.arm()
                go_on = not self._closing and not all(job.cancelled for job in jobs)
                self._computing = (runner.context, jobs) if go_on else None
            if go_on:
                runner.step(slots)
            with self._wake:
                self._computing = None
        if entry.embeds:
            self._embed(entry)
        now = time.monotonic_ns()
        self._clock.charge(name, now - begin, 1.0 + entry.spec.priority)
        for job in jobs:
            if job.reason is not None:
                self._job_s += 0.2 * ((now - job.started_ns) / 1e9 - self._job_s)
        entry.touch()
        if not entry.computes:
            entry.settled = False

    def _embed(self, entry: Entry) -> None:
        """Embed one prompt of the first of the jobs."""
        job = entry.embeds[0]
        if job.cancelled:
            entry.embeds.popleft()
            return
        assert entry.runner is not None
        tokens = job.prompts[len(job.vectors)]
        need = embed_bytes(entry.plan, len(tokens))
        steps = deciding.make_room(self.keeper.memory(), need, entry.name)
        try:
            if steps is None:
                raise Overloaded(
                    f"{format_bytes(need)} for an embedding are not free",
                    hint="come back later, or use a larger budget",
                    retry_after_s=self.retry_after_s(),
                )
            self.keeper.give_up(steps, f"for an embedding by {entry.name}")
            entry.embed_bytes = need
            job.vectors.append(embed(entry.runner.model, tokens))
        except NexusError as error:
            entry.embeds.popleft()
            job.tell(error)
            return
        finally:
            entry.embed_bytes = 0
        if len(job.vectors) == len(job.prompts):
            entry.embeds.popleft()
            job.tell(job.vectors)

    def _end(self) -> None:
        self._fail_all(ModelClosed("the multiplexer was closed"))
        self.keeper.end_loading()
        with self._wake:
            commands, self._commands = self._commands, []
        for command in commands:  # what the loader still had to say, and requests that came late
            command()
        self._fail_all(ModelClosed("the multiplexer was closed"))
        for entry in self.entries.values():
            for told in entry.unwanted:
                told(None)
        self.keeper.close()


def _late(job: Job, now: int) -> bool:
    return job.deadline_ns is not None and job.deadline_ns <= now
