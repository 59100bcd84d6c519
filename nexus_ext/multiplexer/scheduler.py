"""The thread that owns all contexts: it takes requests, gives out memory, and computes in turns.

One graph runs at a time, whichever model it belongs to: two would only fight for the same cores. So
nothing here needs a lock but the list of commands and the list of what is being computed. Opening
models and reading weights back happens beside it, in the loader's thread (`Loader`).

Between two steps the loop asks: whose keep-alive or deadline has passed, which model needs memory
that `eviction` can find, which requests can join a batch. Then the model that had the least of the
processor's time computes one step.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from nexus_ext.errors import DoesNotFit, Interrupted, ModelClosed, NexusError
from nexus_ext.multiplexer import eviction
from nexus_ext.multiplexer.api import Overloaded
from nexus_ext.multiplexer.embedding import EmbedJob, embed, embed_bytes
from nexus_ext.multiplexer.entry import Entry
from nexus_ext.multiplexer.events import EventLog, Kind
from nexus_ext.multiplexer.fairness import FairClock
from nexus_ext.multiplexer.job import Job
from nexus_ext.multiplexer.loader import Loader, Outcome
from nexus_ext.multiplexer.sessions import SessionStore
from nexus_ext.multiplexer.settings import Settings
from nexus_ext.runtime.batch import BatchContext
from nexus_ext.units import format_bytes

_log = logging.getLogger("nexus_ext.multiplexer")

_SETTLE_NS = 2_000_000_000  # idle so long before a running model may take its layers
_GROW_NS = 1_000_000_000  # between two looks for memory that a running model could use
_LONGEST_WAIT_S = 0.5  # between two looks at deadlines


class Scheduler:
    """Runs the models of `entries`. Public methods may be called from any thread."""

    def __init__(self, settings: Settings, log: EventLog) -> None:
        self.settings = settings
        self.log = log
        self.entries: dict[str, Entry] = {}
        self.sessions = SessionStore(
            settings.saved_bytes, settings.session_disk_bytes, settings.session_directory
        )
        self._wake = threading.Condition()
        self._commands: list[Callable[[], None]] = []
        self._queued = 0  # requests that are not admitted yet; guarded by _wake
        self._computing: tuple[BatchContext, list[Job]] | None = None  # guarded by _wake
        self._closing = False
        self._clock = FairClock()
        self._draining: Entry | None = None
        self._grown_ns = 0
        self._n_replaced = 0
        self._job_s = 1.0  # how long a request takes, smoothed
        self._loader = Loader(self.sessions, self.post)
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

    def memory(self) -> eviction.Memory:
        """Return who holds what of the budget."""
        entries = list(self.entries.values())
        return eviction.Memory(
            budget_bytes=self.settings.budget_bytes,
            holders=tuple(entry.holder(in_use=entry.in_use) for entry in entries),
            other_bytes=self.settings.saved_bytes
            + sum(entry.plan.vocabulary_bytes for entry in entries),
        )

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
        if self._draining is not None and not self._draining.blocked_ns:
            self._draining = None
        self._grow(now)

    def _ready(self, entry: Entry, now: int) -> bool:
        """Whether a model can take requests; sets out to make it so."""
        if not entry.stepping or entry.unwanted:
            return False
        partial = entry.resident < len(entry.units)
        if entry.runner is None or (partial and not entry.settled and not entry.in_use):
            return self._activate(entry, now)
        return True

    def _admit(self, entry: Entry, *, at_once: bool = False) -> None:
        """Let waiting requests join. at_once: also while others are to wait for a third."""
        runner = entry.runner
        assert runner is not None
        for told in entry.wanted:
            told(None)
        entry.wanted.clear()
        if self._draining not in (None, entry) and not (entry.spec.pinned or at_once):
            return
        while entry.waiting and runner.has_room:
            job = entry.waiting.popleft()
            self._left_queue()
            if job.cancelled:
                job.close()
            else:
                runner.admit(job)

    # -- memory ---------------------------------------------------------------------------------

    def _activate(self, entry: Entry, now: int) -> bool:
        """Give a model what memory it can have. True: it can compute with what it has now."""
        memory = self.memory()
        found = eviction.activate(memory, entry.name)
        if found is None:
            self._blocked(entry, memory, now)
            return False
        entry.blocked_ns = 0
        self._give_up(found.steps, f"for {entry.name}")
        entry.settled = True
        if entry.runner is not None and found.resident == entry.resident:
            return True
        entry.resident = found.resident
        entry.stepping = False
        entry.begun_ns = now
        entry.at_work = self._loader.start(entry, self._loaded)
        return False

    def _blocked(self, entry: Entry, memory: eviction.Memory, now: int) -> None:
        others_idle = tuple(replace(h, in_use=False) for h in memory.holders)
        if eviction.activate(replace(memory, holders=others_idle), entry.name) is None:
            kept = sum(h.held_bytes for h in memory.holders if h.pinned or h.share_bytes)
            self._refuse(
                entry,
                DoesNotFit(
                    f"{entry.name} takes {format_bytes(entry.fixed_bytes)} beside its weights, "
                    f"which the budget of {format_bytes(memory.budget_bytes)} does not leave "
                    f"({format_bytes(memory.other_bytes + kept)} are kept for others)",
                    hint="use a shorter context, fewer parallel sequences or a larger budget",
                    smallest_bytes=memory.other_bytes + kept + entry.fixed_bytes,
                ),
            )
            return
        if not entry.blocked_ns:
            entry.blocked_ns = now
            self.log.add("wait", entry.name, "what it needs is held by models in use")
        if self._draining is None and now - entry.blocked_ns >= self.settings.patience_s * 1e9:
            self._draining = entry  # no new requests for the others until it has had its turn

    def _give_up(self, steps: tuple[eviction.Step, ...], why: str) -> None:
        for step in steps:
            entry = self.entries[step.name]
            if step.resident is None:
                self._unload(entry, why)
            else:
                assert entry.runner is not None
                begin = time.monotonic_ns()
                n = entry.resident - step.resident
                entry.runner.model.set_resident(step.resident)
                entry.resident = step.resident
                entry.settled = False
                ns = time.monotonic_ns() - begin
                self.log.add(
                    "evict", entry.name, f"{n} units {why}", nbytes=step.freed_bytes, ns=ns
                )

    def _unload(self, entry: Entry, why: str) -> None:
        runner, entry.runner = entry.runner, None
        assert runner is not None
        held = entry.holder(in_use=False).fixed_bytes + sum(entry.units[: entry.resident])
        begin = time.monotonic_ns()
        saved = runner.close()
        entry.resident, entry.settled = 0, False
        ns = time.monotonic_ns() - begin
        if saved:
            self.log.add("save", entry.name, "states of its sequences", nbytes=saved, ns=ns)
        self.log.add("unload", entry.name, why, nbytes=held, ns=ns)

    def _loaded(self, entry: Entry, outcome: Outcome) -> None:
        """The loader is done with a model, in one way or another."""
        fresh = entry.runner is None and outcome.runner is not None
        foreground = not entry.stepping
        entry.at_work, entry.stepping, entry.runner = None, True, outcome.runner
        entry.resident = outcome.runner.model.resident if outcome.runner else 0
        if fresh and outcome.runner is not None:
            begin = time.monotonic_ns()
            nbytes = outcome.runner.resume()
            if nbytes:
                ns = time.monotonic_ns() - begin
                self.log.add("resume", entry.name, "saved states", nbytes=nbytes, ns=ns)
        if outcome.error is None or isinstance(outcome.error, Interrupted):
            units = f"{entry.resident} of {len(entry.units)} units resident"
            kind: Kind = "load" if fresh else "restore"
            self.log.add(kind, entry.name, units, nbytes=outcome.nbytes, ns=outcome.ns)
        else:
            entry.settled = False
            self.log.add("fail", entry.name, str(outcome.error), ns=outcome.ns)
            if foreground:
                self._refuse(entry, outcome.error)
        now = time.monotonic_ns()
        for job in entry.waiting:
            job.load_ns = now - max(entry.begun_ns, job.submitted_ns) if foreground else 0
        entry.touch()
        if foreground and entry.runner is not None:
            self._admit(entry, at_once=True)  # or the next to ask could have it unloaded unused

    def _grow(self, now: int) -> None:
        """Memory that nobody uses goes to models that could: running ones, else the last used."""
        if self._loader.busy or now - self._grown_ns < _GROW_NS:
            return
        self._grown_ns = now
        partial = [
            e
            for e in self.entries.values()
            if e.runner is not None and not e.at_work and e.resident < len(e.units)
        ]
        running = [e for e in partial if e.computes]
        if not running and any(e.has_requests or e.computes for e in self.entries.values()):
            return
        for entry in running or sorted(partial, key=lambda e: -e.last_used_ns):
            memory = self.memory()
            holders = tuple(
                # Layers of a model that was used just now stay; without requests nobody's go.
                replace(h, in_use=h.in_use or not running or now - h.last_used_ns < _SETTLE_NS)
                for h in memory.holders
            )
            found = eviction.activate(replace(memory, holders=holders), entry.name)
            if found is None or found.resident <= entry.resident:
                continue
            self._give_up(found.steps, f"for {entry.name}, which streams")
            entry.resident, entry.begun_ns = found.resident, now
            entry.at_work = self._loader.start(entry, self._loaded)
            return

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
        for other in self.entries.values():
            if other.at_work is not None and other.stepping and not other.computes:
                other.at_work.set()  # what is read back for nobody can wait

    def want(self, entry: Entry, keep_alive_s: float | None, told: Callable[..., None]) -> None:
        """Load a model (in the scheduler's thread); `told` gets None, or the error."""
        entry.wanted.append(told)
        self._asked(entry, keep_alive_s)

    def unwant(self, entry: Entry, told: Callable[..., None]) -> None:
        """Unload a model when its running requests are done (in the scheduler's thread)."""
        entry.unwanted.append(told)

    def register(self, entry: Entry, told: Callable[..., None]) -> None:
        """Know a model from now on (in the scheduler's thread), instead of another of its name.

        What the other still has to do it does under a name of its own; it is not kept after.
        """
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
            self._unload(entry, "asked for" if entry.unwanted else "its keep-alive has ended")
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
        slots = runner.next_jobs()
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
        steps = eviction.make_room(self.memory(), need, entry.name)
        try:
            if steps is None:
                raise Overloaded(
                    f"{format_bytes(need)} for an embedding are not free",
                    hint="come back later, or use a larger budget",
                    retry_after_s=self.retry_after_s(),
                )
            self._give_up(steps, f"for an embedding by {entry.name}")
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
        self._loader.close([e.at_work for e in self.entries.values() if e.at_work is not None])
        with self._wake:
            commands, self._commands = self._commands, []
        for command in commands:  # what the loader still had to say, and requests that came late
            command()
        self._fail_all(ModelClosed("the multiplexer was closed"))
        for entry in self.entries.values():
            if entry.runner is not None:
                self._unload(entry, "the multiplexer was closed")
            for told in entry.unwanted:
                told(None)
        self.sessions.close()


def _late(job: Job, now: int) -> bool:
    return job.deadline_ns is not None and job.deadline_ns <= now
