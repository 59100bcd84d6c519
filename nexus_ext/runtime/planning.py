"""From a file and a wish to a plan: catalog, hardware, solver and I/O policy put together."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from nexus_ext import core
from nexus_ext.errors import DoesNotFit, UsageError
from nexus_ext.formats import open_model
from nexus_ext.formats.sections import read_section
from nexus_ext.hardware import HardwareProfile, load_profile, probe
from nexus_ext.hardware.disk import DirectIO
from nexus_ext.hardware.profile import Gpu
from nexus_ext.placement import Plan, PlanRequest
from nexus_ext.placement.check import missing_bytes
from nexus_ext.plugins import plugins
from nexus_ext.policies import IoInfo, IoMode
from nexus_ext.runtime import ggml
from nexus_ext.runtime.loadable import check_loadable
from nexus_ext.runtime.manifest import check_plan
from nexus_ext.types import Catalog
from nexus_ext.units import format_bytes


@dataclass(frozen=True, slots=True)
class Planned:
    """A model with its plan and everything that the plan was made from."""

    catalog: Catalog
    hardware: HardwareProfile
    plan: Plan
    io_mode: IoMode


def _gpus() -> list[Gpu]:
    return [
        Gpu(
            name=device.description or device.name,
            total_bytes=device.total_bytes,
            free_bytes=device.free_bytes,
            # Metal reports what it lets one process use as the total.
            working_set_bytes=device.total_bytes,
            unified=unified or device.name.lower().startswith("metal"),
        )
        for device, unified in ggml.gpus()
    ]


def _direct_io(path: str) -> DirectIO:
    found = core.direct_io(path)
    return DirectIO(found.direct, found.reason, found.offset_align, found.mem_align)


def hardware_profile(
    path: str | os.PathLike[str],
    *,
    file: str | None = None,
    refresh: bool = False,
    disk_seconds: float = 2.0,
) -> HardwareProfile:
    """Return this machine with the disk of `path`, or the machine that `file` describes.

    Measured bandwidths are taken from the cache when they are not too old. Raises UsageError,
    FormatError or ReadFailed.
    """
    if file is not None:
        return load_profile(file)
    return probe(
        path,
        disk_reader=core.read_disk,
        memory_bandwidth=core.memory_bandwidth,
        gpus=_gpus,
        direct_io=_direct_io,
        refresh=refresh,
        disk_seconds=disk_seconds,
    )


def plan_model(
    path: str | os.PathLike[str],
    request: PlanRequest,
    *,
    hardware: HardwareProfile | None = None,
    plan: Plan | str | os.PathLike[str] | None = None,
) -> Planned:
    """Read the header of a model and decide where its weights go.

    `plan` is a plan made before (or the file that holds it) instead of a new one. Raises
    FormatError, DoesNotFit (also when a file's plan has less room than the context takes),
    UsageError, or what a plugin's solver may raise.
    """
    catalog = open_model(os.fspath(path))
    check_loadable(catalog)
    hardware = hardware or hardware_profile(path)
    if plan is None:
        plan = plugins().solve(catalog, hardware, request)
    elif not isinstance(plan, Plan):
        file = Path(plan)
        plan = _read_plan(file)
        check_plan(catalog, plan)
        _check_room(file, plan, catalog, hardware, request)
    else:
        check_plan(catalog, plan)
    return Planned(catalog, hardware, plan, io_mode(catalog, hardware, plan))


def _check_room(
    file: Path, plan: Plan, catalog: Catalog, hardware: HardwareProfile, request: PlanRequest
) -> None:
    missing, ram = missing_bytes(plan, catalog, hardware, request), plan.budget.ram_bytes
    if missing and ram is not None:
        raise DoesNotFit(
            f"the plan {str(file)!r} has no room for a context of {request.n_ctx} tokens in "
            f"micro-batches of {request.n_ubatch}: {format_bytes(missing)} are missing in its "
            f"budget of {format_bytes(ram)}",
            hint="give the context, the batch and the KV types that the plan was made with, "
            "or make a plan for these",
            smallest_bytes=ram + missing,
        )


def _read_plan(file: Path) -> Plan:
    """Read the file that holds a plan, or an NXF with one as its section."""
    try:
        section = read_section(file, "plan") if file.exists() else None
        text = file.read_text(encoding="utf-8") if section is None else section.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"the plan {str(file)!r} cannot be read: {error}",
            hint="make one with `nexus plan MODEL -o FILE`",
        ) from error
    return Plan.from_json(text, source=str(file))


def io_mode(catalog: Catalog, hardware: HardwareProfile, plan: Plan) -> IoMode:
    """Return how streamed weights are to be read: as the plan says, else as the policy decides."""
    if plan.io_mode in ("direct", "buffered"):
        return plan.io_mode  # type: ignore[return-value]
    memory = hardware.memory
    limit_bytes = memory.limit_bytes
    if plan.budget.ram_bytes is not None:
        # A budget is a promise about this process; the page cache that it causes counts as well.
        limit_bytes = min(limit_bytes or plan.budget.ram_bytes, plan.budget.ram_bytes)
    return plugins().choose_io(
        IoInfo(
            streamed_bytes=sum(t.nbytes for t in catalog.tensors if plan.tiers[t.name] == "nvme"),
            resident_bytes=plan.ram_bytes,
            available_bytes=memory.available_bytes,
            limit_bytes=limit_bytes,
        )
    )
