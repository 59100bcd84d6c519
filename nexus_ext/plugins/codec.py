"""Codecs of plugins, held to what a codec must do: files stay lossless, whatever a plugin does.

What is encoded is decoded again at once and compared. A codec that fails there is disabled, and
chunks are stored as they are from then on: the file is larger, and right.
"""

from __future__ import annotations

from typing import Any, Final

from nexus_ext.codecs import Codec, is_codec_name
from nexus_ext.errors import FormatError
from nexus_ext.plugin_registry import describe, show
from nexus_ext.plugins.asking import Asking, Rubbish

CODEC: Final = "nexus_codec"


def accept_codec(answer: object) -> Codec:
    """Return a codec whose name files can have; Rubbish for anything else."""
    if isinstance(answer, Codec):
        name: object = answer.name
        if type(name) is str and is_codec_name(name):
            return answer
    raise Rubbish(f"returned {show(answer)}, which is no Codec")


class GuardedCodec:
    """A plugin's codec that cannot spoil a file."""

    def __init__(self, codec: Codec, plugin: str, plugins: Asking) -> None:
        self.name = codec.name
        self.native: object = getattr(codec, "native", None)  # see nexus_ext.native_codecs
        self._codec = codec
        self._plugin = plugin
        self._plugins = plugins

    def encode(self, raw: memoryview, type_name: str) -> bytes:
        """Return `raw` encoded; as it is, which no reader takes for smaller, after a failure."""

        def call() -> bytes:
            encoded: Any = self._codec.encode(raw, type_name)
            if not isinstance(encoded, (bytes, bytearray)):
                raise Rubbish(f"encoded {len(raw)} bytes as {show(encoded)}, which are no bytes")
            stored = bytes(encoded)
            if len(stored) < len(raw):  # else it is stored raw
                back = bytearray(len(raw))
                self._codec.decode(memoryview(stored), memoryview(back))
                if back != raw:
                    raise Rubbish(f"decodes other bytes than it encoded (of {type_name or 'rest'})")
            return stored

        return self._plugins.guarded(self._plugin, CODEC, call, bytes(raw))

    def decode(self, stored: memoryview, out: memoryview) -> None:
        """Fill `out`; FormatError for what does not decode, whatever the plugin raises."""
        try:
            self._codec.decode(stored, out)
        except FormatError:
            raise
        except (Exception, SystemExit) as error:
            self._plugins.note(self._plugin, CODEC, f"raised {describe(error)} while decoding")
            raise FormatError(
                f"{self.name}: {len(stored)} bytes cannot be decoded: the plugin "
                f"{self._plugin!r} raised {describe(error)}",
                hint="update the plugin, or use the file that this one was made of",
            ) from error
