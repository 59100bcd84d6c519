"""The store of our own: one JSON file a name, and the files that were pulled or copied into it.

    ROOT/manifests/<part>/.../@<tag>.json   what the name means; written beside and renamed
    ROOT/files/<key>/...                    files that the store owns, shared by names

A manifest names files by absolute path, or by path below ROOT/files for those that it owns. Files
elsewhere are never changed and never deleted.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nexus_ext.errors import FormatError, ModelNotFound, NexusError, UsageError, WriteFailed
from nexus_ext.store.model import StoredModel
from nexus_ext.store.names import ModelName
from nexus_ext.store.parameters import checked

VERSION = 1
_MAX_MANIFEST_BYTES = 16 << 20
_FIELDS = {"path": str, "nbytes": int, "template": str, "system": str, "license": str}


class OwnStore:
    """Names that this program made."""

    name = "nexus"

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        self._manifests = self.root / "manifests"
        self.files = self.root / "files"

    def find(self, name: ModelName) -> StoredModel | None:
        file = self._file(name)
        try:
            raw = _read_limited(file)
            modified = file.stat().st_mtime
        except (FileNotFoundError, NotADirectoryError):
            return None
        fields = self._fields(file, raw)
        path = Path(str(fields["path"]))
        return StoredModel(
            name=name,
            path=str(path if path.is_absolute() else self.files / path),
            nbytes=int(fields["nbytes"]),
            modified_s=modified,
            digest=hashlib.sha256(raw).hexdigest(),
            origin="nexus",
            template=fields.get("template"),
            system=fields.get("system"),
            parameters=checked(fields.get("parameters", {})),
            license=fields.get("license") or "",
            source=str(fields.get("source", "")),
        )

    def names(self) -> list[ModelName]:
        found = []
        for file in self._manifests.rglob("@*.json"):
            parts = file.parent.relative_to(self._manifests).parts
            try:
                found.append(ModelName.parse("/".join(parts) + ":" + file.stem[1:]))
            except UsageError:
                continue  # not written by us
        return sorted(found)

    def create(
        self,
        name: ModelName,
        path: str | os.PathLike[str],
        *,
        template: str | None = None,
        system: str | None = None,
        parameters: Mapping[str, object] | None = None,
        license: str = "",
        source: str = "",
        copy: bool = False,
    ) -> StoredModel:
        """Give the model at `path` a name; with `copy` its files come into the store.

        The header is read first, so that no name leads to a file that is no model. A name that
        exists is replaced. Raises what opening the model raises, and WriteFailed.
        """
        # Here and not above: names are also looked up by who reads no model.
        from nexus_ext.formats import open_model
        from nexus_ext.formats.new_file import replace_whole

        catalog = open_model(path)
        files = [Path(file.path).resolve() for file in catalog.files]
        first = files[0]
        inside = self.files.resolve()
        if copy and not first.is_relative_to(inside):
            with self.written():
                first = self._take(files, catalog.fingerprint)
        kept = first.relative_to(inside) if first.is_relative_to(inside) else first
        manifest = {
            "version": VERSION,
            "path": str(kept),
            "nbytes": catalog.file_nbytes,
            "template": template,
            "system": system,
            "parameters": checked(parameters or {}),
            "license": license or None,
            "source": source or str(path),
        }
        file = self._file(name)
        text = json.dumps(manifest, indent=2, ensure_ascii=False)
        with self.written():
            replace_whole(file, text.encode(), durable=True)
        made = self.find(name)
        assert made is not None
        return made

    def copy(self, source: StoredModel, target: ModelName) -> StoredModel:
        """Give a model of any origin one more name, here."""
        return self.create(
            target,
            source.path,
            template=source.template,
            system=source.system,
            parameters=source.parameters,
            license=source.license,
            source=source.source or str(source.name),
        )

    def remove(self, name: ModelName) -> int:
        """Remove a name, and its files if the store owns them and no other name has them.

        Returns the bytes that were freed. Raises ModelNotFound and WriteFailed.
        """
        model = self.find(name)
        if model is None:
            raise ModelNotFound(
                f"there is no model {name} in the store {str(self.root)!r}",
                hint="`nexus list` shows what there is and where it comes from",
            )
        with self.written():
            self._file(name).unlink()
        folder = Path(model.path).resolve().parent
        inside = self.files.resolve()
        if inside not in folder.parents:
            return 0
        folder = inside / folder.relative_to(inside).parts[0]
        others = (self.find(other) for other in self.names())
        if any(o is not None and folder in Path(o.path).resolve().parents for o in others):
            return 0
        freed = sum(f.lstat().st_size for f in folder.rglob("*") if f.is_file())
        with self.written():
            shutil.rmtree(folder)
        return freed

    @contextmanager
    def written(self) -> Iterator[None]:
        """Within the block the store is written: what the system refuses is WriteFailed."""
        try:
            yield
        except OSError as error:
            if isinstance(error, NexusError):
                raise
            raise WriteFailed(
                f"the store {str(self.root)!r} cannot be written: {error.strerror or error}",
                hint="name another with --store, NEXUS_MODELS or in the configuration",
                path=str(self.root),
                errno=error.errno or 0,
            ) from error

    def _take(self, files: list[Path], fingerprint: str) -> Path:
        """Copy files into the store (as links where the file system allows it)."""
        self.files.mkdir(parents=True, exist_ok=True)
        folder = self.files / fingerprint
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=self.files, prefix=".taking-") as beside:
                for file in files:
                    target = Path(beside) / file.name
                    try:
                        os.link(file, target)
                    except OSError:  # another file system
                        shutil.copyfile(file, target)
                os.rename(beside, folder)
                os.mkdir(beside)  # for the context manager to remove
        return (folder / files[0].name).resolve()

    def _file(self, name: ModelName) -> Path:
        return self._manifests.joinpath(*name.parts, f"@{name.tag}.json")

    def _fields(self, file: Path, raw: bytes) -> dict[str, Any]:
        try:
            fields = json.loads(raw)
        except ValueError as error:
            raise FormatError(f"{str(file)!r} is no JSON: {error}", hint=_REMAKE) from error
        if not isinstance(fields, dict) or fields.get("version") != VERSION:
            raise FormatError(f"{str(file)!r} is no manifest of version {VERSION}", hint=_REMAKE)
        for key, kind in _FIELDS.items():
            optional = key not in ("path", "nbytes")
            if not (isinstance(fields.get(key), kind) or (optional and fields.get(key) is None)):
                raise FormatError(
                    f"{str(file)!r} has {key} {fields.get(key)!r}, which is no {kind.__name__}",
                    hint=_REMAKE,
                )
        if not isinstance(fields.get("parameters", {}), dict):
            raise FormatError(f"{str(file)!r} has parameters that are no table", hint=_REMAKE)
        path = Path(fields["path"])
        if not path.is_absolute() and ".." in path.parts:
            raise FormatError(f"{str(file)!r} leads out of the store: {fields['path']!r}", hint="")
        return fields


_REMAKE = "make it again with `nexus create`, or remove the file"


def _read_limited(file: Path) -> bytes:
    with open(file, "rb") as stream:
        raw = stream.read(_MAX_MANIFEST_BYTES + 1)
    if len(raw) > _MAX_MANIFEST_BYTES:
        raise FormatError(
            f"{str(file)!r} has more than {_MAX_MANIFEST_BYTES} bytes, which no manifest has",
            hint=_REMAKE,
        )
    return raw
