"""The HTTP server: OpenAI's, Ollama's and some of llama.cpp's API over one engine.

Needs the extra "server". Knows of models what `multiplexer.api` and `store` say; computes nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from nexus_ext.errors import UsageError

if TYPE_CHECKING:
    from nexus_ext.server.app import create_app as create_app
    from nexus_ext.server.config import Config as Config
    from nexus_ext.server.config import load_config as load_config

_HOME = {"create_app": "app", "Config": "config", "load_config": "config"}

__all__ = ["Config", "create_app", "load_config"]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"nexus_ext.server.{_HOME[name]}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("nexus_ext"):
            raise
        raise UsageError(
            f"the server needs {error.name}, which is not installed",
            hint='pip install "nexus_ext[server]"',
        ) from error
    value: object = getattr(module, name)
    globals()[name] = value
    return value
