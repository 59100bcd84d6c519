"""Ollama's store, read where it is: manifests that name layers, and blobs named by their sha256.

    ROOT/manifests/<host>/<namespace>/<name>/<tag>   {"config": ..., "layers": [{...}, ...]}
    ROOT/blobs/sha256-<64 hex digits>

Nothing is written. Ollama's templates are in Go's template language and are not run: the Jinja
template in the model's own file is used instead, and `notes` says so.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nexus_ext.errors import FormatError, UsageError
from nexus_ext.hookspecs import hookimpl
from nexus_ext.policies.extensions import ModelStore, StorePlaces
from nexus_ext.store.model import StoredModel, first_folder
from nexus_ext.store.names import ModelName
from nexus_ext.store.parameters import checked

HOST = "registry.ollama.ai"
NAMESPACE = "library"

_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})", re.ASCII)
_LAYER = "application/vnd.ollama.image."
_MAX_TEXT_BYTES = 16 << 20
_HINT = "pull the model again with Ollama"


class OllamaStore:
    """Models that Ollama has pulled or made."""

    name = "ollama"

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    def find(self, name: ModelName) -> StoredModel | None:
        file = self.root.joinpath("manifests", *_full(name), name.tag)
        try:
            raw = file.read_bytes()
            modified = file.stat().st_mtime
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        layers = _layers(file, raw)
        if "adapter" in layers:
            raise UsageError(
                f"{name} in Ollama's store has a LoRA adapter, which is not applied here",
                hint="merge the adapter into the model, or use a model without one",
            )
        if "model" not in layers:
            raise FormatError(f"{str(file)!r} names no file with weights", hint=_HINT)
        blob = self._blob(file, layers["model"])
        params = self._text(file, layers, "params")
        try:
            parameters = checked(json.loads(params)) if params else {}
        except (ValueError, AttributeError) as error:
            raise FormatError(
                f"{str(file)!r} has parameters that cannot be read: {error}", hint=_HINT
            ) from error
        notes = []
        if "template" in layers:
            notes.append("Ollama's Go template is not used: the file's own Jinja template is")
        if "projector" in layers:
            notes.append("the model can see images in Ollama; here it reads text only")
        return StoredModel(
            name=name,
            path=str(blob),
            nbytes=blob.stat().st_size,
            modified_s=modified,
            digest=hashlib.sha256(raw).hexdigest(),
            origin="ollama",
            system=self._text(file, layers, "system"),
            parameters=parameters,
            license=self._text(file, layers, "license") or "",
            source=str(file),
            notes=tuple(notes),
        )

    def names(self) -> list[ModelName]:
        manifests = self.root / "manifests"
        found = []
        for file in manifests.rglob("*"):
            parts = file.relative_to(manifests).parts
            if len(parts) != 4 or not file.is_file():
                continue
            *path, tag = parts
            if path[0] == HOST:
                path = path[2:] if path[1] == NAMESPACE else path[1:]
            try:
                found.append(ModelName.parse("/".join(path) + ":" + tag))
            except UsageError:
                continue
        return sorted(found)

    def _blob(self, file: Path, digest: str) -> Path:
        match = _DIGEST.fullmatch(digest)
        if match is None:
            raise FormatError(f"{str(file)!r} names the blob {digest!r}, no sha256", hint=_HINT)
        blobs = self.root / "blobs"
        for separator in "-:":  # the second was written by early versions
            blob = blobs / f"sha256{separator}{match[1]}"
            if blob.is_file():
                return blob
        raise FormatError(
            f"{str(file)!r} names the blob {digest}, which is not in {str(blobs)!r}", hint=_HINT
        )

    def _text(self, file: Path, layers: dict[str, str], kind: str) -> str | None:
        if kind not in layers:
            return None
        with open(self._blob(file, layers[kind]), "rb") as stream:
            return stream.read(_MAX_TEXT_BYTES).decode("utf-8", "replace")


def _full(name: ModelName) -> tuple[str, ...]:
    """Return host, namespace and name."""
    return (HOST, NAMESPACE, *name.parts)[-3:] if len(name.parts) != 2 else (HOST, *name.parts)


def _layers(file: Path, raw: bytes) -> dict[str, str]:
    """Return kind -> digest of the layers of a manifest."""
    try:
        manifest: Any = json.loads(raw)
        layers: dict[str, str] = {}
        for layer in manifest["layers"]:
            kind = str(layer["mediaType"])
            if kind.startswith(_LAYER):
                layers.setdefault(kind.removeprefix(_LAYER), str(layer["digest"]))
        return layers
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(
            f"{str(file)!r} is no manifest of Ollama: {error!r}", hint=_HINT
        ) from error


def default_root(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Return where Ollama keeps its models on this machine, None where it has none."""
    if named := environment.get("OLLAMA_MODELS"):
        return Path(named)
    home = Path(os.path.expanduser("~/.ollama/models"))
    return first_folder((home, Path("/usr/share/ollama/.ollama/models")))


@hookimpl
def nexus_model_store(places: StorePlaces) -> ModelStore | None:
    root = default_root() if places.ollama is None else places.ollama
    return OllamaStore(root) if root else None
