"""The codec "blosc" for NXF files: bytes of blocks shuffled apart, then zstd.

nexus convert model.gguf model.nxf --codec blosc
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nexus_ext.hooks import hookimpl

if TYPE_CHECKING:
    from nexus_ext.hooks import Codec

nexus_plugin_api = 1


@hookimpl
def nexus_codec() -> Codec:
    """Bring the codec."""
    from nexus_codec_blosc.codec import BloscCodec

    return BloscCodec()
