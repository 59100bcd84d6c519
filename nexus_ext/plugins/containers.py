"""Readers and writers of plugins: who opens a file that is neither GGUF nor NXF, who writes one.

`nexus_ext.formats.open_model` asks here, by name, when a file begins like nothing that it knows.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from typing import Any, Final

from nexus_ext.errors import FormatError, NexusError
from nexus_ext.formats.foreign import faults
from nexus_ext.plugin_registry import show
from nexus_ext.plugins import Rubbish, plugins
from nexus_ext.plugins.asking import of_kind
from nexus_ext.policies import FormatReader, FormatWriter
from nexus_ext.types import Catalog

READER: Final = "nexus_format_reader"
WRITER: Final = "nexus_format_writer"
START_NBYTES: Final = 4096
_OURS: Final = ("gguf", "nxf")
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,31}")
_SUFFIX: Final = re.compile(r"\.[a-z0-9][a-z0-9._-]{0,15}")


def open_container(path: str) -> Catalog | None:
    """Return what the first reader makes that claims `path`; None when nobody does.

    Raises what a reader says of a broken file: FormatError, ReadFailed. A reader that claims a file
    and then fails in another way, or returns what cannot be used, is disabled, and the next is
    asked.
    """
    kind: type[Any] = FormatReader
    start: bytes | None = None
    for plugin, reader in plugins().collect(READER, lambda got: _named(of_kind(got, kind))):
        if start is None:
            start = _start(path)

        def claims(reader: FormatReader = reader, start: bytes = start) -> bool:
            return reader.claims(path, start) is True

        def opened(reader: FormatReader = reader) -> Catalog:
            found = reader.open(path)
            if not isinstance(found, Catalog):
                raise Rubbish(f"opened {path} as {show(found)}, which is no Catalog")
            try:
                fault = faults(found)
            except FormatError as error:  # of the header that was made up, not of the file
                fault = str(error)
            if fault:
                raise Rubbish(f"opened {path}, but {fault}")
            return replace(found, container=reader.name)

        if plugins().guarded(plugin, READER, claims, False):
            found = plugins().guarded(plugin, READER, opened, None, passes=(NexusError,))
            if found is not None:
                return found
    return None


def writer_for(path: str) -> tuple[str, FormatWriter] | None:
    """Return (plugin, writer) of the first writer that `path` has a suffix of."""
    kind: type[Any] = FormatWriter
    for plugin, writer in plugins().collect(WRITER, lambda got: _suffixed(of_kind(got, kind))):
        if path.lower().endswith(tuple(writer.suffixes)):
            return plugin, writer
    return None


def suffixes() -> tuple[str, ...]:
    """Return the suffixes that writers of plugins have."""
    kind: type[Any] = FormatWriter
    found = plugins().collect(WRITER, lambda got: _suffixed(of_kind(got, kind)))
    return tuple(suffix for _, writer in found for suffix in writer.suffixes)


def _named(reader: FormatReader) -> FormatReader:
    if _NAME.fullmatch(reader.name) is None or reader.name in _OURS:
        raise Rubbish(f"has the name {reader.name!r}, which it cannot have")
    return reader


def _suffixed(writer: FormatWriter) -> FormatWriter:
    given: Any = writer.suffixes
    fine = isinstance(given, tuple) and all(
        type(s) is str and _SUFFIX.fullmatch(s) and s[1:] not in _OURS for s in given
    )
    if not fine or not given:
        raise Rubbish(f"has the suffixes {show(given)}, which it cannot have")
    return writer


def _start(path: str) -> bytes:
    """Return the first bytes of a file; b"" for a directory, or what cannot be read."""
    if os.path.isdir(path):
        return b""
    try:
        with open(path, "rb") as file:
            return file.read(START_NBYTES)
    except OSError:
        return b""
