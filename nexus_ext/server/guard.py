"""Who may ask: API keys, the Host header, and web pages of other origins.

A server on loopback is reachable from every web page that its user looks at: by requests that need
no preflight, and by names that are made to point to 127.0.0.1. Requests of foreign pages are
refused unless cors_origins allows them, and so are foreign names.
"""

from __future__ import annotations

import hmac
import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from nexus_ext.server.config import ServerConfig
from nexus_ext.server.errors import HttpError
from nexus_ext.server.http import api_of, error_response

OPEN_PATHS = ("/", "/health")  # for those who only look whether the server is there


class Guard:
    """Refuses requests of those who may not ask."""

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app = app
        self._keys = [key.encode() for key in config.api_keys]
        self._origins = {origin.rstrip("/").lower() for origin in config.cors_origins}
        self._hosts = {host.lower() for host in config.allowed_hosts}
        self._hosts.add(config.host.lower())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            await error_response(api_of(scope["path"]), refusal)(scope, receive, send)

    def _refusal(self, scope: Scope) -> HttpError | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self._knows(host):
            return HttpError(
                403,
                f"this server does not answer to the name {host!r}",
                hint="add it to allowed_hosts in the configuration",
                code="unknown_host",
            )
        origin = headers.get("origin")
        if origin and not self._allows(origin, host):
            return HttpError(
                403,
                f"pages of {origin!r} may not ask this server",
                hint="add the origin to cors_origins in the configuration",
                code="foreign_origin",
            )
        if self._keys and scope["path"] not in OPEN_PATHS and scope["method"] != "OPTIONS":
            scheme, _, key = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not self._is_key(key.strip()):
                return HttpError(
                    401,
                    "the request has no valid API key",
                    hint='send the header "Authorization: Bearer KEY"',
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        return None

    def _is_key(self, key: str) -> bool:
        given = key.encode("utf-8", "replace")
        # Every key is compared, each in constant time: how long it takes tells nothing.
        return sum([hmac.compare_digest(given, known) for known in self._keys]) > 0

    def _knows(self, host: str) -> bool:
        if "*" in self._hosts:
            return True
        name = urlsplit(f"//{host}").hostname if host else None
        if name is None:
            return not host  # HTTP/1.0 needs none
        if name in self._hosts or name == "localhost" or name.endswith(".localhost"):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True  # an address is no name that somebody could point elsewhere

    def _allows(self, origin: str, host: str) -> bool:
        known = origin.rstrip("/").lower()
        if "*" in self._origins or known in self._origins:
            return True
        return urlsplit(known).netloc == host.lower()
