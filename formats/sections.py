"""A model with other sections: what a tool adds to an NXF, or takes out of it.

source = open_source("model.nxf")
to_nxf(WithSections(source, {"salience": "salience.bin"}, without=("plan",)), "new.nxf")
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping

from nexus_ext.errors import UsageError
from nexus_ext.formats.file_read import Buffer, FileReader
from nexus_ext.formats.nxf_check import SECTIONS, section_is_named_well
from nexus_ext.formats.nxf_file import is_nxf
from nexus_ext.formats.nxf_header import MAX_SECTIONS
from nexus_ext.formats.nxf_reader import NxfReader
from nexus_ext.formats.sources import Source


def read_section(path: str | os.PathLike[str], name: str) -> bytes | None:
    """Return the section `name` of the NXF at `path`; None if it has none, or is no NXF.

    Raises FormatError, ReadFailed, or Damaged.
    """
    if not is_nxf(path):
        return None
    with NxfReader(os.fspath(path)) as reader:
        if all(section.name != name for section in reader.file.nxf.sections):
            return None
        return reader.section(name)


class WithSections:
    """`source` with the sections in `files` (name -> path of its contents) added or replaced.

    Raises UsageError for a name that is not allowed, a section to remove that is not there, and
    an empty file.
    """

    def __init__(
        self, source: Source, files: Mapping[str, str], *, without: Collection[str] = ()
    ) -> None:
        missing = sorted(set(without) - set(source.sections))
        if missing:
            raise UsageError(f"{source.path}: has no section {missing[0]!r}")
        self.path = source.path
        self.catalog = source.catalog
        self.files = source.files
        self.rests = source.rests
        self.source = source
        self._before = len(source.catalog.tensors) + len(source.rests)
        kept = [name for name in source.sections if name not in without and name not in files]
        self.sections = {name: source.sections[name] for name in kept}
        # Where the sections that are kept have been.
        places = {name: self._before + i for i, name in enumerate(source.sections)}
        self._kept = [places[name] for name in kept]
        self._added: list[FileReader] = []
        try:
            for name, path in files.items():
                self._add(name, path)
        except BaseException:
            self._close_added()
            raise
        if len(self.sections) > MAX_SECTIONS:
            raise UsageError(f"{len(self.sections)} sections, an NXF has up to {MAX_SECTIONS}")

    def _add(self, name: str, path: str) -> None:
        if not section_is_named_well(name):
            raise UsageError(
                f"{name!r} cannot be the name of a section",
                hint=f"Known are {', '.join(SECTIONS)}; name others x.<party>.<name>.",
            )
        reader = FileReader(os.fspath(path))
        self._added.append(reader)
        if not reader.nbytes:
            raise UsageError(f"{path}: is empty", hint="A section holds at least one byte.")
        self.sections[name] = reader.nbytes

    def read(self, item: int, offset: int, nbytes: int, buffer: Buffer) -> memoryview:
        number = item - self._before
        if number < 0:
            return self.source.read(item, offset, nbytes, buffer)
        if number < len(self._kept):
            return self.source.read(self._kept[number], offset, nbytes, buffer)
        return self._added[number - len(self._kept)].view(offset, nbytes, buffer)

    def token(self) -> bytes:
        stats = [os.stat(reader.path) for reader in self._added]
        parts = [(s.st_size, s.st_mtime_ns, s.st_ino) for s in stats]
        return self.source.token() + repr((list(self.sections), parts)).encode()

    def codecs_by_tensor(self) -> Mapping[str, str]:
        return self.source.codecs_by_tensor()

    def close(self) -> None:
        """Close the files of the sections, and the source."""
        self._close_added()
        self.source.close()

    def _close_added(self) -> None:
        for reader in self._added:
            reader.close()
        self._added = []
