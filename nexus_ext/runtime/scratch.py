"""Directories for files that are needed for the length of one computation."""

from __future__ import annotations

import tempfile

from nexus_ext.errors import UsageError


def scratch_directory(prefix: str, folder: str | None) -> tempfile.TemporaryDirectory[str]:
    """Make one in `folder` (None: the system's place for such). UsageError where none can be."""
    try:
        return tempfile.TemporaryDirectory(prefix=prefix, dir=folder)
    except OSError as error:
        raise UsageError(
            f"nothing can be written in {folder or tempfile.gettempdir()!r}: {error.strerror}",
            hint="name another place with --scratch",
        ) from error
