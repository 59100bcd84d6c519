"""`nexus serve`: the HTTP server."""

from __future__ import annotations

import logging
from typing import Any

import click

from nexus_ext.cli.options import SIZE, output_options
from nexus_ext.cli.output import Output


@click.command()
@click.option("--host", metavar="ADDRESS", help="Listen here.  [default: 127.0.0.1]")
@click.option("--port", type=click.IntRange(0, 65535), metavar="N", help="[default: 11435]")
@click.option("--ram", type=SIZE, metavar="SIZE", help="Everything that the process may touch.")
@click.option("--budget", type=SIZE, metavar="SIZE", help="Models, contexts and states only.")
@click.option(
    "--gpu-budget",
    "gpu_budgets",
    multiple=True,
    type=SIZE,
    metavar="SIZE",
    help="Of the first GPU; again for the next one. Not run on real GPUs yet.",
)
@click.option(
    "-c",
    "--ctx",
    "n_ctx",
    type=click.IntRange(min=0),
    metavar="N",
    help="Tokens of context of one request; 0: as many as the model has.",
)
@click.option(
    "--parallel",
    "n_parallel",
    type=click.IntRange(min=1),
    metavar="N",
    help="Requests that one model computes at once.",
)
@click.option(
    "-t",
    "--threads",
    "n_threads",
    type=click.IntRange(min=0),
    metavar="N",
    help="Threads that compute.",
)
@click.option(
    "--kernels",
    type=click.Choice(("ggml", "auto", "nexus")),
    help="Who multiplies by resident ternary weights; auto: ours where the bits are the same.",
)
@click.option(
    "--keep-alive",
    "keep_alive_s",
    type=float,
    metavar="SECONDS",
    help="How long an idle model is kept; below 0: for good.",
)
@click.option("--preload", multiple=True, metavar="NAME", help="Load it at the start.")
@click.option(
    "--api-key",
    "api_keys",
    multiple=True,
    metavar="KEY",
    help="Ask for this key. NEXUS_SERVER_API_KEYS keeps it out of the process list.",
)
@click.option(
    "--cors-origin",
    "cors_origins",
    multiple=True,
    metavar="ORIGIN",
    help="Let pages of this origin ask.",
)
@click.option("--store", metavar="DIR", help="Our own store of models.")
@click.option(
    "--trace",
    is_flag=True,
    default=None,
    help="Print each activation and eviction with bytes and microseconds.",
)
@click.option("--log-prompts", is_flag=True, default=None, help="Log what is asked.")
@click.option("--config", "config_file", metavar="FILE", help="The configuration.")
@click.option("--example", is_flag=True, help="Print a configuration with every key, and end.")
@output_options
def serve(config_file: str | None, example: bool, output: Output, **flags: Any) -> None:
    """Serve models over HTTP with the APIs of OpenAI and Ollama.

    Flags override the environment (NEXUS_SERVER_PORT), which overrides the configuration
    (~/.config/nexus/nexus.toml). SIGTERM lets running requests end, within a deadline.

    \b
    Examples:
      nexus serve
      nexus serve --ram 8G --port 8080 --preload qwen3:8b
      nexus serve --host 0.0.0.0 --api-key secret --trace
      nexus serve --example > nexus.toml
    """  # fmt: skip
    from nexus_ext.server import load_config

    if example:
        from nexus_ext.server.config import example as text

        output.text(text())
        output.result({"example": text()})
        return
    given = {name: list(v) or None if isinstance(v, tuple) else v for name, v in flags.items()}
    config = load_config(config_file, flags={"server": given, "models": given, "engine": given})
    from nexus_ext.server.engine import make_engine
    from nexus_ext.server.serving import serve as run
    from nexus_ext.store import Library

    models = config.models
    library = Library.at(models.store, ollama=models.ollama, lm_studio=models.lm_studio)

    def ready(url: str) -> None:
        output.result({"url": url})
        output.line(f"nexus serves {len(library.names())} models at {url}")

    if output.mode == "human":
        logging.getLogger("nexus_ext.server").setLevel(logging.INFO)
    if config.engine.trace:
        logging.getLogger("nexus_ext.multiplexer").setLevel(logging.INFO)
    run(lambda: make_engine(library, config), library, config, ready=ready)
