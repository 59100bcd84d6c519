"""Is any size of the cache of experts slower than none? Memory in steps, both sides in turn.

    python -m tests.bench.cache_sizes --skew 0
    python -m tests.bench.cache_sizes --skew 1.6 --layers 12

Writes a mixture of experts (128 a layer, 8 a token, 4 bits; 0.33 GiB a layer) to `--dir`, removed
again. For weights from one token's experts to all of them, decodes in turn with
    planned  the plan that is made for that much memory: a cache where one is predicted to help
    none     no cache: whatever experts a token uses are read
    pinned   no cache either, but as many experts as fit stay in memory, whichever they are
A B C A B C, each run in a process of its own, reads around the page cache. `--skew` is how popular
some experts are; 0: none is, so that a cache knows nothing that pinning does not. Ratios are
medians of the rounds, above 1 where the plan is faster.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

from nexus_ext.formats import open_model
from nexus_ext.placement import Pin, PlanRequest
from nexus_ext.placement.experts import groups, slot_bytes
from nexus_ext.runtime.disk_sample import drop_files
from nexus_ext.runtime.planning import Planned, plan_model
from nexus_ext.runtime.worker import Job, run_worker, session_of
from nexus_ext.testing.synthetic import write_moe
from nexus_ext.units import format_bytes
from tests.bench.experts_against_stock import DIMS

SLOTS = (8, 10, 16, 32, 64, 96, 120, 128)  # of 128 experts
CACHES = "nexus_ext.placement.solver.experts.caches"  # what gives a plan its caches
SIDES = ("planned", "none", "pinned")


@dataclass(frozen=True, slots=True)
class Decoded:
    """What decoding took and read, a token."""

    seconds: float
    read_bytes: float


def planned_for(path: Path, request: PlanRequest, side: str) -> Planned:
    if side == "planned":
        return plan_model(path, request)
    with mock.patch(CACHES, return_value=()):
        pins = (Pin("_exps.weight", "nvme"),) if side == "none" else ()
        return plan_model(path, replace(request, pins=pins))


def decode(path: Path, request: PlanRequest, planned: Planned, n_warmup: int, n: int) -> Decoded:
    drop_files([str(path)])
    job = Job(
        model=str(path),
        side="paged",
        session=session_of(request, planned),
        prompt=None,
        n_prompt=8,
        n_decode=n,
        plan=planned.plan.to_json(),
        hardware=planned.hardware.to_json(),
        n_warmup=n_warmup,
    )
    report = run_worker(job)["decode"]
    read_bytes = report["stats"]["bytes_read"] if report["stats"] else 0  # None: all is resident
    return Decoded(report["ns"] / 1e9 / n, read_bytes / n)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--skew", type=float, default=0.0)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--warmup", type=int, default=90, help="tokens that fill the cache")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", default=None, help="where the model goes; a disk, not a tmpfs")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="nexus-bench-", dir=args.dir) as directory:
        path = Path(directory, "model.gguf")
        dims = replace(DIMS, n_layers=args.layers)
        write_moe(
            path, arch="gpt-oss", dims=dims, quant="Q8_0", expert_quant="Q4_0", skew=args.skew
        )
        catalog = open_model(path)
        per_slot = sum(slot_bytes(parts) for parts in groups(catalog.tensors))
        experts = {t.name for parts in groups(catalog.tensors) for t in parts}
        others = sum(t.nbytes for t in catalog.tensors if t.name not in experts)
        n_ctx = 8 + args.warmup + args.tokens + 8
        print(
            f"{format_bytes(os.path.getsize(path))}, {format_bytes(per_slot)} a slot in all layers"
        )
        print(f"{'weights':>10} {'slots':>5}", end="")
        print("".join(f"{side:>9} tok/s, MiB" for side in SIDES), " to none  to pinned")
        for slots in SLOTS:
            request = PlanRequest(
                weights_bytes=others + (64 << 20) + slots * per_slot,
                n_ctx=n_ctx,
                n_batch=64,
                n_ubatch=64,
                io_mode="direct",
                gpu_bytes=0,
            )
            plans = {side: planned_for(path, request, side) for side in SIDES}
            runs: dict[str, list[Decoded]] = {side: [] for side in SIDES}
            for _ in range(args.rounds):
                for side, planned in plans.items():
                    runs[side].append(decode(path, request, planned, args.warmup, args.tokens))
            given = max((cache.slots for cache in plans["planned"].plan.expert_caches), default=0)
            print(f"{format_bytes(request.weights_bytes or 0):>10} {given or '-':>5}", end="")
            for found in runs.values():
                seconds = statistics.median(run.seconds for run in found)
                mib = statistics.fmean(run.read_bytes for run in found) / 2**20
                print(f"{1 / seconds:13.2f} {mib:6.1f}", end="")
            for other in SIDES[1:]:
                pairs = zip(runs["planned"], runs[other], strict=True)
                print(f"{statistics.median(b.seconds / a.seconds for a, b in pairs):11.2f}", end="")
            print(flush=True)


if __name__ == "__main__":
    main()
