"""Who holds which memory: carries out what `eviction` decides, and remembers who waits for it.

Belongs to the scheduler's thread. Opening and reading happen in the loader's thread and come back
as a command; giving up memory happens at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from nexus_ext.errors import DoesNotFit, Interrupted, ModelClosed
from nexus_ext.multiplexer import announce, deciding, eviction
from nexus_ext.multiplexer.entry import Entry
from nexus_ext.multiplexer.events import EventLog
from nexus_ext.multiplexer.loader import Loader, Outcome
from nexus_ext.multiplexer.sessions import SessionStore
from nexus_ext.multiplexer.settings import Settings
from nexus_ext.units import format_bytes

_SETTLE_NS = 2_000_000_000  # idle so long before a running model may take its layers
_GROW_NS = 1_000_000_000  # between two looks for memory that a model could use


@dataclass(slots=True, eq=False)
class Claim:
    """Memory that is wanted for the vocabulary of a model that is not known yet."""

    name: str
    nbytes: int
    told: Callable[..., None]
    since_ns: int
    is_old: bool = False  # has waited for so long that nobody is to begin anything new


class Keeper:
    """The memory of all models."""

    def __init__(
        self,
        settings: Settings,
        log: EventLog,
        post: Callable[[Callable[[], None]], None],
        done: Callable[[Entry, Exception | None, bool], None],
    ) -> None:
        """`done` is told when the loader ends: the model, an error, whether requests waited."""
        self.settings = settings
        self.log = log
        self.entries: dict[str, Entry] = {}
        self.sessions = SessionStore(
            settings.saved_bytes, settings.session_disk_bytes, settings.session_directory
        )
        self._loader = Loader(self.sessions, post)
        self._done = done
        self._draining: Entry | None = None
        self._grown_ns = 0
        self._claims: list[Claim] = []
        self._claimed_bytes = 0  # given to claims whose model is not known yet

    def memory(self) -> eviction.Memory:
        """Return who holds what of the budget."""
        entries = list(self.entries.values())
        return eviction.Memory(
            budget_bytes=self.settings.budget_bytes,
            holders=tuple(entry.holder(in_use=entry.in_use) for entry in entries),
            other_bytes=self.settings.saved_bytes
            + self._claimed_bytes
            + sum(entry.plan.vocabulary_bytes for entry in entries),
            gpu_budgets=tuple(gpu.nbytes for gpu in self.settings.gpus),
        )

    def holds_back(self, entry: Entry) -> bool:
        """Whether a model must begin nothing new, since another has waited too long for memory."""
        if entry.spec.pinned:  # waiting for it would be in vain
            return False
        return self._draining not in (None, entry) or any(claim.is_old for claim in self._claims)

    def look(self, now: int) -> None:
        """Do what has become possible: claims, memory that lies idle."""
        for claim in list(self._claims):
            self._meet(claim, now)
        if self._draining is not None and not self._draining.blocked_ns:
            self._draining = None
        self._grow(now)

    def claim(self, name: str, nbytes: int, told: Callable[..., None]) -> None:
        """Set memory aside for the vocabulary of a model (in the scheduler's thread).

        `told` gets None once it is there, or DoesNotFit. `register` or `unclaim` ends the claim.
        """
        self._claims.append(Claim(name, nbytes, told, time.monotonic_ns()))

    def unclaim(self, nbytes: int) -> None:
        """Give back what was set aside (in the scheduler's thread)."""
        self._claimed_bytes -= nbytes

    def activate(self, entry: Entry, now: int) -> bool:
        """Give a model what memory it can have. True: it can compute with what it has now.

        False: the loader is at work for it, or it must wait. Raises DoesNotFit when it would wait
        for ever.
        """
        memory = self.memory()
        found = deciding.activate(memory, entry.name)
        if found is None:
            self._blocked(entry, memory, now)
            return False
        entry.blocked_ns = 0
        self.give_up(found.steps, f"for {entry.name}")
        entry.settled = True
        if entry.runner is not None and found.resident == entry.resident:
            return True
        entry.resident = found.resident
        entry.stepping = False
        entry.begun_ns = now
        entry.at_work = self._loader.start(entry, self._loaded)
        return False

    def _meet(self, claim: Claim, now: int) -> None:
        """Make room for a claim, if that is possible now."""
        memory = self.memory()
        steps = deciding.make_room(memory, claim.nbytes, "")
        if steps is None and eviction.make_room(_all_idle(memory), claim.nbytes, "") is not None:
            claim.is_old = now - claim.since_ns >= self.settings.patience_s * 1e9
            return
        self._claims.remove(claim)
        if steps is None:
            claim.told(
                DoesNotFit(
                    f"the vocabulary of {claim.name} takes {format_bytes(claim.nbytes)}, which "
                    f"the budget of {format_bytes(memory.budget_bytes)} does not leave",
                    hint="use a larger budget, or pin less",
                    smallest_bytes=memory.used_bytes + claim.nbytes,
                )
            )
            return
        self.give_up(steps, f"for the vocabulary of {claim.name}")
        self._claimed_bytes += claim.nbytes
        claim.told(None)

    def _blocked(self, entry: Entry, memory: eviction.Memory, now: int) -> None:
        if eviction.activate(_all_idle(memory), entry.name) is None:
            _check_gpu(entry, memory)
            kept = sum(h.held_bytes for h in memory.holders if h.pinned or h.share_bytes)
            raise DoesNotFit(
                f"{entry.name} takes {format_bytes(entry.fixed_bytes)} beside its weights, "
                f"which the budget of {format_bytes(memory.budget_bytes)} does not leave "
                f"({format_bytes(memory.other_bytes + kept)} are kept for others)",
                hint="use a shorter context, fewer parallel sequences or a larger budget",
                smallest_bytes=memory.other_bytes + kept + entry.fixed_bytes,
            )
        if not entry.blocked_ns:
            entry.blocked_ns = now
            self.log.add("wait", entry.name, "what it needs is held by models in use")
        if self._draining is None and now - entry.blocked_ns >= self.settings.patience_s * 1e9:
            self._draining = entry  # no new requests for the others until it has had its turn

    def give_up(self, steps: tuple[eviction.Step, ...], why: str) -> None:
        for step in steps:
            entry = self.entries[step.name]
            if step.resident is None:
                self.unload(entry, why)
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

    def unload(self, entry: Entry, why: str) -> None:
        runner, entry.runner = entry.runner, None
        assert runner is not None
        held = entry.holder(in_use=False).fixed_bytes + sum(entry.units[: entry.resident])
        begin = time.monotonic_ns()
        saved = runner.close()
        announce.tell_closed(entry)
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
        entry.progress = None
        entry.resident = outcome.runner.model.resident if outcome.runner else 0
        if fresh and outcome.runner is not None:
            begin = time.monotonic_ns()
            nbytes = outcome.runner.resume()
            if nbytes:
                ns = time.monotonic_ns() - begin
                self.log.add("resume", entry.name, "saved states", nbytes=nbytes, ns=ns)
        if fresh:
            fixed = entry.plan.sizes.total
            self.log.add("load", entry.name, "opened", nbytes=fixed, ns=outcome.open_ns)
            announce.tell_loaded(entry)
        if outcome.nbytes:
            units = f"{entry.resident} of {len(entry.units)} units resident"
            self.log.add("restore", entry.name, units, nbytes=outcome.nbytes, ns=outcome.read_ns)
        if outcome.error is not None and not isinstance(outcome.error, Interrupted):
            entry.settled = False
            self.log.add("fail", entry.name, str(outcome.error))
        now = time.monotonic_ns()
        for job in entry.waiting:
            job.load_ns = now - max(entry.begun_ns, job.submitted_ns) if foreground else 0
        entry.touch()
        self._done(entry, outcome.error, foreground)

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
            found = deciding.activate(replace(memory, holders=holders), entry.name)
            if found is None or found.resident <= entry.resident:
                continue
            self.give_up(found.steps, f"for {entry.name}, which streams")
            entry.resident, entry.begun_ns = found.resident, now
            entry.at_work = self._loader.start(entry, self._loaded)
            return

    def hurry(self) -> None:
        """A request has come: what is read back for nobody can wait."""
        for entry in self.entries.values():
            if entry.at_work is not None and entry.stepping and not entry.computes:
                entry.at_work.set()

    def end_loading(self) -> None:
        """Refuse claims, stop the loader and wait for it."""
        for claim in self._claims:
            claim.told(ModelClosed("the multiplexer was closed"))
        self._claims.clear()
        self._loader.close([e.at_work for e in self.entries.values() if e.at_work is not None])

    def close(self) -> None:
        """Unload everything."""
        for entry in self.entries.values():
            if entry.runner is not None:
                self.unload(entry, "the multiplexer was closed")
        self.sessions.close()


def _all_idle(memory: eviction.Memory) -> eviction.Memory:
    return replace(memory, holders=tuple(replace(h, in_use=False) for h in memory.holders))


def _check_gpu(entry: Entry, memory: eviction.Memory) -> None:
    """Raise DoesNotFit when it is the GPU that has no room, whoever is idle."""
    number, need = entry.spec.gpu, entry.plan.gpu.total_bytes
    if not need:
        return
    kept = sum(h.on_gpu(number) for h in memory.holders if h.loaded and (h.pinned or h.share_bytes))
    if kept + need > memory.gpu_budgets[number]:
        raise DoesNotFit(
            f"{entry.name} takes {format_bytes(need)} of GPU {number}, which its budget of "
            f"{format_bytes(memory.gpu_budgets[number])} does not leave "
            f"({format_bytes(kept)} are kept for others)",
            hint="put fewer layers there (gpu_layers), or use a larger budget",
            smallest_bytes=kept + need,
        )
