"""Names of models on the command line: which stores, and what a name or a path means."""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from nexus_ext.cli.options import Function, ParamType
from nexus_ext.errors import ModelNotFound, UsageError

if TYPE_CHECKING:
    from nexus_ext.store import Library, StoredModel


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """Where models are, as the command line says it."""

    store: str | None
    config_file: str | None

    def open(self) -> Library:
        """Return the library that the configuration and the flags describe."""
        from nexus_ext.store import Library

        if self.config_file is None and importlib.util.find_spec("pydantic") is None:
            # Without the extra "server" there is nothing to read a configuration with.
            if named := os.environ.get("NEXUS_CONFIG"):
                raise UsageError(
                    f"NEXUS_CONFIG names {named!r}, which needs the server's libraries to be read",
                    hint='pip install "nexus_ext[server]"',
                )
            return Library.at(self.store)
        from nexus_ext.server import load_config

        config = load_config(self.config_file, flags={"models": {"store": self.store}})
        models = config.models
        return Library.at(models.store, ollama=models.ollama, lm_studio=models.lm_studio)


def store_options(function: Function) -> Function:
    """Add --store and --config; the command gets `StoreOptions` as `stores`."""

    @click.option("--store", metavar="DIR", help="Our own store.  [default: see `nexus serve`]")
    @click.option("--config", "config_file", metavar="FILE", help="The configuration.")
    @functools.wraps(function)
    def command(*args: Any, store: str | None, config_file: str | None, **kwargs: Any) -> Any:
        return function(*args, stores=StoreOptions(store, config_file), **kwargs)

    return command  # type: ignore[return-value]


def model_at(text: str, stores: StoreOptions | None = None) -> StoredModel | None:
    """Return the stored model that `text` names; None when it is the path of a file.

    Raises ModelNotFound for what is neither.
    """
    if Path(text).exists() or text.lower().endswith((".gguf", ".nxf")):
        return None
    try:
        return (stores or StoreOptions(None, None)).open().find(text)
    except ModelNotFound as error:
        raise ModelNotFound(
            f"{text!r} is no file, and {error}", hint=error.hint or "name a file or a model"
        ) from error


class ModelPath(ParamType):
    """The file of a model, which may be given by the name that it has in a store."""

    name = "model"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        stored = model_at(str(value))
        return str(value) if stored is None else stored.path


MODEL: Final = ModelPath()
