"""Hugging Face's HTTP interface, as far as downloading needs it: names of files, and bytes.

The huggingface_hub package is not used: it no longer keeps a partial file when a download ends
early, and models of a hundred gigabytes must go on where they stopped.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from nexus_ext.errors import ModelNotFound, NexusError, UsageError

DEFAULT_ENDPOINT = "https://huggingface.co"
_TIMEOUT_S = 30
_MAX_LIST_BYTES = 64 << 20
# What a connection that broke off raises.
BROKEN = (http.client.HTTPException, urllib.error.URLError, ConnectionError, socket.timeout)


class DownloadFailed(NexusError, OSError):
    """A download ended early or brought other bytes than were announced."""

    code = "download_failed"


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file of a repository."""

    path: str
    nbytes: int
    sha256: str | None  # None for small files that are kept in git itself


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, and leaves the token behind when they lead to another server."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        made = super().redirect_request(req, fp, code, msg, headers, newurl)
        if made is not None:
            before, after = urllib.parse.urlsplit(req.full_url), urllib.parse.urlsplit(newurl)
            if (before.scheme, before.netloc) != (after.scheme, after.netloc):
                made.remove_header("Authorization")
        return made


class Hub:
    """One server with repositories."""

    def __init__(self, endpoint: str | None = None, token: str | None = None) -> None:
        named = endpoint or os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT
        self.endpoint = named.rstrip("/")
        if not self.endpoint.startswith(("https://", "http://")):
            raise UsageError(f"the endpoint {self.endpoint!r} is no http address", hint="")
        self._token = token if token is not None else known_token(os.environ)
        self._opener = urllib.request.build_opener(_Redirects())

    def commit(self, repository: str, revision: str) -> str:
        """Return the commit that a branch or tag is now."""
        quoted = urllib.parse.quote(revision, safe="")
        found = self._json(f"/api/models/{repository}/revision/{quoted}", repository)
        commit = found.get("sha") if isinstance(found, dict) else None
        if not isinstance(commit, str):
            raise DownloadFailed(f"{self.endpoint} does not say which commit {revision} is")
        return commit

    def files(self, repository: str, commit: str) -> list[RemoteFile]:
        """Return the files of a commit."""
        listed = self._json(f"/api/models/{repository}/tree/{commit}?recursive=true", repository)
        files = []
        try:
            for entry in listed:
                if entry["type"] == "file":
                    large = entry.get("lfs") or {}
                    files.append(
                        RemoteFile(
                            path=str(entry["path"]),
                            nbytes=int(large.get("size", entry["size"])),
                            sha256=large.get("oid"),
                        )
                    )
        except (KeyError, TypeError, ValueError) as error:
            raise DownloadFailed(
                f"the list of files of {repository} is broken: {error!r}"
            ) from error
        return files

    def open(self, repository: str, commit: str, path: str, offset: int) -> tuple[IO[bytes], int]:
        """Open a file to read on from `offset`; return it and where it really begins (0 or that).

        Raises what urllib raises for connections, DownloadFailed for refusals.
        """
        url = f"/{repository}/resolve/{commit}/{urllib.parse.quote(path)}"
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        response = self._get(url, repository, headers)
        return response, offset if response.status == 206 else 0

    def _json(self, url: str, repository: str) -> Any:
        try:
            with self._get(url, repository, {}) as response:
                raw = response.read(_MAX_LIST_BYTES)
            return json.loads(raw)
        except BROKEN as error:
            raise DownloadFailed(
                f"{self.endpoint} cannot be reached: {error}",
                hint="check the network; HF_ENDPOINT names another server",
            ) from error
        except ValueError as error:
            raise DownloadFailed(f"{self.endpoint}{url} is no JSON: {error}") from error

    def _get(self, url: str, repository: str, headers: Mapping[str, str]) -> Any:
        request = urllib.request.Request(self.endpoint + url, headers=dict(headers))
        request.add_header("User-Agent", "nexus_ext")
        if self._token:
            # Unredirected headers are not copied to another request, in any version of Python.
            request.add_unredirected_header("Authorization", f"Bearer {self._token}")
        try:
            return self._opener.open(request, timeout=_TIMEOUT_S)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in (401, 403):
                raise DownloadFailed(
                    f"{self.endpoint} does not give out {repository} (HTTP {error.code})",
                    hint="check the name; a gated model wants its terms accepted and HF_TOKEN set",
                ) from error
            if error.code == 404:
                raise ModelNotFound(
                    f"{self.endpoint} has no {repository}, or not this revision or file of it",
                    hint="names are USER/REPOSITORY:QUANTIZATION",
                ) from error
            if error.code >= 500 or error.code == 429:
                raise  # may pass: the caller tries again
            raise DownloadFailed(f"{self.endpoint} answers {url} with HTTP {error.code}") from error


def known_token(environment: Mapping[str, str]) -> str | None:
    """Return the token that Hugging Face's own tools would use."""
    if token := environment.get("HF_TOKEN"):
        return token.strip()
    home = environment.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface")
    file = Path(environment.get("HF_TOKEN_PATH") or Path(home) / "token")
    try:
        return file.read_text(encoding="utf-8").strip() or None
    except OSError:
        return None
