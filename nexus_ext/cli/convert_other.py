"""`nexus convert` to and from containers of plugins."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from nexus_ext.errors import NexusError, PluginError

if TYPE_CHECKING:
    from nexus_ext.cli.convert import Meter, Wishes
    from nexus_ext.formats.nxf_convert import Report


def to_other(source: str, target: str, wishes: Wishes, meter: Meter) -> Report | None:
    """Write `source` with the writer of a plugin; None when no writer has the suffix of `target`.

    Raises what the writer says (WriteFailed, UsageError), and PluginError for anything else that it
    does: a model was asked for in its container, which nobody else can write.
    """
    from nexus_ext.formats.nxf_convert import Report
    from nexus_ext.formats.sources import open_source
    from nexus_ext.plugins import plugins
    from nexus_ext.plugins.containers import WRITER, writer_for

    found = writer_for(target)
    if found is None:
        return None
    plugin, writer = found
    opened = open_source(source, plugins().codecs())

    def write() -> list[str]:
        written = writer.write(opened, target, overwrite=wishes.overwrite, progress=meter)
        paths = [os.fspath(path) for path in written]
        if not paths or not all(os.path.exists(path) for path in paths):
            raise ValueError(f"it says that it wrote {paths!r}")
        return paths

    try:
        nothing: list[str] = []
        paths = plugins().guarded(plugin, WRITER, write, nothing, passes=(NexusError,))
        if not paths:
            raise PluginError(
                f"the plugin {plugin!r} could not write {target}",
                hint="`nexus plugins` says why; convert to .nxf or .gguf instead",
            )
        return Report(
            paths=tuple(paths),
            nbytes=opened.catalog.nbytes,
            file_nbytes=sum(os.path.getsize(path) for path in paths),
            resumed_nbytes=0,
            sha256=(),
            tensors=(),
        )
    finally:
        opened.close()


def other_to_gguf(source: str, target: str, wishes: Wishes, meter: Meter) -> Report:
    """Write a model that a plugin reads as a GGUF."""
    from nexus_ext.formats import open_model
    from nexus_ext.formats.foreign import ForeignSource
    from nexus_ext.formats.nxf_convert import Report

    opened = ForeignSource(source, open_model(source))
    try:
        total = opened.files[0].nbytes
        for done in opened.write_gguf(target, overwrite=wishes.overwrite):
            meter(done, total)
        return Report(
            paths=(target,),
            nbytes=opened.catalog.nbytes,
            file_nbytes=total,
            resumed_nbytes=0,
            sha256=(),
            tensors=(),
        )
    finally:
        opened.close()
