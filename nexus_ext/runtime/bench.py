"""Measure a model that is streamed, beside stock llama.cpp and beside the physical bound.

Runs are interleaved, A B A B, each in a process of its own, so that a slow minute of the machine
hits both sides; the disk is measured in pauses of decoding, on the model's own file, because some
disks change from second to second. The bound is the bytes that a token had to read, divided by the
median of that, and nothing else: in sequence, or, where experts are read when a router has picked
them, at random places and a record at a time. Bytes are counted twice: by the engine, and by the
kernel (/proc/self/io).

"Cold" means: the page cache of the model's files was dropped before the run, and how much of it was
still there is told. What a drive, a controller or a hypervisor keeps cannot be dropped from here.
Nothing is concluded here; a side that its memory limit killed is a result like any other.
"""

from __future__ import annotations

import logging
import os
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Final

from nexus_ext.errors import OutOfMemory, UsageError
from nexus_ext.runtime import user_environ
from nexus_ext.runtime.disk_sample import DiskSample, cached_bytes, disk_sample, drop_files
from nexus_ext.runtime.interrupts import cleaned_up_when_ended
from nexus_ext.runtime.memory_limit import MemoryGroup, memory_group
from nexus_ext.runtime.own_kernels import takes_over
from nexus_ext.runtime.planning import Planned
from nexus_ext.runtime.worker import Job, Session, Side, WorkerDied, part_sizes, run_worker

_log = logging.getLogger("nexus_ext.bench")

_CTX_STEP: Final = 256
_DECODE_PARTS: Final = 6  # with a measurement of the disk before, between and after them
_LIBGOMP_SPIN_COUNT: Final = "300000"  # its documented default
# Reading around the page cache, and reading the same bytes twice, differ by less than this.
_AGREE: Final = 0.02


@dataclass(frozen=True, slots=True)
class Spread:
    """A number that was measured several times."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Phase:
    """What one phase of one run took and read. None: not known, or nothing is paged."""

    seconds: float
    n_tokens: int
    engine_read_bytes: int | None
    device_read_bytes: int | None  # the kernel's count, page cache hits left out
    wait_s: float | None
    compute_s: float | None  # inside the delegate
    prefetched_bytes: int | None = None  # experts that were predicted and read
    prefetch_wasted_bytes: int | None = None  # those that left the cache unused

    @property
    def tok_s(self) -> float:
        return self.n_tokens / self.seconds


@dataclass(frozen=True, slots=True)
class Run:
    """One side, once. `died` says why there is nothing but that."""

    side: Side
    died: str = ""
    cached_before_bytes: int | None = None  # of the model's files, in the page cache
    load_s: float = 0.0
    loaded_bytes: int | None = None  # that became resident
    loaded_s: float | None = None  # from the first to the last read of them
    prefill: Phase | None = None
    decode: Phase | None = None
    token_s: tuple[float, ...] = ()
    disk: tuple[DiskSample, ...] = ()  # as weights are read, in pauses of decoding; paged side
    peak_bytes: int = 0
    peak_source: str = ""
    chosen: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Summary:
    """One side over all its runs that lived. None: there was none, or it does not apply."""

    side: Side
    n_runs: int
    n_died: int
    died: str
    load_s: Spread | None
    prefill_tok_s: Spread | None
    decode_tok_s: Spread | None
    read_per_token_bytes: float | None  # from the disk, while decoding
    engine_per_token_bytes: float  # what the engine asked for; 0 when nothing is paged
    peak_bytes: int | None
    peak_source: str


@dataclass(frozen=True, slots=True)
class Bound:
    """The physical limit of decoding, from what was measured in the same run."""

    read_per_token_bytes: float
    disk_bytes_s: Spread
    tok_s: float
    fraction: Spread  # of it, that decoding reached: each run by its own measurements of the disk


@dataclass(frozen=True, slots=True)
class Share:
    """What part of a phase (the median run) its longer side took: 1.0 is perfect overlap."""

    phase: str
    read_s: float  # its bytes from the disk, at the disk's rate in this measurement
    compute_s: float
    seconds: float
    fraction: float


@dataclass(frozen=True, slots=True)
class Loading:
    """How fast resident weights were read."""

    nbytes: int
    bytes_s: Spread
    fraction: float  # of the disk's rate in this measurement


@dataclass(frozen=True, slots=True)
class Bench:
    """All that was measured, and what it comes to."""

    model: str
    how: str
    limit: str  # what enforced a memory limit; "" without one
    session: Session
    n_prompt: int
    n_decode: int
    n_warmup: int
    streamed_nbytes: int
    io_mode: str | None
    disk: tuple[DiskSample, ...]  # in sequence, before each paged run: what loading could reach
    runs: tuple[Run, ...]
    paged: Summary
    stock: Summary | None
    bound: Bound | None
    shares: tuple[Share, ...]
    loading: Loading | None
    decode_ratio: float | None  # paged / stock, of the medians
    prefill_ratio: float | None
    notes: tuple[str, ...]


def context_for(n_prompt: int, n_decode: int, n_warmup: int) -> int:
    """Return the smallest usual context that a run of this length needs."""
    n_tokens = n_prompt + n_decode + n_warmup + len(part_sizes(n_decode, _DECODE_PARTS)) + 1
    return -(-n_tokens // _CTX_STEP) * _CTX_STEP


@cleaned_up_when_ended()
def bench_model(
    path: str,
    planned: Planned,
    session: Session,
    *,
    n_prompt: int = 512,
    n_decode: int = 32,
    n_warmup: int = 1,
    repeat: int = 3,
    cold: bool = True,
    baseline: bool = False,
    limit_bytes: int | None = None,
    note: Callable[[str], None] = _log.info,
) -> Bench:
    """Measure `repeat` runs of each side.

    Raises UsageError when the runs do not fit into the context or memory cannot be limited,
    OutOfMemory when the paged side itself was killed at the limit, and whatever a run may raise.
    """
    n_decoded = n_warmup + n_decode + len(part_sizes(n_decode, _DECODE_PARTS))
    if n_prompt + n_decoded > session.n_ctx:
        raise UsageError(
            f"{n_prompt} tokens of prompt and {n_decoded} decoded ones (one after each pause that "
            f"measures the disk) are more than the context of {session.n_ctx}",
            hint="give a larger --ctx, or fewer tokens",
        )
    files = [os.path.abspath(file.path) for file in planned.catalog.files]
    # Pages that are cached already are charged to nobody: under a limit they would be a gift.
    drops = cold or limit_bytes is not None
    job = Job(
        model=os.path.abspath(path),
        side="paged",
        session=session,
        prompt=None,
        n_prompt=n_prompt,
        n_decode=n_decode,
        plan=planned.plan.to_json(),
        hardware=planned.hardware.to_json(),
        n_warmup=n_warmup,
        decode_parts=_DECODE_PARTS,
        warm_pass=not cold,
        repack=not _hooked(planned),
    )
    sides: tuple[Side, ...] = ("paged", "stock") if baseline else ("paged",)
    record_bytes = _record_bytes(planned)
    disk: list[DiskSample] = []
    runs, how = [], ""
    for i in range(repeat):
        for side in sides:
            note(f"run {i + 1} of {repeat}: {side}")
            samples: list[DiskSample] = []

            def measure_disk(to: list[DiskSample] = samples) -> None:
                to.append(disk_sample(files, planned.hardware, record_bytes))

            if side == "paged":
                disk.append(disk_sample(files, planned.hardware))
            if drops:
                drop_files(files)
            # Measuring through the page cache would change what a run has there.
            in_pauses = measure_disk if side == "paged" and disk[-1].direct else _rest
            with nullcontext() if limit_bytes is None else memory_group(limit_bytes) as group:
                run = _run(replace(job, side=side), files, group, in_pauses)
                how = group.how if group is not None else ""
            if side == "paged" and not samples:
                measure_disk()
            runs.append(replace(run, disk=tuple(samples)))
    return _result(planned, job, tuple(runs), tuple(disk), drops=drops, limit=how)


def _rest() -> None:
    """Do nothing in a pause."""


def _record_bytes(planned: Planned) -> int | None:
    """Return the bytes of the largest expert that is read on demand; None: there is none."""
    by_name = {tensor.name: tensor for tensor in planned.catalog.tensors}
    records = [
        sum(by_name[name].nbytes // by_name[name].n_experts for name in cache.tensors)
        for cache in planned.plan.expert_caches
    ]
    return max(records, default=None)


def worker_environ(side: Side) -> dict[str, str] | None:
    """Return the environment of a worker; None: this process's own.

    Stock llama.cpp runs as it does without us. Any import of nexus_ext.runtime, the worker's
    included, makes OpenMP's threads spin for less time than libgomp does by itself, unless the
    environment has a say; so it says what libgomp would do, unless the user has said something.
    """
    if side == "paged":
        return None
    environ = user_environ()
    if "OMP_WAIT_POLICY" not in environ:
        environ.setdefault("GOMP_SPINCOUNT", _LIBGOMP_SPIN_COUNT)
    return environ


def _run(
    job: Job, files: list[str], group: MemoryGroup | None, in_pauses: Callable[[], None]
) -> Run:
    cached = cached_bytes(files)
    try:
        report = run_worker(job, group, worker_environ(job.side), in_pauses)
    except WorkerDied as error:
        if not error.by_memory:
            raise
        if job.side == "paged":
            raise OutOfMemory(str(error), hint="give --ram less than --limit") from error
        return Run(job.side, died=str(error), cached_before_bytes=cached)
    loaded = report["load"] or {}
    peak, source = report["peak_bytes"], "VmHWM, mapped files included"
    if group is not None and group.usage().peak_bytes is not None:
        peak, source = group.usage().peak_bytes, "cgroup, page cache included"
    return Run(
        side=job.side,
        cached_before_bytes=cached,
        load_s=report["load_ns"] / 1e9,
        loaded_bytes=loaded.get("bytes_loaded"),
        loaded_s=loaded.get("load_s"),
        prefill=_phase(report["prefill"], len(report["prompt"])),
        decode=_phase(report["decode"], job.n_decode) if job.n_decode else None,
        token_s=tuple(ns / 1e9 for ns in report["token_ns"]),
        peak_bytes=peak,
        peak_source=source,
        chosen=tuple(report["chosen"]),
    )


def _phase(report: dict[str, Any], n_tokens: int) -> Phase:
    stats = report["stats"]
    return Phase(
        seconds=report["ns"] / 1e9,
        n_tokens=n_tokens,
        engine_read_bytes=stats["bytes_read"] if stats else None,
        device_read_bytes=report["device_read_bytes"],
        wait_s=stats["wait_s"] if stats else None,
        compute_s=stats["compute_s"] if stats else None,
        prefetched_bytes=stats["prefetched_bytes"] if stats else None,
        prefetch_wasted_bytes=stats["prefetch_wasted_bytes"] if stats else None,
    )


def _result(
    planned: Planned,
    job: Job,
    runs: tuple[Run, ...],
    disk: tuple[DiskSample, ...],
    *,
    drops: bool,
    limit: str,
) -> Bench:
    paged = summarize("paged", runs)
    stock = summarize("stock", runs) if any(run.side == "stock" for run in runs) else None
    active = _hooked(planned)
    tiers = planned.plan.tiers
    return Bench(
        model=job.model,
        how=_how(drops, job.warm_pass, runs),
        limit=limit,
        session=job.session,
        n_prompt=job.n_prompt,
        n_decode=job.n_decode,
        n_warmup=job.n_warmup,
        streamed_nbytes=sum(t.nbytes for t in planned.catalog.tensors if tiers[t.name] == "nvme"),
        io_mode=planned.io_mode if active else None,
        disk=disk,
        runs=runs,
        paged=paged,
        stock=stock,
        bound=bound_of(paged, runs) if active else None,
        shares=shares_of(runs) if active else (),
        loading=loading_of(runs, disk) if active else None,
        decode_ratio=_ratio(paged.decode_tok_s, stock.decode_tok_s if stock else None),
        prefill_ratio=_ratio(paged.prefill_tok_s, stock.prefill_tok_s if stock else None),
        notes=tuple(_notes(planned, runs)),
    )


def _hooked(planned: Planned) -> bool:
    """Whether anything of ours runs: what fits is left to llama.cpp as it comes."""
    streams = not planned.plan.everything_fits or planned.catalog.container != "gguf"
    return streams or takes_over(planned.catalog, planned.plan)


def summarize(side: Side, runs: tuple[Run, ...]) -> Summary:
    """Return what the runs of one side come to."""
    mine = [run for run in runs if run.side == side]
    alive = [run for run in mine if not run.died]
    prefill = [run.prefill for run in alive if run.prefill is not None]
    decode = [run.decode for run in alive if run.decode is not None]
    read = [n / phase.n_tokens for phase in decode if (n := disk_read(phase)) is not None]
    asked = [(phase.engine_read_bytes or 0) / phase.n_tokens for phase in decode]
    return Summary(
        side=side,
        n_runs=len(mine),
        n_died=len(mine) - len(alive),
        died=next((run.died for run in mine if run.died), ""),
        load_s=Spread.of([run.load_s for run in alive]) if alive else None,
        prefill_tok_s=Spread.of([phase.tok_s for phase in prefill]) if prefill else None,
        decode_tok_s=Spread.of([phase.tok_s for phase in decode]) if decode else None,
        read_per_token_bytes=statistics.median(read) if read else None,
        engine_per_token_bytes=statistics.median(asked) if asked else 0.0,
        peak_bytes=max((run.peak_bytes for run in alive), default=None),
        peak_source=alive[0].peak_source if alive else "",
    )


def disk_read(phase: Phase) -> int | None:
    """Return the bytes that came from the disk: the kernel's count, else the engine's."""
    if phase.device_read_bytes is not None:
        return phase.device_read_bytes
    return phase.engine_read_bytes


def bound_of(summary: Summary, runs: tuple[Run, ...]) -> Bound | None:
    """Return the bound of decoding; None when it did not read from the disk, or hardly."""
    read = summary.read_per_token_bytes
    if not read or read < summary.engine_per_token_bytes / 2:
        return None  # the page cache served the rest: another bound, which nobody measured
    alive = [run for run in runs if run.side == summary.side and not run.died]
    rate = Spread.of([sample.bytes_s for run in alive for sample in run.disk])
    reached = [
        (disk_read(run.decode) or 0) / _disk_rate(run) / run.decode.seconds
        for run in alive
        if run.decode is not None
    ]
    return Bound(read, rate, rate.median / read, Spread.of(reached))


def _disk_rate(run: Run) -> float:
    """Return the bytes a second that the disk gave while this run went on."""
    return statistics.median(sample.bytes_s for sample in run.disk)


def shares_of(runs: tuple[Run, ...]) -> tuple[Share, ...]:
    """Return how well the paged runs overlapped reading with computing."""
    alive = [run for run in runs if run.side == "paged" and not run.died]
    found = []
    for name, phases in (
        ("prefill", [(run, run.prefill) for run in alive]),
        ("decode", [(run, run.decode) for run in alive]),
    ):
        known = [(r, p) for r, p in phases if p is not None and p.compute_s is not None]
        if not known:
            continue
        run, phase = sorted(known, key=lambda pair: pair[1].seconds)[len(known) // 2]
        read_s, compute_s = (disk_read(phase) or 0) / _disk_rate(run), phase.compute_s or 0.0
        fraction = max(read_s, compute_s) / phase.seconds
        found.append(Share(name, read_s, compute_s, phase.seconds, fraction))
    return tuple(found)


def loading_of(runs: tuple[Run, ...], disk: tuple[DiskSample, ...]) -> Loading | None:
    """Return how fast the paged runs read what stays resident; None: nothing does."""
    loads = [(run.loaded_bytes, run.loaded_s) for run in runs if run.loaded_bytes and run.loaded_s]
    if not loads:
        return None
    speed = Spread.of([nbytes / seconds for nbytes, seconds in loads if nbytes and seconds])
    rate = statistics.median(sample.bytes_s for sample in disk)
    return Loading(loads[0][0] or 0, speed, speed.median / rate)


def _ratio(a: Spread | None, b: Spread | None) -> float | None:
    return a.median / b.median if a is not None and b is not None else None


def _how(drops: bool, warm_pass: bool, runs: tuple[Run, ...]) -> str:
    if not drops:
        return "warm: the page cache as it was; the prompt was evaluated once before measuring"
    left = [run.cached_before_bytes for run in runs if run.cached_before_bytes is not None]
    told = f", {max(left)} bytes were still cached at most" if left else ""
    text = f"page cache of the model's files dropped before each run (POSIX_FADV_DONTNEED){told}"
    return f"warm after a cold load: {text}" if warm_pass else f"cold: {text}"


def _notes(planned: Planned, runs: tuple[Run, ...]) -> list[str]:
    notes = list(planned.plan.notes)
    if not _hooked(planned):
        notes.append("Everything fits: the paged side is llama.cpp as it comes, nothing is hooked.")
    if not all(sample.direct for run in runs for sample in run.disk):
        notes.append("The disk was measured through the page cache; the bound may be too high.")
    for run in runs:
        phase = run.decode
        if phase is None or not phase.engine_read_bytes or phase.device_read_bytes is None:
            continue
        seen = phase.device_read_bytes / phase.engine_read_bytes
        if abs(seen - 1) > _AGREE:
            notes.append(
                f"While decoding, the engine read {phase.engine_read_bytes} bytes and the device "
                f"gave {phase.device_read_bytes}: "
                + ("the page cache served the rest." if seen < 1 else "the kernel read ahead.")
            )
            break
    chosen = {run.chosen for run in runs if not run.died}
    if len(chosen) > 1:
        notes.append("The runs did not choose the same tokens: run `nexus verify` on this model.")
    return notes
