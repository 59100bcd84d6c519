"""`nexus ps` and `nexus stop`: what a server that runs has loaded."""

from __future__ import annotations

import functools
import http.client
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from typing import Any, Final

import click

from nexus_ext.cli.options import Function, output_options
from nexus_ext.cli.output import Output
from nexus_ext.errors import ModelNotFound, NexusError, UsageError
from nexus_ext.units import format_bytes

DEFAULT_PORT: Final = 11435
DEFAULT_HOST: Final = f"http://127.0.0.1:{DEFAULT_PORT}"
_TIMEOUT_S = 60
_BAR = 40


class ServerUnreachable(NexusError, ConnectionError):
    """No server answers, or not as one of ours does."""

    code = "server_unreachable"


def url_of(named: str) -> str:
    """Return the address of a server: of HOST, HOST:PORT or :PORT, or a whole URL as it is."""
    whole = "://" in named
    try:
        parts = urllib.parse.urlsplit(named if whole else f"http://{named}")
        scheme, host, port = parts.scheme, parts.hostname, parts.port
    except ValueError:  # a port that is none
        scheme, host, port = "", None, None
    if scheme not in ("http", "https") or (whole and not host) or any(c.isspace() for c in named):
        raise UsageError(f"the server {named!r} is no http address", hint="write HOST:PORT")
    if whole:
        return named.rstrip("/")
    host = host or "127.0.0.1"
    return f"http://{f'[{host}]' if ':' in host else host}:{port or DEFAULT_PORT}"


class Server:
    """A server that runs somewhere."""

    def __init__(self, host: str | None) -> None:
        self.url = url_of(host or os.environ.get("NEXUS_HOST") or DEFAULT_HOST)
        self._key = os.environ.get("NEXUS_API_KEY")
        # No proxy: the server is this machine's, or one in its network.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def ask(self, path: str, body: Any = None) -> Any:
        """Return the JSON of an answer. Raises ServerUnreachable, and what the server says."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data=data)
        request.add_header("Content-Type", "application/json")
        if self._key:
            request.add_header("Authorization", f"Bearer {self._key}")
        try:
            with self._opener.open(request, timeout=_TIMEOUT_S) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            text = _message(error)
            if error.code == 404:
                raise ModelNotFound(text, hint="`nexus ps` shows what is loaded") from error
            hint = "set NEXUS_API_KEY" if error.code == 401 else ""
            raise ServerUnreachable(f"{self.url} says: {text}", hint=hint) from error
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            reason = getattr(error, "reason", error)
            raise ServerUnreachable(
                f"no server answers at {self.url}: {reason}",
                hint="start one with `nexus serve`, or name it with --host or NEXUS_HOST",
            ) from error
        except ValueError as error:
            raise ServerUnreachable(
                f"{self.url} does not answer as a server of nexus_ext does",
                hint="name the server with --host or NEXUS_HOST",
            ) from error


def _message(error: urllib.error.HTTPError) -> str:
    with error:
        raw = error.read()
    try:
        said = json.loads(raw)["error"]
        return str(said["message"] if isinstance(said, dict) else said)
    except (ValueError, KeyError, TypeError):
        return f"HTTP {error.code}"


def server_options(function: Function) -> Function:
    """Add --host; the command gets a `Server` as `server`."""

    @click.option(
        "--host", metavar="HOST:PORT", help=f"The server.  [default: NEXUS_HOST or {DEFAULT_HOST}]"
    )
    @functools.wraps(function)
    def command(*args: Any, host: str | None, **kwargs: Any) -> Any:
        return function(*args, server=Server(host), **kwargs)

    return command  # type: ignore[return-value]


@click.command()
@server_options
@output_options
def ps(server: Server, output: Output) -> None:
    """List models that hold memory, and a bar of the budget.

    \b
    Examples:
      nexus ps
      nexus ps --host 192.168.1.5:11435 --json
    """
    models = server.ask("/api/ps")["models"]
    props = server.ask("/props")
    budget, gpus = props["budget"], props["gpu_budgets"]
    output.result({"models": models, "budget": budget, "gpu_budgets": gpus})
    output.table(
        ("NAME", ">SIZE", ">RESIDENT", "TIER", ">CONTEXT", "UNTIL"),
        [
            (
                m["name"],
                format_bytes(m["size"]),
                format_bytes(m["resident"] + m["kv"]),
                _tier(m),
                str(m["context_length"]),
                _until(m),
            )
            for m in models
        ],
    )
    output.line(bar(models, budget["used"], budget["total"]))
    for number, gpu in enumerate(gpus):
        used, total = format_bytes(gpu["used"]), format_bytes(gpu["total"])
        output.line(f"GPU {number}: {used} of {total}")


def _tier(model: Any) -> str:
    if model["state"] == "loading":
        return f"loading {model['load_done']:.0%}"
    return str(model["tier"])


def _until(model: Any) -> str:
    if model["running"] or model["waiting"]:
        return f"{model['running']} running, {model['waiting']} waiting"
    seconds = model["until_s"]
    if seconds is None:
        return "kept"
    minutes = round(seconds / 60)
    return f"{minutes} minutes" if minutes > 1 else f"{max(0, round(seconds))} seconds"


def bar(models: list[Any], used: int, total: int) -> str:
    """Return the budget as a bar: one letter a model, # for what else is used."""
    cells = ""
    marks = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    legend = []
    for mark, model in zip(marks, models, strict=False):
        held = model["resident"] + model["kv"]
        cells += mark * round(_BAR * held / total)
        legend.append(f"{mark} {model['name']}")
    known = sum(model["resident"] + model["kv"] for model in models)
    cells += "#" * round(_BAR * max(0, used - known) / total)
    share = f"{format_bytes(used)} of {format_bytes(total)}"
    return f"[{cells[:_BAR]:.<{_BAR}}] {share}" + "".join(f"  {each}" for each in legend)


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@server_options
@output_options
def stop(names: tuple[str, ...], server: Server, output: Output) -> None:
    """Put models out of the memory of a server.

    \b
    Examples:
      nexus stop qwen3:8b
    """
    for name in names:
        server.ask("/api/generate", {"model": name, "keep_alive": 0, "stream": False})
        output.line(f"stopped {name}")
    output.result({"stopped": list(names)})
