"""Model file formats: from the header of a file to a `Catalog`, without reading a weight."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

from nexus_ext.formats.gguf import open_gguf
from nexus_ext.formats.gguf_header import MAGIC
from nexus_ext.formats.learned import Learned

if TYPE_CHECKING:
    from nexus_ext.types import Catalog


def open_model(path: str | os.PathLike[str]) -> Catalog:
    """Open a GGUF or an NXF model, told apart by how the file starts, or one of a plugin's.

    Raises FormatError for a file that breaks its format, ReadFailed for one that cannot be read.
    """
    from nexus_ext.formats.nxf_file import is_nxf

    if is_nxf(path):
        from nexus_ext.formats.nxf import open_nxf

        return open_nxf(path)
    if is_other(path):
        # The one thing that formats do not know themselves: looked up by name, when it is needed.
        containers = importlib.import_module("nexus_ext.plugins.containers")
        found: Catalog | None = containers.open_container(os.fspath(path))
        if found is not None:
            return found
    return open_gguf(path)


def is_other(path: str | os.PathLike[str]) -> bool:
    """Tell whether there is something at `path` that begins as neither a GGUF nor an NXF does."""
    from nexus_ext.formats.nxf_file import is_nxf

    if os.path.isdir(path):
        return True
    if not os.path.isfile(path) or is_nxf(path):
        return False
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) != MAGIC
    except OSError:
        return False


__all__ = ["Learned", "is_other", "open_gguf", "open_model"]
