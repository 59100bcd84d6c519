"""What is configured: of the multiplexer as a whole, and of each model."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nexus_ext.errors import UsageError
from nexus_ext.multiplexer.prefix import TILE
from nexus_ext.units import MIB

# Python, llama.cpp's libraries and a server, what the heap keeps of models that were unloaded, and
# what the kernel keeps of all that: 100 MiB were seen after a dozen loads.
PROCESS_BYTES: Final = 128 * MIB


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model as the store knows it. `find` of the multiplexer returns these."""

    name: str
    path: str
    n_ctx: int | None = None  # tokens of one sequence; None: as configured; 0: as trained
    n_parallel: int | None = None  # sequences side by side; None: as configured
    kv_type: str | None = None  # "f16", "f32", "bf16" or "q8_0" (keys only)
    kernels: str | None = None  # whose kernels multiply by ternary weights; None: as configured
    residual: str | None = None  # a file that corrects what quantization lost: changes answers
    residual_share: float | None = None  # of the input channels; None: `blueprint.RESIDUAL_SHARE`
    keep_alive_s: float | None = None  # None: as configured; below 0: for good
    gpu: int = 0  # which of `Settings.gpus` it uses
    gpu_layers: int | None = None  # on it; None: as many as its budget holds
    pinned: bool = False  # never evicted once it is loaded
    share_bytes: int = 0  # never evicted below this
    priority: int = 0  # the lowest is evicted first; the processor is shared 1 + priority : 1

    def __post_init__(self) -> None:
        for name in ("share_bytes", "priority", "gpu"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} of {self.name} is {getattr(self, name)}, less than 0")


@dataclass(frozen=True, slots=True)
class GpuBudget:
    """What models may take of one GPU.

    Counting and eviction are tested with GPUs that are described and not there; nothing here has
    been run on a real one.
    """

    nbytes: int  # weights, KV caches and compute buffers
    unified: bool = False  # it shares main memory: what it holds counts there as well


Find = Callable[[str], ModelSpec]
"""Returns the model of a name, or raises ModelNotFound. Called outside of the event loop."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How the multiplexer works. Bytes are of memory; see `of_ram` for a whole process."""

    budget_bytes: int  # for models, their contexts and saved states together
    n_ctx: int = 4096
    n_parallel: int = 4
    n_ubatch: int = 512
    n_threads: int = 0  # 0: as ggml chooses
    kv_type: str = "f16"
    kernels: str = "auto"  # or "ggml", "nexus": see `own_kernels.MODES`
    policy: str = "auto"  # how weights are read: "auto", "direct" or "buffered"
    warm_start: bool | None = None  # None: unless NEXUS_WARM_START is 0
    max_queue: int = 64  # requests that wait; one more is refused
    keep_alive_s: float = 300.0  # below 0: for good
    patience_s: float = 2.0  # a model that waits so long for memory gets the others to pause
    session_ram_bytes: int | None = None  # None: a sixteenth of the budget, at most 256 MiB
    session_disk_bytes: int = 0
    session_directory: str | os.PathLike[str] | None = None  # None: nothing goes to disk
    gpus: tuple[GpuBudget, ...] = ()  # in llama.cpp's order; none: no GPU is used

    def __post_init__(self) -> None:
        for name, least in (
            ("budget_bytes", 1),
            ("n_ctx", 0),
            ("n_parallel", 1),
            ("n_ubatch", 2 * TILE),
            ("n_threads", 0),
            ("max_queue", 1),
            ("session_disk_bytes", 0),
        ):
            if getattr(self, name) < least:
                raise UsageError(f"{name} is {getattr(self, name)}, less than {least}")
        if self.session_directory is not None and not Path(self.session_directory).is_dir():
            raise UsageError(
                f"session_directory {os.fspath(self.session_directory)!r} is no directory",
                hint="make it, or leave it out to keep saved states in memory only",
            )

    @classmethod
    def budget_of_ram(cls, ram_bytes: int) -> int:
        """Return what is left for models when the whole process may touch `ram_bytes`.

        Takes off the process itself, and what the kernel takes to keep the rest mapped (1/512).
        """
        left = ram_bytes - ram_bytes // 512 - PROCESS_BYTES
        if left <= 0:
            raise UsageError(
                f"{ram_bytes} bytes of memory are less than the process itself takes",
                hint=f"give it more than {PROCESS_BYTES // MIB} MiB",
            )
        return left

    @property
    def saved_bytes(self) -> int:
        """Memory that saved states may take: a part of the budget."""
        if self.session_ram_bytes is not None:
            return self.session_ram_bytes
        return min(self.budget_bytes // 16, 256 * MIB)
