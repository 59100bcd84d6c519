"""Model file formats: from the header of a file to a `Catalog`, without reading a weight."""

from __future__ import annotations

from nexus_ext.formats.gguf import open_gguf

__all__ = ["open_gguf"]
