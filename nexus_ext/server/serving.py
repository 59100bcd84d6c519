"""Running the application: sockets, signals, and an end within a deadline."""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from sse_starlette.sse import AppStatus

from nexus_ext.errors import UsageError
from nexus_ext.multiplexer.api import Engine
from nexus_ext.server.app import create_app
from nexus_ext.server.config import Config
from nexus_ext.store import Library

_log = logging.getLogger("nexus_ext.server")
_BACKLOG = 512


def bind(host: str, port: int, send_timeout_s: float = 60) -> socket.socket:
    """Return a listening socket. Raises UsageError when the address cannot be had.

    The system drops connections whose client has taken nothing for `send_timeout_s` (Linux).
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        # With the protocol named: asyncio switches Nagle's algorithm off only then.
        made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            milliseconds = max(1, round(send_timeout_s * 1000))
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
        made.bind(address)
        made.listen(_BACKLOG)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        raise UsageError(
            f"{host}:{port} cannot be listened on: {error.strerror or error}",
            hint="another server may have it: give --port, or stop that one"
            if taken
            else "give --host an address of this machine, and --port one that you may use",
        ) from error
    return made


def url_of(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(
    make_engine: Callable[[], Engine],
    library: Library,
    config: Config,
    *,
    ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve until SIGTERM, SIGINT or SIGHUP; running requests get `shutdown_s` to end.

    Closes the engine. `make_engine` is called inside of the event loop, `ready` with the address
    once connections are taken.
    """
    server = config.server
    with bind(server.host, server.port, server.send_timeout_s) as listening:
        if server.host not in ("127.0.0.1", "::1", "localhost") and not server.api_keys:
            _log.warning("everyone who reaches %s may ask: api_keys is empty", url_of(listening))
        # Streams end with their requests, not with the first signal.
        AppStatus.enable_automatic_graceful_drain = False
        log = logging.getLogger("uvicorn.error")
        log.addFilter(_says_more)
        try:
            asyncio.run(_serve(make_engine, library, config, listening, ready))
        finally:
            log.removeFilter(_says_more)


async def _serve(
    make_engine: Callable[[], Engine],
    library: Library,
    config: Config,
    listening: socket.socket,
    ready: Callable[[str], None],
) -> None:
    settings = uvicorn.Config(
        create_app(make_engine(), library, config),
        lifespan="on",
        log_config=None,
        access_log=False,  # ours says less of who asked and nothing of what
        server_header=False,
        timeout_graceful_shutdown=config.server.shutdown_s,
    )
    await _Server(settings, lambda: ready(url_of(listening))).serve(sockets=[listening])


def _says_more(record: logging.LogRecord) -> bool:
    """Whether a record is of more than a request that was given up because the server ends."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


class _Server(uvicorn.Server):
    """uvicorn's server, which tells when it takes connections."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """End at the first signal, and do not raise it again behind: the end was in good order."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signals = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # else it was started with nohup
            signals.append(signal.SIGHUP)
        before = {number: signal.signal(number, self.handle_exit) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End requests in good order, or at once at a second Ctrl-C; then close the engine."""
        await super().shutdown(sockets)
        if self.force_exit:  # where uvicorn leaves out what comes after requests
            for task in self.server_state.tasks:
                task.cancel()
            await asyncio.gather(*self.server_state.tasks, return_exceptions=True)
            await self.lifespan.shutdown()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()
