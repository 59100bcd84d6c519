"""`python -m nexus_ext.cli`, for installations whose scripts are not on the path."""

from __future__ import annotations

from nexus_ext.cli import main

if __name__ == "__main__":
    main()
