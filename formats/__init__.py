"""Model file formats: from the header of a file to a `Catalog`, without reading a weight."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from nexus_ext.formats.gguf import open_gguf
from nexus_ext.formats.learned import Learned

if TYPE_CHECKING:
    from nexus_ext.types import Catalog


def open_model(path: str | os.PathLike[str]) -> Catalog:
    """Open a GGUF or an NXF model, told apart by how the file starts.

    Raises FormatError for a file that breaks its format, ReadFailed for one that cannot be read.
    """
    from nexus_ext.formats.nxf_file import is_nxf

    if is_nxf(path):
        from nexus_ext.formats.nxf import open_nxf

        return open_nxf(path)
    return open_gguf(path)


__all__ = ["Learned", "open_gguf", "open_model"]
