"""A folder of LM Studio, read where it is: PUBLISHER/REPOSITORY/FILE.gguf.

A model's name is publisher/repository:file, the file without its ending (and, of a split model,
without the number of the part). What cannot stand in a name becomes "-".
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from nexus_ext.hookspecs import hookimpl
from nexus_ext.policies.extensions import ModelStore, StorePlaces
from nexus_ext.store.model import StoredModel, first_folder
from nexus_ext.store.names import ModelName, as_part

_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})", re.ASCII)


class LmStudioStore:
    """Models that LM Studio has downloaded."""

    name = "lm-studio"

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    def find(self, name: ModelName) -> StoredModel | None:
        for known, files in self._models():
            if known == name:
                size = sum(file.stat().st_size for file in files)
                modified = files[0].stat().st_mtime
                # There is no manifest to take the sum of: what identifies the files stands for it.
                described = f"{files[0]}\0{size}\0{modified}"
                return StoredModel(
                    name=name,
                    path=str(files[0]),
                    nbytes=size,
                    modified_s=modified,
                    digest=hashlib.sha256(os.fsencode(described)).hexdigest(),
                    origin="lm-studio",
                    source=str(files[0]),
                )
        return None

    def names(self) -> list[ModelName]:
        return sorted(name for name, _ in self._models())

    def _models(self) -> Iterator[tuple[ModelName, list[Path]]]:
        seen = set()
        for file in sorted(self.root.glob("*/*/*.gguf")):
            if file.name.startswith("mmproj") or not file.is_file():
                continue  # the part of a model that sees
            split = _SPLIT.fullmatch(file.stem)
            if split is not None and int(split[2]) != 1:
                continue
            stem = split[1] if split is not None else file.stem
            parts = (as_part(file.parent.parent.name), as_part(file.parent.name))
            name = ModelName(parts, as_part(stem))
            if name in seen:
                continue
            seen.add(name)
            files = [file]
            if split is not None:
                files = sorted(file.parent.glob(f"{glob.escape(stem)}-*-of-{split[3]}.gguf"))
            yield name, files


def default_root() -> Path | None:
    """Return where LM Studio keeps its models on this machine, None where it has none."""
    places = ("~/.lmstudio/models", "~/.cache/lm-studio/models")
    return first_folder(tuple(Path(os.path.expanduser(place)) for place in places))


@hookimpl
def nexus_model_store(places: StorePlaces) -> ModelStore | None:
    root = default_root() if places.lm_studio is None else places.lm_studio
    return LmStudioStore(root) if root else None
