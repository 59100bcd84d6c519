"""Streamed against resident: are the logits of one model the same, bit by bit?

The reference is stock llama.cpp with weights in plain CPU buffers (repacked weights round
differently) and the same attention and batch sizes. Each side runs in a process of its own, one
after the other, so that both fit; the streamed side decodes along the reference's tokens, so that a
difference in one token does not make all later ones incomparable. Logits meet as files of raw
float32 and are compared row by row, never held in memory together.

Says nothing about speed, and nothing about the quality of a model.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from nexus_ext.errors import DoesNotFit, UsageError
from nexus_ext.formats import open_model
from nexus_ext.hardware import HardwareProfile
from nexus_ext.placement import Plan, PlanRequest
from nexus_ext.runtime.interrupts import cleaned_up_when_ended
from nexus_ext.runtime.planning import Planned, hardware_profile, plan_model
from nexus_ext.runtime.scratch import scratch_directory
from nexus_ext.runtime.worker import Job, run_worker, session_of
from nexus_ext.units import format_bytes

_log = logging.getLogger("nexus_ext.verify")

_FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True)
class Difference:
    """One position whose logits are not the same."""

    phase: Literal["prompt", "decode"]
    position: int  # in the context, 0 is the first token of the prompt
    token: int  # evaluated at that position
    n_different: int  # of the logits of this position
    max_abs_diff: float  # NaN when a logit is not a number on one side only


@dataclass(frozen=True, slots=True)
class Comparison:
    """What the two files of logits have in common."""

    n_positions: int
    n_values: int
    first: Difference | None
    n_positions_different: int
    n_values_different: int
    max_abs_diff: float

    @property
    def identical(self) -> bool:
        return self.first is None


@dataclass(frozen=True, slots=True)
class Verification:
    """The outcome for one model and one plan."""

    model: str
    comparison: Comparison
    n_prompt: int
    n_decode: int
    n_vocab: int
    same_choices: bool  # greedy decoding would have picked the same tokens
    streamed_nbytes: int  # of weights that were not resident
    resident_nbytes: int
    streamed_read_bytes: int  # while the streamed side computed
    io_mode: str
    flash_attn: bool

    @property
    def identical(self) -> bool:
        return self.comparison.identical


def compare_logits(
    reference: str | os.PathLike[str],
    streamed: str | os.PathLike[str],
    *,
    n_vocab: int,
    n_prompt: int,
    tokens: tuple[int, ...],
) -> Comparison:
    """Compare two files of float32 logits, shape (len(tokens), n_vocab), bit by bit.

    Bits, not values: 0.0 and -0.0 differ, and equal NaNs do not. Raises UsageError when a file does
    not have that shape.
    """
    import numpy as np

    row_bytes = n_vocab * _FLOAT_BYTES
    for path in (reference, streamed):
        size = os.path.getsize(path)
        if size != len(tokens) * row_bytes:
            raise UsageError(
                f"{os.fspath(path)} has {size} bytes, not {len(tokens)} rows of {n_vocab} logits"
            )
    first: Difference | None = None
    n_positions = n_values = 0
    largest = 0.0
    with open(reference, "rb") as a, open(streamed, "rb") as b:
        for position, token in enumerate(tokens):
            left, right = a.read(row_bytes), b.read(row_bytes)
            if left == right:
                continue
            x = np.frombuffer(left, np.float32).astype(np.float64)
            y = np.frombuffer(right, np.float32).astype(np.float64)
            differs = np.frombuffer(left, np.uint32) != np.frombuffer(right, np.uint32)
            with np.errstate(invalid="ignore"):
                size_of = float(np.max(np.abs(x - y)[differs]))
            n_different = int(np.count_nonzero(differs))
            if first is None:
                phase: Literal["prompt", "decode"] = "prompt" if position < n_prompt else "decode"
                first = Difference(phase, position, token, n_different, size_of)
            n_positions += 1
            n_values += n_different
            largest = size_of if size_of != size_of else max(largest, size_of)
    return Comparison(len(tokens), len(tokens) * n_vocab, first, n_positions, n_values, largest)


def plan_to_verify(
    path: str,
    request: PlanRequest,
    *,
    hardware_file: str | None = None,
    plan: Plan | str | None = None,
) -> Planned:
    """Return a plan that streams something.

    Without a budget or a plan: half of the weights resident, the other half streamed, or as much as
    the smallest possible budget leaves. Raises UsageError when the budget given streams nothing.
    """
    hardware = hardware_profile(path, file=hardware_file)
    if plan is None and request.ram_bytes is None and request.weights_bytes is None:
        planned = _stream_half(path, request, hardware)
    else:
        planned = plan_model(path, request, hardware=hardware, plan=plan)
    if planned.plan.everything_fits:
        raise UsageError(
            f"nothing of {path} is streamed with this budget, so there is nothing to compare",
            hint="give a smaller one, for instance --weights "
            f"{format_bytes(planned.catalog.nbytes // 2).replace(' ', '')}",
        )
    return planned


def _stream_half(path: str, request: PlanRequest, hardware: HardwareProfile) -> Planned:
    half = open_model(path).nbytes // 2
    try:
        return plan_model(path, replace(request, weights_bytes=half), hardware=hardware)
    except DoesNotFit as error:
        smallest = replace(request, weights_bytes=error.smallest_bytes)
        return plan_model(path, smallest, hardware=hardware)


@cleaned_up_when_ended()
def verify_model(
    path: str,
    planned: Planned,
    request: PlanRequest,
    *,
    prompt: str | None = None,
    n_prompt: int = 64,
    n_decode: int = 32,
    scratch_dir: str | None = None,
    note: Callable[[str], None] = _log.info,
) -> Verification:
    """Run a model both ways and compare the logits of every position.

    `prompt` is a text, else `n_prompt` arbitrary tokens are taken. Files of logits go to
    `scratch_dir` (default: the system's), and are removed. Raises UsageError when they would not
    fit there, and whatever a run may raise.
    """
    path = os.path.abspath(path)
    session = session_of(request, planned)
    if prompt is None and n_prompt + n_decode > session.n_ctx:
        raise UsageError(
            f"{n_prompt} tokens of prompt and {n_decode} decoded ones are more than the context "
            f"of {session.n_ctx}",
            hint="give a larger --ctx, or fewer tokens",
        )
    with scratch_directory("nexus-verify-", scratch_dir) as directory:
        _check_space(directory, planned, n_prompt if prompt is None else len(prompt), n_decode)
        files = [str(Path(directory, name)) for name in ("reference", "streamed")]
        job = Job(path, "stock", session, prompt, n_prompt, n_decode, logits=files[0])
        note("running stock llama.cpp, weights resident")
        reference = run_worker(job)
        tokens = (*reference["prompt"], *reference["chosen"][:n_decode])
        note("running with streamed weights")
        streamed = run_worker(
            replace(
                job,
                side="paged",
                plan=planned.plan.to_json(),
                hardware=planned.hardware.to_json(),
                tokens=tokens,
                logits=files[1],
            )
        )
        note(f"comparing {len(tokens)} positions")
        n_prompt = len(reference["prompt"])
        comparison = compare_logits(
            *files, n_vocab=reference["n_vocab"], n_prompt=n_prompt, tokens=tokens
        )
    tiers = planned.plan.tiers
    streamed_nbytes = sum(t.nbytes for t in planned.catalog.tensors if tiers[t.name] == "nvme")
    return Verification(
        model=path,
        comparison=comparison,
        n_prompt=n_prompt,
        n_decode=n_decode,
        n_vocab=reference["n_vocab"],
        same_choices=reference["chosen"] == streamed["chosen"],
        streamed_nbytes=streamed_nbytes,
        resident_nbytes=planned.catalog.nbytes - streamed_nbytes,
        streamed_read_bytes=sum(streamed[p]["stats"]["bytes_read"] for p in ("prefill", "decode")),
        io_mode=streamed["io_mode"],
        flash_attn=session.flash_attn,
    )


def _check_space(directory: str, planned: Planned, n_prompt: int, n_decode: int) -> None:
    rows = 2 * (n_prompt + n_decode)
    needed = rows * planned.catalog.shape.n_vocab * _FLOAT_BYTES
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise UsageError(
            f"the logits of both runs take {format_bytes(needed)}, and {directory} has "
            f"{format_bytes(free)}",
            hint="name a larger place with --scratch, or compare fewer tokens",
        )
