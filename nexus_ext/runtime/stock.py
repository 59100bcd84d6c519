"""The unmodified class of llama-cpp-python, comparable bit by bit with a paged run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nexus_ext import core
from nexus_ext.formats import open_model
from nexus_ext.runtime.amx import amx_works
from nexus_ext.runtime.llama_log import load_failed, reasons_heard
from nexus_ext.runtime.loading import loads
from nexus_ext.runtime.manifest import manifest_text
from nexus_ext.types import Catalog


@dataclass(frozen=True, slots=True)
class _NoAreas:
    """Nothing is streamed."""

    ring_bytes: int = 0
    slab_bytes: int = 0
    scratch_bytes: int = 0


def stock_llama(path: str, *, repack: bool = False, **arguments: Any) -> Any:
    """Return `llama_cpp.Llama(path, **arguments)` with weights in plain CPU buffers.

    By default llama.cpp may repack weights for the CPU at hand, and products of repacked weights
    round differently: `repack` lets it, where that works. Everything else is as the user would get
    it. An NXF, which llama.cpp cannot open, is decoded into its buffers. Of a split model `path`
    may be any part. Raises FormatError for what llama.cpp cannot load.
    """
    import llama_cpp

    extra_buffers = repack and amx_works() is not False
    catalog = open_model(path)
    with (
        _decoded(catalog) as model,
        loads(model, extra_buffers=extra_buffers, paged=False),
        reasons_heard() as reasons,
    ):
        first = path if model is not None else catalog.files[0].path
        try:
            return llama_cpp.Llama(first, **arguments)
        except ValueError as error:
            raise load_failed(path, reasons, str(error)) from error


@contextlib.contextmanager
def _decoded(catalog: Catalog) -> Iterator[core.Model | None]:
    if catalog.container == "gguf":
        yield None
        return
    tiers = {tensor.name: "host" for tensor in catalog.tensors}
    model = core.Model(manifest_text(catalog, tiers, _NoAreas(), "buffered", ()), catalog.header)
    try:
        yield model
    finally:
        model.release()
