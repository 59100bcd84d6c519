"""The command line. Importing this loads click and nothing else of weight."""

from __future__ import annotations

from nexus_ext.cli.app import cli, main

__all__ = ["cli", "main"]
