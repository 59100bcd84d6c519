"""From what the user allows and what the machine has to the bytes that weights may take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from nexus_ext.errors import UsageError
from nexus_ext.placement.mip import Limits
from nexus_ext.placement.plan import IO_MODES, PlanRequest
from nexus_ext.units import format_bytes

if TYPE_CHECKING:
    from nexus_ext.hardware.profile import Gpu, HardwareProfile

DEFAULT_SHARE: Final = (4, 5)  # of the memory that is available, when no budget is given
# Page tables take 8 bytes a page, and the kernel's bookkeeping about as much again.
_PER_KERNEL_BYTE: Final = 512


@dataclass(frozen=True, slots=True)
class Allowance:
    """The budgets, and the parts of them that are not for weights."""

    ram_bytes: int | None
    weights_bytes: int | None
    process_bytes: int  # compute buffers and runtime
    gpu: Gpu | None
    gpu_bytes: int
    notes: tuple[str, ...]
    residual_bytes: int = 0  # of both budgets, beside the weights

    @property
    def limits(self) -> Limits:
        room = None
        if self.ram_bytes is not None:
            room = self.ram_bytes - kernel_bytes(self.ram_bytes) - self.process_bytes
            room -= self.residual_bytes
        weights = self.weights_bytes
        if weights is not None:
            weights -= self.residual_bytes
        unified = self.gpu is not None and self.gpu.unified
        return Limits(weights, room, self.gpu_bytes, unified)

    def ram_for(self, need_bytes: int) -> int:
        """Return the smallest RAM budget that leaves `need_bytes` beside process and kernel."""
        need = need_bytes + self.process_bytes
        ram = need + need // (_PER_KERNEL_BYTE - 1)
        while ram - kernel_bytes(ram) < need:
            ram += 1
        while ram > 0 and ram - 1 - kernel_bytes(ram - 1) >= need:
            ram -= 1
        return ram


def kernel_bytes(ram_bytes: int) -> int:
    """Return what the kernel takes to keep `ram_bytes` mapped."""
    return -(-ram_bytes // _PER_KERNEL_BYTE)


def check(request: PlanRequest) -> None:
    """Raise UsageError for a request that no model and no machine could meet."""
    for name, least in (
        ("n_ctx", 0),
        ("n_batch", 1),
        ("n_ubatch", 0),
        ("n_seq_max", 1),
        ("n_threads", 0),
        ("n_outputs_max", 0),
    ):
        value = getattr(request, name)
        if value < least:
            raise UsageError(f"{name} is {value}, less than {least}", hint=f"Raise {name}.")
    for name in ("ram_bytes", "weights_bytes", "gpu_bytes", "residual_bytes"):
        value = getattr(request, name)
        if value is not None and value < 0:
            raise UsageError(f"{name} is {value}, which is negative", hint=f"Raise {name}.")
    if request.io_mode not in IO_MODES:
        raise UsageError(
            f"io_mode is {request.io_mode!r}, which does not exist",
            hint=f"Use one of {', '.join(IO_MODES)}.",
        )


def allowance(request: PlanRequest, hardware: HardwareProfile, process_bytes: int) -> Allowance:
    """Return the budgets of `request` on `hardware`."""
    memory = hardware.memory
    available = memory.available_bytes
    if memory.limit_bytes is not None:
        available = min(available, memory.limit_bytes)
    ram, notes = request.ram_bytes, []
    if ram is None and request.weights_bytes is None:
        ram = available * DEFAULT_SHARE[0] // DEFAULT_SHARE[1]
        notes.append(
            f"No budget was given: {format_bytes(ram)}, 80 % of the "
            f"{format_bytes(available)} that are available, is used."
        )
    elif ram is not None and ram > available:
        notes.append(
            f"The budget of {format_bytes(ram)} is more than the "
            f"{format_bytes(available)} that are available."
        )
    gpu, gpu_bytes = _gpu(request, hardware.gpus)
    if gpu is not None and len(hardware.gpus) > 1:
        notes.append(f"Of {len(hardware.gpus)} GPUs only {gpu.name} is used.")
    return Allowance(
        ram,
        request.weights_bytes,
        process_bytes,
        gpu,
        gpu_bytes,
        tuple(notes),
        request.residual_bytes,
    )


def _gpu(request: PlanRequest, gpus: Sequence[Gpu]) -> tuple[Gpu | None, int]:
    if request.gpu_bytes == 0 or not gpus:
        if request.gpu_bytes:
            raise UsageError(
                f"gpu_bytes is {request.gpu_bytes}, but the machine has no GPU",
                hint="Leave gpu_bytes out, or probe a machine with a GPU.",
            )
        return None, 0
    # One GPU only: splitting layers over several is llama.cpp's own business.
    usable = [min(gpu.working_set_bytes or gpu.total_bytes, gpu.free_bytes) for gpu in gpus]
    best = max(range(len(gpus)), key=lambda i: usable[i])
    if request.gpu_bytes is None:
        return gpus[best], usable[best]
    return gpus[best], min(usable[best], request.gpu_bytes)
