"""The version of nexus_ext: the build, the C library and `nexus_ext.__version__` all read it."""

from __future__ import annotations

__version__ = "0.1.0"
