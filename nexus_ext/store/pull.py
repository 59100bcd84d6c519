"""`nexus pull`: a GGUF model of a repository into our store, whole or not at all.

A download goes into FILES/<sha256 of the first file>/<name>.part and goes on there when it is
called again. A file gets its name when its size and its sha256 are those that were announced.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from nexus_ext.errors import UsageError
from nexus_ext.store.hub import BROKEN, DownloadFailed, Hub, RemoteFile
from nexus_ext.store.model import StoredModel
from nexus_ext.store.names import DEFAULT_TAG, ModelName, as_part
from nexus_ext.store.own import OwnStore
from nexus_ext.units import format_bytes

PREFERRED = "Q4_K_M"
_CHUNK = 1 << 20
_ATTEMPTS = 5  # in a row that bring nothing
_HOSTS = ("hf.co", "huggingface.co")
_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a pull is."""

    status: str
    file: str
    done_bytes: int  # of all files
    total_bytes: int


Report = Callable[[Progress], bool]  # returns whether to stop


def pull(
    name: str,
    store: OwnStore,
    *,
    target: ModelName | None = None,
    revision: str = "main",
    hub: Hub | None = None,
    report: Report = lambda progress: False,
    retry_s: float = 1.0,
) -> StoredModel:
    """Download USER/REPOSITORY[:QUANTIZATION] and give it that name in the store.

    Raises ModelNotFound, DownloadFailed, UsageError (an ambiguous name, a download that somebody
    else does, a full disk), WriteFailed, FormatError for files that are no model.
    """
    repository, wanted = parse_reference(name)
    hub = hub or Hub()
    try:
        commit = hub.commit(repository, revision)
        chosen, tag = choose(hub.files(repository, commit), wanted, repository)
    except BROKEN as error:
        raise DownloadFailed(f"{hub.endpoint} cannot be asked now: {error}") from error
    if target is None:
        target = ModelName.parse(f"{repository}:{as_part(tag)}")
    key = chosen[0].sha256
    if key is None or re.fullmatch(r"[0-9a-f]{64}", key) is None:
        raise DownloadFailed(
            f"{hub.endpoint} does not say the sha256 of {chosen[0].path}",
            hint="what cannot be verified is not pulled: download it yourself and `nexus create`",
        )
    folder = store.files / key
    total = sum(file.nbytes for file in chosen)
    before = 0
    with store.written():
        folder.mkdir(parents=True, exist_ok=True)
        _check_room(folder, chosen)
        for file in chosen:
            _fetch(hub, repository, commit, file, folder, before, total, report, retry_s)
            before += file.nbytes
    first = folder / PurePosixPath(chosen[0].path).name
    source = f"{hub.endpoint}/{repository}@{commit}"
    return store.create(target, first, source=source)


def parse_reference(name: str) -> tuple[str, str | None]:
    """Return USER/REPOSITORY and what was asked of it. Raises UsageError."""
    text = name.removeprefix("https://")
    for host in _HOSTS:
        text = text.removeprefix(f"{host}/")
    parsed = ModelName.parse(text)
    if len(parsed.parts) != 2:
        raise UsageError(
            f"{name!r} is no repository of Hugging Face",
            hint="write USER/REPOSITORY:QUANTIZATION, such as bartowski/Qwen3-8B-GGUF:Q4_K_M",
        )
    return parsed.path, None if parsed.tag == DEFAULT_TAG else parsed.tag


def choose(
    files: Sequence[RemoteFile], wanted: str | None, repository: str
) -> tuple[list[RemoteFile], str]:
    """Return the files of the one model that is meant, and its tag. Raises UsageError."""
    models: dict[str, list[RemoteFile]] = {}
    for file in sorted(files, key=lambda f: f.path):
        path = PurePosixPath(file.path)
        if path.suffix.lower() != ".gguf" or path.name.startswith("mmproj"):
            continue
        split = _SPLIT.fullmatch(path.stem)
        models.setdefault(split[1] if split else path.stem, []).append(file)
    tags = {stem: _tag(stem) for stem in models}
    asked = wanted or PREFERRED
    fitting = [s for s in models if asked.lower() in (s.lower(), tags[s].lower())]
    if not fitting and wanted is None and len(models) == 1:
        fitting = list(models)
    if len(fitting) != 1:
        known = ", ".join(sorted(tags.values())) or "no GGUF file at all"
        which = f"no model {wanted!r}" if wanted else "several models"
        raise UsageError(
            f"{repository} has {which if models else 'no model'}; it has {known}",
            hint=f"write one of them behind the name: {repository}:TAG",
        )
    return models[fitting[0]], tags[fitting[0]]


def _tag(stem: str) -> str:
    """Return what tells a file from others of its model: the quantization at its end."""
    match = re.search(r"[-.]((?:UD-)?(?:I?Q\d\w*|TQ\d\w*|F16|F32|BF16|MXFP4\w*))$", stem, re.I)
    return match[1] if match else stem


def _check_room(folder: Path, files: Sequence[RemoteFile]) -> None:
    there = sum(f.stat().st_size for f in folder.iterdir())
    needed = sum(file.nbytes for file in files) - there
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UsageError(
            f"{format_bytes(needed)} are to be downloaded to {str(folder)!r}, "
            f"where {format_bytes(free)} are free",
            hint="make room, or name another store in the configuration or with NEXUS_MODELS",
        )


def _fetch(
    hub: Hub,
    repository: str,
    commit: str,
    file: RemoteFile,
    folder: Path,
    before: int,
    total: int,
    report: Report,
    retry_s: float,
) -> None:
    name = PurePosixPath(file.path).name
    done = folder / name
    if done.is_file() and done.stat().st_size == file.nbytes:
        return  # it got its name when it had been verified
    part = folder / f"{name}.part"
    with open(part, "ab+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"{name} is being downloaded by another process", hint="wait for it"
            ) from error
        digest = hashlib.sha256()
        stream.seek(0)
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
        failures = 0
        while (size := stream.tell()) < file.nbytes:
            try:
                source, start = hub.open(repository, commit, file.path, size)
                with source:
                    if start != size:  # the server sends the whole file again
                        stream.seek(0)
                        stream.truncate()
                        digest, size = hashlib.sha256(), 0
                    while chunk := _received(source):
                        stream.write(chunk)
                        digest.update(chunk)
                        size += len(chunk)
                        failures = 0
                        if report(Progress(f"pulling {name}", name, before + size, total)):
                            raise DownloadFailed(f"{name} was stopped", hint="pull again to go on")
                        if size > file.nbytes:
                            break
                if size < file.nbytes:
                    raise ConnectionError("the connection ended early")
            except BROKEN as error:
                failures += 1
                if failures >= _ATTEMPTS:
                    stream.flush()
                    raise DownloadFailed(
                        f"{name} broke off at {format_bytes(size)} of "
                        f"{format_bytes(file.nbytes)}: {error}",
                        hint="pull again: it goes on where it stopped",
                    ) from error
                time.sleep(retry_s * 2 ** (failures - 1))
        stream.flush()
        os.fsync(stream.fileno())
        if size != file.nbytes or (file.sha256 is not None and digest.hexdigest() != file.sha256):
            part.unlink()
            raise DownloadFailed(
                f"{name} has {size} bytes with the sha256 {digest.hexdigest()}, "
                f"announced were {file.nbytes} with {file.sha256}",
                hint="the bytes were thrown away: pull again",
            )
        os.replace(part, done)


def _received(source: Any) -> bytes:
    """Read on. Whatever the network says, TLS included, is a connection that broke off."""
    try:
        return bytes(source.read(_CHUNK))
    except OSError as error:
        raise ConnectionError(str(error)) from error
