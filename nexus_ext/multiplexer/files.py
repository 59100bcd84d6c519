"""Which files a model is made of at this moment, so that others of the same names are noticed."""

from __future__ import annotations

import os

from nexus_ext.types import Catalog

Identity = tuple[tuple[int, ...], ...]


def identity(catalog: Catalog) -> Identity:
    """Return what tells the files of a model from others at their paths; () for one that is gone.

    A file that is written anew in place, or replaced, has another time or another inode, though
    its header may be the same.
    """
    found: list[tuple[int, ...]] = []
    for file in catalog.files:
        try:
            status = os.stat(file.path)
        except OSError:
            found.append(())
        else:
            found.append((status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))
    return tuple(found)
