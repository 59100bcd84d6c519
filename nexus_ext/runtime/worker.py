"""One side of a comparison in a process of its own: load, decode, measure, report.

`verify` and `bench` start one worker for each run, so that no side profits from what another left
in memory, and a worker may be killed by a memory limit without taking the comparison along. A job
goes in as a line of JSON on stdin, the report comes out as one on stdout; logits go to a file, row
by row. Where a job has pauses, "pause" comes out before, and a line on stdin ends each.

The parent's half (`run_worker`) needs no llama.cpp. Decoding goes through the low-level batch of
llama-cpp-python, the same for both sides: no sampler, no copy of the logits in between.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

from nexus_ext.errors import DoesNotFit, NexusError, UsageError
from nexus_ext.hardware import HardwareProfile, process_peak_bytes
from nexus_ext.placement import Plan, PlanRequest

if TYPE_CHECKING:
    import numpy as np

    from nexus_ext.runtime.memory_limit import MemoryGroup
    from nexus_ext.runtime.planning import Planned

Side = Literal["paged", "stock"]

_STDERR_LINES = 20  # of a worker that died, shown to the user
_PAUSE = "pause\n"
_SUMMED = ("bytes_read", "wait_s", "compute_s", "prefetched_bytes", "prefetch_wasted_bytes")


@dataclass(frozen=True, slots=True)
class Session:
    """How a model is opened; the same for both sides of a comparison."""

    n_ctx: int
    n_batch: int
    n_ubatch: int
    n_threads: int
    flash_attn: bool
    kv_type_k: str
    kv_type_v: str
    n_gpu_layers: int


@dataclass(frozen=True, slots=True)
class Job:
    """What one worker does: evaluate the prompt, then decode greedily or along given tokens."""

    model: str
    side: Side
    session: Session
    prompt: str | None  # text, or
    n_prompt: int  # so many arbitrary tokens
    n_decode: int
    plan: str | None = None  # JSON; paged side
    hardware: str | None = None  # JSON; paged side
    n_warmup: int = 0  # tokens that are decoded before decoding is measured
    # Decoding in so many parts, with a pause before each and behind the last one. The token after a
    # pause is not measured: what was read during the pause would be a gift. 0: no pauses.
    decode_parts: int = 0
    warm_pass: bool = False  # evaluate the prompt once before anything is measured
    tokens: tuple[int, ...] = ()  # decode along these (prompt included) instead of greedily
    logits: str | None = None  # file for the logits of every position
    repack: bool = False  # stock side: llama.cpp may repack weights, as it does by default


def session_of(request: PlanRequest, planned: Planned) -> Session:
    """Return how a model is opened so that it is what was planned for."""
    n_ctx = request.n_ctx or planned.catalog.shape.n_ctx_train
    n_batch = min(n_ctx, request.n_batch)
    return Session(
        n_ctx=n_ctx,
        n_batch=n_batch,
        n_ubatch=min(n_batch, request.n_ubatch),
        n_threads=request.n_threads or planned.hardware.cpu.n_usable_cores,
        flash_attn=request.flash_attn,
        kv_type_k=request.kv_type_k,
        kv_type_v=request.kv_type_v,
        n_gpu_layers=planned.plan.n_gpu_layers,
    )


class WorkerDied(NexusError, RuntimeError):
    """A worker ended without a report. `by_memory`: the kernel killed it at its memory limit."""

    code = "worker_died"

    def __init__(self, message: str, *, hint: str = "", by_memory: bool = False) -> None:
        super().__init__(message, hint=hint)
        self.by_memory = by_memory


# -- the parent's half ----------------------------------------------------------------------------


def run_worker(
    job: Job,
    group: MemoryGroup | None = None,
    environ: Mapping[str, str] | None = None,
    in_pauses: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Run one worker to its end, with `environ` (None: ours), and return its report.

    `in_pauses` is called whenever the worker pauses.

    Raises the NexusError that the worker met, and WorkerDied when it left no report.
    """
    command = [sys.executable, "-m", "nexus_ext.runtime.worker"]
    if group is not None:
        command = group.command(command)
    # A directory of its own: `-m` looks into the working directory for modules first.
    with tempfile.TemporaryDirectory(prefix="nexus-") as cwd, tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            cwd=cwd,
            env=environ,
        )
        try:
            out = _converse(child, job, in_pauses)
        except BaseException:
            child.kill()
            child.wait()
            raise
        errors.seek(0)
        text = errors.read().decode("utf-8", "replace")
    try:
        report = json.loads(out)
    except ValueError:
        raise _death(job, child.returncode, text, group) from None
    if "error" in report:
        raise _error_of(report["error"])
    if not isinstance(report, dict):
        raise _death(job, child.returncode, text, group)
    return report


def _converse(child: subprocess.Popen[bytes], job: Job, in_pauses: Callable[[], None]) -> bytes:
    """Return what the worker said at last; nothing where it died."""
    assert child.stdin is not None and child.stdout is not None
    out = b""
    with contextlib.suppress(BrokenPipeError), child.stdin, child.stdout:
        child.stdin.write(json.dumps(asdict(job)).encode() + b"\n")
        child.stdin.flush()
        for line in child.stdout:
            if line != _PAUSE.encode():
                out = line
                continue
            in_pauses()
            child.stdin.write(b"\n")
            child.stdin.flush()
    child.wait()
    return out


def _death(job: Job, status: int, text: str, group: MemoryGroup | None) -> WorkerDied:
    what = f"the {job.side} run of {job.model}"
    kills = group.usage().oom_kills if group else None
    # Without a count (systemd-run) a kill under a limit is the limit's.
    if group and status == -signal.SIGKILL and kills != 0:
        return WorkerDied(
            f"{what} was killed at its memory limit ({group.how})",
            hint="give it a larger limit",
            by_memory=True,
        )
    how = f"with status {status}"
    if status < 0:
        how = f"by signal {-status} ({signal.strsignal(-status)})"
    last = "\n".join(text.strip().splitlines()[-_STDERR_LINES:])
    return WorkerDied(
        f"{what} ended {how}" + (f"; its last words:\n{last}" if last else ""),
        hint="run `nexus doctor` with this model",
    )


def _error_of(fields: Mapping[str, Any]) -> NexusError:
    """Make the error that a worker reported again."""
    message, hint = str(fields["message"]), str(fields["hint"])
    if fields["code"] == DoesNotFit.code:
        return DoesNotFit(message, hint=hint, smallest_bytes=int(fields["smallest_bytes"]))
    known = {kind.code: kind for kind in _all_errors(NexusError)}
    return known.get(str(fields["code"]), NexusError)(message, hint=hint)


def _all_errors(kind: type[NexusError]) -> Iterator[type[NexusError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _all_errors(below)


# -- the worker's half ----------------------------------------------------------------------------


def device_read_bytes() -> int | None:
    """Return the bytes that this process has made block devices read; None: not told here.

    Source: proc_pid_io(5), read_bytes.
    """
    try:
        with open("/proc/self/io", encoding="ascii") as file:
            fields = dict(line.split(": ") for line in file.read().splitlines())
        return int(fields["read_bytes"])
    except (OSError, KeyError, ValueError):
        return None


class _Run:
    """A loaded model, paged or not, and where its time and reading went."""

    def __init__(self, job: Job) -> None:
        begin, read = time.perf_counter_ns(), device_read_bytes()
        self.llm = _open(job)
        self.load_ns = time.perf_counter_ns() - begin
        self.load_read_bytes = _since(read)
        self.handle: Any = getattr(self.llm, "nexus", None)
        self.loaded = None
        if self.handle is not None and self.handle.active:
            self.loaded = asdict(self.handle.stats())
        self.n_vocab = int(self.llm.n_vocab())
        self.n_past = 0

    @property
    def paged(self) -> bool:
        return self.handle is not None and bool(self.handle.active)

    def decode(self, tokens: Sequence[int], sink: BinaryIO | None = None) -> np.ndarray[Any, Any]:
        """Evaluate `tokens` at the next positions; return the logits of the last one.

        With `sink`, the logits of all of them go there. The result is valid until the next call.
        """
        import numpy as np

        batch, rows = self.llm._batch, None
        for begin in range(0, len(tokens), self.llm.n_batch):
            chunk = tokens[begin : begin + self.llm.n_batch]
            batch.set_batch(batch=chunk, n_past=self.n_past, logits_all=sink is not None)
            self.llm._ctx.decode(batch)
            n_rows = len(chunk) if sink is not None else 1
            rows = np.ctypeslib.as_array(self.llm._ctx.get_logits(), (n_rows, self.n_vocab))
            if sink is not None:
                sink.write(rows.data.cast("B"))
            self.n_past += len(chunk)
        assert rows is not None, "there is at least one token"
        last: np.ndarray[Any, Any] = rows[-1]
        return last

    def forget(self) -> None:
        """Start over at position 0."""
        self.llm._ctx.kv_cache_clear()
        self.n_past = 0

    def phase(self) -> _Phase:
        return _Phase(self)


class _Phase:
    """Measures from its creation to `report`."""

    def __init__(self, run: _Run) -> None:
        self._run = run
        if run.paged:
            run.handle.reset_stats()
        self._read = device_read_bytes()
        self._begin = time.perf_counter_ns()

    def report(self) -> dict[str, Any]:
        ns = time.perf_counter_ns() - self._begin
        stats = asdict(self._run.handle.stats()) if self._run.paged else None
        return {"ns": ns, "device_read_bytes": _since(self._read), "stats": stats}


def _since(before: int | None) -> int | None:
    now = device_read_bytes()
    return None if before is None or now is None else now - before


def _open(job: Job) -> Any:
    import llama_cpp.llama_cpp as bindings

    arguments = asdict(job.session)
    for which in ("k", "v"):
        name = arguments.pop(f"kv_type_{which}")
        arguments[f"type_{which}"] = getattr(bindings, f"GGML_TYPE_{name.upper()}")
    arguments |= {"n_threads_batch": job.session.n_threads, "seed": 0, "verbose": False}
    if job.side == "stock":
        from nexus_ext.runtime.stock import stock_llama

        return stock_llama(job.model, repack=job.repack, **arguments)
    from nexus_ext.runtime.llama import Llama

    assert job.plan is not None and job.hardware is not None, "a paged run follows a plan"
    hardware = HardwareProfile.from_json(job.hardware)
    return Llama(
        job.model,
        plan=Plan.from_json(job.plan),
        hardware=hardware,
        warm_start=False,  # a run says nothing about the ones before it
        **arguments,
    )


def prompt_tokens(llm: Any, job: Job) -> list[int]:
    """Return the tokens of the prompt: of its text, or arbitrary ones that are always the same."""
    if job.prompt is not None:
        tokens: list[int] = llm.tokenize(job.prompt.encode("utf-8"), add_bos=True, special=False)
        return tokens
    # Weyl sequence: spread over the whole vocabulary, the same on every machine.
    n_vocab = int(llm.n_vocab())
    return [(i + 1) * 2654435769 % 2**32 * n_vocab >> 32 for i in range(job.n_prompt)]


def part_sizes(n_tokens: int, n_parts: int) -> list[int]:
    """Return how many of `n_tokens` each part of decoding has: equally many, and at least one."""
    n_parts = max(1, min(n_parts, n_tokens))
    return [n_tokens // n_parts + (i < n_tokens % n_parts) for i in range(n_parts)]


def _together(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return one report of the phases that decoding was cut into."""
    read = [part["device_read_bytes"] for part in parts]
    stats = [part["stats"] for part in parts]
    return {
        "ns": sum(part["ns"] for part in parts),
        "device_read_bytes": None if None in read else sum(read),
        "stats": None if None in stats else {key: sum(s[key] for s in stats) for key in _SUMMED},
    }


def work(job: Job, pause: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Do one job and return its report. Raises NexusError."""
    run = _Run(job)
    n_prompt = len(job.tokens) - job.n_decode if job.tokens else 0
    tokens = list(job.tokens[:n_prompt]) if job.tokens else prompt_tokens(run.llm, job)
    if not tokens:
        raise UsageError("the prompt has no tokens", hint="give a longer prompt")
    parts = part_sizes(job.n_decode, job.decode_parts)
    n_tokens = len(tokens) + job.n_warmup + job.n_decode + (len(parts) if job.decode_parts else 0)
    if n_tokens > job.session.n_ctx:
        raise UsageError(
            f"{len(tokens)} tokens of prompt and {n_tokens - len(tokens)} decoded ones are more "
            f"than the context of {job.session.n_ctx}",
            hint="give a larger --ctx, or fewer tokens",
        )
    if job.warm_pass:
        run.decode(tokens)
        run.forget()
    with contextlib.ExitStack() as stack:
        sink = stack.enter_context(open(job.logits, "wb")) if job.logits else None
        prefill = run.phase()
        last = run.decode(tokens, sink)
        chosen, prefill_report = [int(last.argmax())], prefill.report()

        def decode(n: int) -> list[int]:
            """Decode n tokens; return how many ns each took."""
            taken = []
            for _ in range(n):
                begin = time.perf_counter_ns()
                following = job.tokens[n_prompt + len(chosen) - 1] if job.tokens else chosen[-1]
                chosen.append(int(run.decode([following], sink).argmax()))
                taken.append(time.perf_counter_ns() - begin)
            return taken

        token_ns, reports = [], []
        decode(job.n_warmup)
        for n in parts:
            if job.decode_parts:
                pause()
                decode(1)
            part = run.phase()
            token_ns += decode(n)
            reports.append(part.report())
        if job.decode_parts:
            pause()
    return {
        "active": run.paged,
        "n_vocab": run.n_vocab,
        "prompt": tokens,
        "chosen": chosen,  # greedily, after the prompt and after each token behind it
        "load_ns": run.load_ns,
        "load_read_bytes": run.load_read_bytes,
        "load": run.loaded,
        "prefill": prefill_report,
        "decode": _together(reports),
        "token_ns": token_ns,
        "peak_bytes": process_peak_bytes(),
        "io_mode": run.handle.io_mode if run.paged else None,
    }


def job_of(fields: Mapping[str, Any]) -> Job:
    """Return the job that `run_worker` wrote."""
    return Job(
        **{
            **fields,
            "session": Session(**fields["session"]),
            "tokens": tuple(fields["tokens"]),
        }
    )


def main() -> int:
    # llama.cpp and its Python binding may write to stdout, which belongs to the report.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as channel:
        os.dup2(2, 1)
        job = job_of(json.loads(sys.stdin.readline()))

        def pause() -> None:
            channel.write(_PAUSE)
            channel.flush()
            sys.stdin.readline()

        try:
            report = work(job, pause)
        except NexusError as error:
            named = {"code": error.code, "message": str(error), "hint": error.hint}
            if isinstance(error, DoesNotFit):
                named["smallest_bytes"] = str(error.smallest_bytes)
            report = {"error": named}
        channel.write(json.dumps(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
