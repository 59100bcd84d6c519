"""What a store knows of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from nexus_ext.store.names import ModelName

Origin = str  # "nexus", "ollama", "lm-studio", or the name of a plugin's store


@dataclass(frozen=True, slots=True)
class StoredModel:
    """A model that a name leads to. Its files are read where they lie."""

    name: ModelName
    path: str  # the file, or the first one of a split model
    nbytes: int  # of all files
    modified_s: float  # Unix time
    digest: str  # sha256 of what describes the model in its store, in hex
    origin: Origin
    template: str | None = None  # a Jinja chat template; None: the one in the file
    system: str | None = None  # what the model is told when a request says nothing
    parameters: Mapping[str, object] = field(default_factory=dict)  # Ollama's names
    license: str = ""
    source: str = ""  # where it came from, for people
    notes: tuple[str, ...] = ()  # what is different here from where it came from


class ModelSource(Protocol):
    """A place with models."""

    @property
    def name(self) -> str:
        """What `StoredModel.origin` says of its models."""
        ...

    def find(self, name: ModelName) -> StoredModel | None:
        """Return the model of that exact name. Raises FormatError when its entry is broken."""
        ...

    def names(self) -> list[ModelName]:
        """Return all names, sorted. Entries that are no names are left out."""
        ...


def first_folder(places: Sequence[Path]) -> Path | None:
    """Return the first of `places` that is a folder."""
    for place in places:
        try:
            if place.is_dir():
                return place
        except PermissionError:  # the store of another user
            continue
    return None
