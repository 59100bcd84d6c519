"""Codecs of plugins that a model is stored with: made known to the core, after a trial."""

from __future__ import annotations

from nexus_ext import native_codecs
from nexus_ext.errors import FormatError, PluginError, ReadFailed, UsageError
from nexus_ext.plugins import plugins
from nexus_ext.types import Catalog, Chunk


def know_codec(catalog: Catalog, tensor: str, chunk: Chunk) -> None:
    """Have chunks that are stored as this one is be decoded while they are streamed.

    A codec's function in C must make of this chunk what its function in Python does. Raises
    UsageError when no plugin has the codec, PluginError when it cannot be used.
    """
    try:
        codec = plugins().codecs().get(chunk.codec)
    except UsageError as error:
        raise UsageError(
            f"{tensor} is stored with the codec {chunk.codec!r}, which nothing installed decodes",
            hint="install the plugin that has it, or convert the model where it is installed",
        ) from error
    native_codecs.register_codec(codec)
    path = catalog.files[chunk.file].path
    try:
        with open(path, "rb") as file:
            file.seek(chunk.offset)
            stored = file.read(chunk.stored_nbytes)
    except OSError as error:
        raise ReadFailed(
            f"{path} cannot be read: {error.strerror}",
            hint="check the disk and the file",
            path=path,
            offset=chunk.offset,
            errno=error.errno or 0,
        ) from error
    try:
        found = native_codecs.decode_natively(codec, stored, chunk.raw_nbytes)
        expected = bytearray(chunk.raw_nbytes)
        codec.decode(memoryview(stored), memoryview(expected))
    except FormatError:
        return  # what is damaged is found, and named, when it is read
    if found is not None and found != expected:
        raise PluginError(
            f"codec {chunk.codec!r}: its function in C decodes {tensor} to other bytes than its "
            "function in Python",
            hint="update the plugin",
        )
