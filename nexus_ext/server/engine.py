"""The multiplexer, made of a configuration and a library."""

from __future__ import annotations

from nexus_ext.errors import UsageError
from nexus_ext.hardware.memory import available_bytes
from nexus_ext.multiplexer.engine import Multiplexer
from nexus_ext.multiplexer.settings import ModelSpec, Settings
from nexus_ext.server.config import Config, ModelConfig
from nexus_ext.store import Library

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
        max_queue=engine.max_queue,
        keep_alive_s=engine.keep_alive_s,
        session_ram_bytes=engine.sessions_ram,
        session_disk_bytes=engine.sessions_disk,
        session_directory=engine.sessions,
    )

    def find(name: str) -> ModelSpec:
        stored = library.find(name)
        full = str(stored.name)
        own = config.model.get(full) or config.model.get(name) or ModelConfig()
        asked = stored.parameters.get("num_ctx")
        return ModelSpec(
            name=full,
            path=stored.path,
            n_ctx=own.n_ctx if own.n_ctx is not None or not isinstance(asked, int) else asked,
            n_parallel=own.n_parallel,
            kv_type=own.kv_type,
            keep_alive_s=own.keep_alive_s,
            pinned=own.pinned,
            share_bytes=own.share,
            priority=own.priority,
        )

    return Multiplexer(find, settings)


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
