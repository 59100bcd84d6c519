"""The multiplexer, made of a configuration and a library."""

from __future__ import annotations

from collections.abc import Sequence

from nexus_ext.errors import UsageError
from nexus_ext.hardware.memory import available_bytes
from nexus_ext.multiplexer.engine import Multiplexer
from nexus_ext.multiplexer.settings import GpuBudget, ModelSpec, Settings
from nexus_ext.runtime import ggml
from nexus_ext.server.config import Config, ModelConfig
from nexus_ext.server.describe import catalog_of
from nexus_ext.store import Library, StoredModel
from nexus_ext.units import format_bytes

_PART_OF_FREE = 0.8


def make_engine(library: Library, config: Config) -> Multiplexer:
    """Return the engine of a server. Called inside of the event loop that uses it."""
    engine = config.engine
    settings = Settings(
        budget_bytes=budget_bytes(config),
        n_ctx=engine.n_ctx,
        n_parallel=engine.n_parallel,
        n_ubatch=engine.n_batch,
        n_threads=engine.n_threads,
        kv_type=engine.kv_type,
        kernels=engine.kernels,
        policy=engine.policy,
        warm_start=engine.warm_start,
        max_queue=engine.max_queue,
        keep_alive_s=engine.keep_alive_s,
        session_ram_bytes=engine.sessions_ram,
        session_disk_bytes=engine.sessions_disk,
        session_directory=engine.sessions,
        gpus=gpu_budgets(engine.gpu_budgets),
    )

    def find(name: str) -> ModelSpec:
        return spec_of(library.find(name), config)

    return Multiplexer(find, settings)


def spec_of(stored: StoredModel, config: Config) -> ModelSpec:
    """Return what the multiplexer is told of a model: its own section first, then what it brings
    along, then what holds for all. No context is longer by default than the model was trained for.
    """
    own = config.model.get(str(stored.name)) or config.model.get(stored.name.path) or ModelConfig()
    n_ctx = own.n_ctx
    if n_ctx is None:
        asked = stored.parameters.get("num_ctx")
        n_ctx = asked if isinstance(asked, int) else None
    if n_ctx is None:
        trained = catalog_of(stored).shape.n_ctx_train
        n_ctx = min(config.engine.n_ctx or trained, trained) if trained else None
    return ModelSpec(
        name=str(stored.name),
        path=stored.path,
        n_ctx=n_ctx,
        n_parallel=own.n_parallel,
        kv_type=own.kv_type,
        kernels=own.kernels,
        residual=own.residual,
        residual_share=own.residual_share,
        keep_alive_s=own.keep_alive_s,
        gpu=own.gpu,
        gpu_layers=own.gpu_layers,
        pinned=own.pinned,
        share_bytes=own.share,
        priority=own.priority,
    )


def gpu_budgets(asked: Sequence[int]) -> tuple[GpuBudget, ...]:
    """Return the budgets of the GPUs that llama.cpp lists, in its order; UsageError beyond them."""
    if not asked:
        return ()
    found = ggml.gpus()
    if len(asked) > len(found):
        raise UsageError(
            f"budgets are given for {len(asked)} GPUs, llama.cpp finds {len(found)} here",
            hint="`nexus probe` shows them; llama-cpp-python must be one that was built for them",
        )
    for number, (nbytes, (device, _)) in enumerate(zip(asked, found, strict=False)):
        if nbytes > device.total_bytes:
            raise UsageError(
                f"the budget of GPU {number} is {format_bytes(nbytes)}, {device.name} has "
                f"{format_bytes(device.total_bytes)}"
            )
    return tuple(
        GpuBudget(nbytes, unified) for nbytes, (_, unified) in zip(asked, found, strict=False)
    )


def budget_bytes(config: Config) -> int:
    """Return the bytes for models: what is configured, or most of what is free."""
    engine = config.engine
    if engine.budget is not None:
        if engine.ram is not None:
            raise UsageError("both ram and budget are given", hint="leave one of them out")
        return engine.budget
    if engine.ram is not None:
        return Settings.budget_of_ram(engine.ram)
    return Settings.budget_of_ram(int(available_bytes() * _PART_OF_FREE))
