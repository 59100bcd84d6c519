"""What the scheduler knows of one model, loaded or not."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from nexus_ext import core
from nexus_ext.multiplexer.api import ModelState, ModelStatus
from nexus_ext.multiplexer.embedding import EmbedJob
from nexus_ext.multiplexer.eviction import Holder
from nexus_ext.multiplexer.files import Identity
from nexus_ext.multiplexer.job import Job
from nexus_ext.multiplexer.runner import Runner
from nexus_ext.multiplexer.settings import ModelSpec
from nexus_ext.runtime.blueprint import Blueprint
from nexus_ext.runtime.vocabulary import OwnVocabulary

Told = Callable[[BaseException | None], None]


@dataclass(slots=True, eq=False)
class Entry:
    """A model. Its fields belong to the scheduler's thread; others may read single ones."""

    spec: ModelSpec
    plan: Blueprint
    vocabulary: OwnVocabulary
    keep_alive_s: float  # as configured
    files: Identity  # when its header was read
    kept_s: float = field(init=False)  # as the last request asked
    units: tuple[int, ...] = field(init=False)  # bytes
    runner: Runner | None = None
    at_work: core.StopFlag | None = None  # the loader's, while it opens or reads for this model
    progress: Callable[[], float] | None = None  # of the loader's reading, 0 to 1
    stepping: bool = True  # False: requests wait for the loader
    resident: int = 0  # units that it holds or that are kept free for it
    waiting: deque[Job] = field(default_factory=deque)
    embeds: deque[EmbedJob] = field(default_factory=deque)
    embed_bytes: int = 0  # of the context that embeds
    wanted: list[Told] = field(default_factory=list)  # who asked to load it
    unwanted: list[Told] = field(default_factory=list)  # who asked to unload it
    last_used_ns: int = 0
    until_ns: int | None = 0  # None: for good
    blocked_ns: int = 0  # since when it waits for memory
    begun_ns: int = 0  # when its loading began
    replaced: bool = False  # another model has its name now
    gpu_is_unified: bool = False  # what is on its GPU is in main memory as well
    settled: bool = False  # it has tried to get back what was evicted since it was idle last

    def __post_init__(self) -> None:
        self.units = tuple(unit.nbytes for unit in self.plan.units)
        self.kept_s = self.keep_alive_s

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def loaded(self) -> bool:
        """Whether it holds its fixed part, or the loader is at it."""
        return self.runner is not None or self.at_work is not None

    @property
    def has_requests(self) -> bool:
        return bool(self.waiting or self.embeds or self.wanted)

    @property
    def computes(self) -> bool:
        return self.runner is not None and bool(self.runner.jobs or self.embeds)

    @property
    def in_use(self) -> bool:
        return (
            self.at_work is not None
            or (self.runner is not None and bool(self.runner.jobs))
            or (self.embed_bytes > 0)
        )

    @property
    def fixed_bytes(self) -> int:
        shared = self.plan.gpu.total_bytes if self.gpu_is_unified else 0
        return self.plan.sizes.total + self.embed_bytes + shared

    def holder(self, *, in_use: bool) -> Holder:
        spec, on_gpu = self.spec, self.plan.gpu.total_bytes
        return Holder(
            name=spec.name,
            fixed_bytes=self.fixed_bytes,
            units=self.units,
            loaded=self.loaded,
            resident=self.resident,
            in_use=in_use,
            pinned=spec.pinned,
            priority=spec.priority,
            share_bytes=spec.share_bytes,
            last_used_ns=self.last_used_ns,
            gpu_bytes=(*(0,) * spec.gpu, on_gpu) if on_gpu else (),
        )

    def keep(self, keep_alive_s: float | None) -> None:
        """Note how long the model is kept after its last use; None: as configured."""
        self.kept_s = self.keep_alive_s if keep_alive_s is None else keep_alive_s
        self.touch()

    def touch(self) -> None:
        """Note that it is used now."""
        self.last_used_ns = time.monotonic_ns()
        kept = self.kept_s
        self.until_ns = None if kept < 0 else self.last_used_ns + int(kept * 1e9)

    def status(self, now_ns: int) -> ModelStatus:
        runner, plan = self.runner, self.plan
        # What is there: `self.resident` counts also what is being read.
        n_resident = runner.model.resident if runner is not None else 0
        resident, total = sum(self.units[:n_resident]), sum(self.units)
        n_running = len(runner.jobs) if runner else 0
        state: ModelState = "ready" if n_running else "idle"
        done = 1.0
        if self.at_work is not None and not self.stepping:
            state = "loading"
            progress = self.progress
            done = progress() if progress is not None else 0.0
        if self.unwanted:
            state = "unloading"
        share = resident / total if total else 1.0
        tier = "resident" if share >= 1 else "streaming" if not share else f"{share:.0%} resident"
        keep_ns = None if self.until_ns is None or self.in_use else self.until_ns - now_ns
        return ModelStatus(
            name=self.name,
            state=state,
            file_bytes=plan.catalog.file_nbytes,
            resident_bytes=plan.sizes.permanent + resident,
            kv_bytes=plan.sizes.kv,
            tier=tier,
            n_ctx=plan.shape.n_ctx,
            n_running=n_running,
            n_waiting=len(self.waiting),
            load_done=done,
            until_s=None if keep_ns is None else max(0.0, keep_ns / 1e9),
            gpu_bytes=plan.gpu.total_bytes,
        )
