"""The command line. Importing this loads nothing of weight; click when `main` runs."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from nexus_ext.cli.app import cli

__all__ = ["cli", "main"]


def main() -> NoReturn:
    """Run the command line of this process."""
    try:
        from nexus_ext.cli.app import cli
    except KeyboardInterrupt:  # nothing has begun yet: there is nothing to say but that it ended
        sys.exit(130)
    cli.main()


def __getattr__(name: str) -> Any:
    if name == "cli":
        from nexus_ext.cli.app import cli

        return cli
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
