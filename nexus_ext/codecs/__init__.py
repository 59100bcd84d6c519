"""Lossless codecs of weights: bytes to fewer bytes and back, by name.

Knows nothing of files and containers. `builtin()` has what is installed with nexus_ext; a plugin
adds codecs through the hook `nexus_codecs` (see `nexus_ext.plugins.Plugins.codecs`).
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Mapping
from typing import Final, Protocol, runtime_checkable

from nexus_ext.errors import FormatError, UsageError

RAW: Final = "raw"
# Where the built-in codecs are, imported when they are used.
_BUILTIN: Final = {
    "ans": "nexus_ext.codecs.ans:AnsCodec",
    "zstd": "nexus_ext.codecs.zstd:ZstdCodec",
}
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,31}")


@runtime_checkable
class Codec(Protocol):
    """One way to store bytes. Called from several threads at once."""

    name: str  # [a-z0-9][a-z0-9._-]{0,31}; written into files

    def encode(self, raw: memoryview, type_name: str) -> bytes:
        """Return `raw` encoded; `type_name` is the ggml type of what it is a part of, or ""."""
        ...

    def decode(self, stored: memoryview, out: memoryview) -> None:
        """Fill `out`, whose size is that of the decoded bytes.

        Must raise FormatError for `stored` that does not decode to exactly so many bytes, and must
        not set aside memory by what `stored` says.
        """
        ...


class Codecs:
    """The codecs that a reader or a writer knows."""

    def __init__(self, added: Iterable[Codec] = ()) -> None:
        self._added: Mapping[str, Codec] = {codec.name: codec for codec in added}
        self._loaded: dict[str, Codec] = {}

    def names(self) -> tuple[str, ...]:
        """Return every known name, "raw" first."""
        return (RAW, *sorted({*_BUILTIN, *self._added}))

    def get(self, name: str) -> Codec:
        """Return a codec other than "raw"; UsageError for one that is not known or installed."""
        found = self._loaded.get(name) or self._added.get(name)
        if found is None:
            if name not in _BUILTIN:
                raise UsageError(
                    f"there is no codec {name!r}; known are {', '.join(self.names())}",
                    hint="Install the plugin that has it, or a newer nexus_ext.",
                )
            module, _, attribute = _BUILTIN[name].partition(":")
            found = getattr(importlib.import_module(module), attribute)()
            assert isinstance(found, Codec)
            self._loaded[name] = found
        return found


def is_codec_name(name: object) -> bool:
    """Tell whether files can name a codec so."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def builtin() -> Codecs:
    """Return the codecs that nexus_ext brings."""
    return Codecs()


def wrong_size(codec: str, found: int, expected: int) -> FormatError:
    """Return the error of a decoder that was left with other bytes than it was asked for."""
    return FormatError(f"{codec} decodes to {found} bytes, {expected} are expected")
