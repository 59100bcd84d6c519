"""All models that a name can lead to: our own store first, then Ollama's, LM Studio's, plugins'."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from nexus_ext.errors import ModelNotFound, NexusError, UsageError
from nexus_ext.policies import StorePlaces
from nexus_ext.store.model import ModelSource, StoredModel
from nexus_ext.store.names import ModelName
from nexus_ext.store.others import other_stores
from nexus_ext.store.own import OwnStore

_log = logging.getLogger("nexus_ext.store")


def default_root(environment: Mapping[str, str] = os.environ) -> Path:
    """Return where our own store is unless a configuration says otherwise."""
    if named := environment.get("NEXUS_MODELS"):
        return Path(named)
    data = environment.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return Path(data) / "nexus" / "models"


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
        """Open the stores at these places; None: where they are by default, "": none.

        Stores of plugins come last: they add names and take none away. Raises UsageError when
        there is something else than a directory at `root`.
        """
        own = Path(root or default_root())
        if own.exists() and not own.is_dir():
            raise UsageError(
                f"the store {str(own)!r} is no directory",
                hint="name another with --store, NEXUS_MODELS or in the configuration",
            )
        places = StorePlaces(_text(ollama), _text(lm_studio))
        return cls(OwnStore(own), other_stores(places))

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
        near = self._near(parsed)
        raise ModelNotFound(
            f"there is no model {str(parsed)!r}",
            hint=f"did you mean {near!r}?" if near else "`nexus list` shows what there is",
        )

    def _near(self, wanted: ModelName) -> str | None:
        """Return the name that was most likely meant: another tag, or a path nearly the same."""
        paths: dict[str, str] = {}
        for name in self.names():
            paths.setdefault(name.path.lower(), str(name))
        close = difflib.get_close_matches(wanted.path.lower(), paths, n=1)
        return paths[close[0]] if close else None

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


def _text(place: str | os.PathLike[str] | None) -> str | None:
    return None if place is None else os.fspath(place)
