"""Where the tests find models: in the repository, and beside it if there are more."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parent.parent


def model_folders() -> list[Path]:
    named = os.environ.get("NEXUS_TEST_MODELS")
    return [
        _ROOT / "tests" / "models",
        _ROOT / "nexus_ext" / "data",
        *([Path(named)] if named else []),
        _ROOT.parent / "shared" / "models",
    ]


def find_model(name: str) -> Path:
    """Return the model file `name`; skip the test where this checkout has none."""
    for folder in model_folders():
        if (folder / name).is_file():
            return folder / name
    pytest.skip(f"{name} is not in the repository; NEXUS_TEST_MODELS names no folder with it")
