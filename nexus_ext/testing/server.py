"""A server to ask, over an engine whose answers are scripted: for routes, metrics and requests."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from nexus_ext.errors import UsageError
from nexus_ext.plugins import Plugins
from nexus_ext.testing.loading import use_plugins

if TYPE_CHECKING:
    from starlette.testclient import TestClient

    from nexus_ext.server import Config

MODEL: Final = "scripted"  # the name of the one model that the server has


@contextmanager
def scripted_server(
    plugins: Plugins, *, answer: str = "Hello!", config: Config | None = None
) -> Iterator[TestClient]:
    """Serve with these plugins, in this process; the client is one of httpx.

    There is one model, "scripted", that answers every request with `answer`, a token a byte. Needs
    `pip install "nexus_ext[server]" httpx`.
    """
    from nexus_ext.server import create_app  # says what to install where the server is not

    try:
        from starlette.testclient import TestClient
    except (ImportError, RuntimeError) as error:  # starlette raises either without an HTTP client
        raise UsageError(
            f"a client of the server cannot be made: {error}", hint="pip install httpx"
        ) from error
    from nexus_ext.store import Library, ModelName
    from nexus_ext.testing.scripted import ScriptedEngine, by_bytes
    from nexus_ext.testing.synthetic import write_llama

    with tempfile.TemporaryDirectory() as folder, use_plugins(plugins):
        file = Path(folder) / "model.gguf"
        write_llama(file, n_layers=1, n_embd=32, n_ff=32, n_heads=1, n_heads_kv=1, n_vocab=259)
        library = Library.at(Path(folder) / "store", ollama="", lm_studio="")
        name = ModelName.parse(MODEL)
        library.own.create(name, file)
        engine = ScriptedEngine([str(name)], script=lambda request: by_bytes(answer))
        app = create_app(engine, library, config)
        with TestClient(app, base_url="http://localhost") as client:
            yield client
