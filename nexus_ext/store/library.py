"""All models that a name can lead to: our own store first, then Ollama's, then LM Studio's."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from nexus_ext.errors import ModelNotFound, NexusError, UsageError
from nexus_ext.store.lm_studio import LmStudioStore
from nexus_ext.store.model import ModelSource, StoredModel
from nexus_ext.store.names import ModelName
from nexus_ext.store.ollama import OllamaStore
from nexus_ext.store.own import OwnStore

_log = logging.getLogger("nexus_ext.store")


def default_root(environment: Mapping[str, str] = os.environ) -> Path:
    """Return where our own store is unless a configuration says otherwise."""
    if named := environment.get("NEXUS_MODELS"):
        return Path(named)
    data = environment.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return Path(data) / "nexus" / "models"


def ollama_root(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Return where Ollama keeps its models on this machine, None where it has none."""
    if named := environment.get("OLLAMA_MODELS"):
        return Path(named)
    home = Path(os.path.expanduser("~/.ollama/models"))
    return _first((home, Path("/usr/share/ollama/.ollama/models")))


def lm_studio_root() -> Path | None:
    """Return where LM Studio keeps its models on this machine, None where it has none."""
    places = ("~/.lmstudio/models", "~/.cache/lm-studio/models")
    return _first(tuple(Path(os.path.expanduser(place)) for place in places))


def _first(places: tuple[Path, ...]) -> Path | None:
    for place in places:
        try:
            if place.is_dir():
                return place
        except PermissionError:  # the store of another user
            continue
    return None


class Library:
    """What a name means, over several stores. Only our own is ever written."""

    def __init__(self, own: OwnStore, others: Sequence[ModelSource] = ()) -> None:
        self.own = own
        self._sources: tuple[ModelSource, ...] = (own, *others)

    @classmethod
    def at(
        cls,
        root: str | os.PathLike[str] | None = None,
        *,
        ollama: str | os.PathLike[str] | None = None,
        lm_studio: str | os.PathLike[str] | None = None,
    ) -> Library:
        """Open the stores at these places; None: where they are by default, "": none."""
        found_ollama = ollama_root() if ollama is None else ollama
        found_lm_studio = lm_studio_root() if lm_studio is None else lm_studio
        others: list[ModelSource] = []
        if found_ollama:
            others.append(OllamaStore(found_ollama))
        if found_lm_studio:
            others.append(LmStudioStore(found_lm_studio))
        return cls(OwnStore(root or default_root()), others)

    def find(self, name: str | ModelName) -> StoredModel:
        """Return the model of that name. Raises ModelNotFound, or FormatError if it is broken."""
        try:
            parsed = ModelName.parse(name) if isinstance(name, str) else name
        except UsageError as error:
            raise ModelNotFound(str(error), hint=error.hint) from error
        for source in self._sources:
            model = source.find(parsed)
            if model is not None:
                return model
        known = [str(n) for n in self.names()]
        close = difflib.get_close_matches(str(parsed), known, n=1)
        raise ModelNotFound(
            f"there is no model {str(parsed)!r}",
            hint=f"did you mean {close[0]!r}?" if close else "`nexus list` shows what there is",
        )

    def names(self) -> list[ModelName]:
        """Return every name once, sorted."""
        return sorted({name for source in self._sources for name in source.names()})

    def models(self) -> list[StoredModel]:
        """Return every model once; those whose entries are broken are logged and left out."""
        found = []
        for name in self.names():
            try:
                found.append(self.find(name))
            except (NexusError, OSError) as error:
                _log.warning("%s is left out: %s", name, error)
        return found
