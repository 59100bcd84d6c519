"""Codecs of plugins that a model is stored with: made known to the core, after a trial."""

from __future__ import annotations

import logging

import xxhash

from nexus_ext import native_codecs
from nexus_ext.codecs import Codec
from nexus_ext.errors import FormatError, PluginError, ReadFailed, UsageError
from nexus_ext.plugins import plugins
from nexus_ext.types import Catalog, Chunk

_log = logging.getLogger("nexus_ext.plugins")


def know_codec(catalog: Catalog, tensor: str, chunk: Chunk) -> None:
    """Have chunks that are stored as this one is be decoded while they are streamed.

    A codec's function in C is used if it makes of this chunk what its function in Python does; if
    not, which is logged, the one in Python is. Raises UsageError when no plugin has the codec.
    """
    try:
        codec = plugins().codecs().get(chunk.codec)
    except UsageError as error:
        raise UsageError(
            f"{tensor} is stored with the codec {chunk.codec!r}, which nothing installed decodes",
            hint="install the plugin that has it, or convert the model where it is installed",
        ) from error
    if native_codecs.native_of(codec) is not None:
        try:
            native_codecs.register_codec(codec)  # which looks at the struct before it is used
            _try(codec, catalog, tensor, chunk)
        except PluginError as error:
            _log.error("%s: its function in Python decodes, which is slower", error)
        else:
            return
    native_codecs.register_codec(codec, in_python=True)


def _try(codec: Codec, catalog: Catalog, tensor: str, chunk: Chunk) -> None:
    """Raise PluginError when the function in C decodes a chunk to something else."""
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
    if xxhash.xxh3_64_intdigest(stored) != chunk.hash:
        return  # damage is found, and named, when it is read
    expected = bytearray(chunk.raw_nbytes)
    codec.decode(memoryview(stored), memoryview(expected))
    try:
        found = native_codecs.decode_natively(codec, stored, chunk.raw_nbytes)
    except FormatError as error:
        raise PluginError(
            f"codec {chunk.codec!r}: its function in C does not decode {tensor}"
        ) from error
    if found != bytes(expected):
        raise PluginError(
            f"codec {chunk.codec!r}: its function in C decodes {tensor} to other bytes than its "
            "function in Python"
        )
