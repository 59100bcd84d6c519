"""One loaded model: its context, the sequences in it, and one step of computing at a time.

Every sequence of the context is a `Slot`. A slot keeps the KV state of what it computed when its
request ends, for a prompt that begins alike. Requests join whenever a slot is free; decoding
sequences are computed in one batch, prompts in chunks in turn with them.

Belongs to the worker's thread. Which model steps, and when it is loaded, is decided elsewhere.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

from nexus_ext.errors import Interrupted, NexusError
from nexus_ext.multiplexer import announce
from nexus_ext.multiplexer.files import identity
from nexus_ext.multiplexer.job import Job
from nexus_ext.multiplexer.prefix import chunk_end, prefilled, reusable, shared_chunk
from nexus_ext.multiplexer.sessions import Saved, SessionStore, common_prefix
from nexus_ext.runtime.batch import BatchContext, Row, Shape
from nexus_ext.runtime.elastic import ElasticModel

_log = logging.getLogger("nexus_ext.multiplexer")


@dataclass(slots=True)
class Slot:
    """One sequence of the context."""

    index: int
    tokens: list[int] = field(default_factory=list)  # whose KV state is there
    n_prefilled: int = 0  # see prefix.reusable
    session: str | None = None
    job: Job | None = None
    used_ns: int = 0


class Runner:
    """Computes the requests of one model."""

    def __init__(self, model: ElasticModel, sessions: SessionStore) -> None:
        """Allocate the context. Raises OutOfMemory."""
        self.model = model
        self.shape: Shape = model.blueprint.shape
        # A fingerprint is of the header: the same for weights that were trained on.
        catalog = model.blueprint.catalog
        self.key = f"{catalog.fingerprint} {identity(catalog)} {self.shape}"
        on_gpu = model.blueprint.gpu.n_layers > 0
        self.context = BatchContext(model.pointer, model.core, self.shape, on_gpu=on_gpu)
        self.slots = [Slot(i) for i in range(self.shape.n_seq)]
        self._sessions = sessions
        self._prefill_next = True
        self._n_each = 0  # tokens of each prompt in the next step
        self._watch = announce.watch_routers_of(model)

    # -- requests -------------------------------------------------------------------------------

    @property
    def jobs(self) -> list[Job]:
        """Requests that are being computed; one that has its last event is none any more."""
        return [s.job for s in self.slots if s.job is not None and s.job.reason is None]

    @property
    def has_room(self) -> bool:
        return any(slot.job is None for slot in self.slots)

    def admit(self, job: Job) -> None:
        """Give a request the free slot whose state serves it best."""
        free = [slot for slot in self.slots if slot.job is None]
        session = job.request.session

        def value(slot: Slot) -> tuple[bool, int, bool, int]:
            own = session is not None and slot.session == session
            return own, self._reusable(job, slot), slot.session is None, -slot.used_ns

        slot = max(free, key=value)
        saved = self._sessions.best(self.key, job.request.prompt, session)
        if saved is not None and self._gain(job, saved) > self._reusable(job, slot):
            slot = min(free, key=lambda s: (s.session is not None, s.used_ns))
            self._save(slot)
            self._restore(slot, saved)
        n = self._reusable(job, slot)
        if slot.session is not None and slot.session != session and n < len(slot.tokens):
            self._save(slot)
        n = self.context.keep(slot.index, n)
        del slot.tokens[n:]
        slot.n_prefilled = min(slot.n_prefilled, n)
        slot.session, slot.job = session, job
        job.n_cached = n
        job.started_ns = time.monotonic_ns()

    def _reusable(self, job: Job, slot: Slot) -> int:
        return self._usable(job, slot.tokens, slot.n_prefilled, slot.session)

    def _gain(self, job: Job, saved: Saved) -> int:
        return self._usable(job, saved.tokens, saved.n_prefilled, saved.session)

    def _usable(
        self, job: Job, tokens: tuple[int, ...] | list[int], n_prefilled: int, session: str | None
    ) -> int:
        return reusable(
            job.n_prompt,
            common_prefix(tokens, job.request.prompt),
            n_prefilled,
            self.shape.n_ubatch,
            session=job.request.session is not None and job.request.session == session,
        )

    # -- computing ------------------------------------------------------------------------------

    def next_slots(self) -> list[Slot]:
        """Return the slots that the next step computes: such that prefill, or all that decode."""
        running = [s for s in self.slots if s.job is not None and s.job.reason is None]
        prefill = [slot for slot in running if self._prefills(slot)]
        decode = [slot for slot in running if slot not in prefill]
        if not prefill or (decode and not self._prefill_next):
            return decode
        prefill.sort(key=lambda slot: slot.job.started_ns if slot.job else 0)
        lengths = [len(self._chunk(slot)) for slot in prefill]
        together, self._n_each = shared_chunk(lengths, self.shape.n_ubatch)
        return [prefill[i] for i in together]

    def step(self, slots: list[Slot]) -> None:
        """Compute the slots that `next_slots` named. A request that fails is told; nothing raises.

        After Interrupted (a request was cancelled) everything is as before.
        """
        prefill = self._prefills(slots[0])
        self._prefill_next = not prefill
        rows: list[Row] = []
        last: list[int] = []  # row of each slot
        for slot in slots:
            rows += self._prompt_rows(slot) if prefill else [self._next_row(slot)]
            last.append(len(rows) - 1)
        try:
            self.context.compute(rows)
        except Interrupted:
            return
        except NexusError as error:
            for slot in slots:
                self._fail(slot, error)
            return
        if self._watch is not None:
            self._watch.tell(later=True)
        now = time.monotonic_ns()
        for slot, row in zip(slots, last, strict=True):
            at = len(slot.tokens)
            slot.tokens += [r.token for r in rows if r.sequence == slot.index]
            slot.used_ns = now
            if prefill:
                slot.n_prefilled = prefilled(len(slot.tokens), slot.n_prefilled, at)
            if rows[row].output:
                self._take(slot, row)

    def _prefills(self, slot: Slot) -> bool:
        return slot.job is not None and len(slot.tokens) < slot.job.n_prompt

    def _chunk(self, slot: Slot) -> range:
        """The positions that a prompt would compute next, if it were alone."""
        assert slot.job is not None
        at = len(slot.tokens)
        return range(at, chunk_end(at, slot.job.n_prompt, self.shape.n_ubatch))

    def _prompt_rows(self, slot: Slot) -> list[Row]:
        job = slot.job
        assert job is not None
        positions = self._chunk(slot)[: self._n_each]
        return [Row(job.tokens[i], i, slot.index, i == job.n_prompt - 1) for i in positions]

    def _next_row(self, slot: Slot) -> Row:
        assert slot.job is not None
        return Row(slot.job.tokens[-1], len(slot.tokens), slot.index, True)

    def _take(self, slot: Slot, row: int) -> None:
        job = slot.job
        assert job is not None
        try:
            job.take(self.context.logits(row))
        except NexusError as error:  # a grammar without a way on, say: this request's own trouble
            self._fail(slot, error)
            return
        if job.reason is not None:
            slot.job = None

    def _fail(self, slot: Slot, error: BaseException) -> None:
        job, slot.job = slot.job, None
        if job is not None:
            job.fail(error)

    def drop(self, job: Job) -> None:
        """A request is not wanted any more: its slot is free, and keeps what was computed."""
        for slot in self.slots:
            if slot.job is job:
                slot.job = None
        job.close()

    # -- states that come and go ----------------------------------------------------------------

    def _save(self, slot: Slot) -> int:
        """Keep the state of a slot in the store; return its bytes, 0 when it is not worth it."""
        size = self.context.state_bytes(slot.index) if slot.tokens else 0
        if not size or not self._sessions.wants(len(slot.tokens), size, slot.session):
            return 0
        self._sessions.reserve(size)
        try:
            data = self.context.save(slot.index)
        except NexusError as error:  # it costs a prefill, no request need fail
            _log.warning("the state of %d tokens is lost: %s", len(slot.tokens), error)
            return 0
        self._sessions.put(
            Saved(self.key, tuple(slot.tokens), slot.n_prefilled, slot.session, len(data), data)
        )
        return len(data)

    def resume(self) -> int:
        """Put back the states that were saved when the model was unloaded; return their bytes."""
        saved = self._sessions.newest(self.key, len(self.slots))
        return sum(self._restore(*pair) for pair in zip(self.slots, saved, strict=False))

    def _restore(self, slot: Slot, saved: Saved) -> int:
        data = self._sessions.take(saved)
        slot.tokens, slot.n_prefilled, slot.session = [], 0, None
        if data is None:
            return 0
        try:
            self.context.restore(slot.index, data)
        except NexusError as error:  # it costs a prefill, no request need fail
            _log.warning("a saved state of %d tokens is lost: %s", len(saved.tokens), error)
            return 0
        slot.tokens, slot.n_prefilled = list(saved.tokens), saved.n_prefilled
        slot.session, slot.used_ns = saved.session, time.monotonic_ns()
        return len(data)

    def close(self) -> int:
        """Save all states and give everything back; return the bytes of states that were kept."""
        try:
            return sum(self._save(slot) for slot in sorted(self.slots, key=lambda s: s.used_ns))
        finally:
            self.context.close()
            self.model.close()
