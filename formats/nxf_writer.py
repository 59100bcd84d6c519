"""Write an NXF: chunk after chunk in the order of its steps, whole under its name or not at all.

    open -> add() for every step -> finish()     the file appears under its name
         -> discard()                            everything that was written is removed
         -> close()                              what was written stays, the next attempt goes on

What is written lies beside the final place under "<name>.part", with the magic of a draft and an
entry in its table for every chunk that is there. A new writer of the same steps (same `token`)
reads those entries, checks the hash of each chunk, and goes on behind the last good one: this is
what makes a kill harmless, and also a power failure, since no entry is believed.

Knows nothing of GGUF and of codecs: chunks come encoded.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

import xxhash

from nexus_ext.errors import UsageError, WriteFailed
from nexus_ext.formats import new_file
from nexus_ext.formats.new_file import check_space, refuse_existing
from nexus_ext.formats.nxf_header import (
    DRAFT_MAGIC,
    ENTRY_NBYTES,
    MAX_CHUNKS,
    MAX_DESCRIPTOR_NBYTES,
    MAX_HEADER_NBYTES,
    MAX_SHARDS,
    PREAMBLE,
    VERSION,
    Nxf,
    Shard,
    encode_descriptor,
    entry_dtype,
    header_nbytes,
    padded,
)
from nexus_ext.formats.nxf_layout import Step
from nexus_ext.formats.nxf_parts import (
    SUFFIX,
    Part,
    carrier_descriptor,
    encode_header,
    shards_of,
    sync_folder,
    unlink,
    write_failed,
)

if TYPE_CHECKING:
    from nexus_ext.formats.nxf_header import Table

_COMPRESSED: Final = 0.5  # the least of a compressed model that is expected to be left


class State(Enum):
    """What may be called: `add` while OPEN, `finish` after the last step, nothing afterwards."""

    OPEN = "open"
    FINISHED = "finished"
    CLOSED = "closed"


class NxfWriter:
    """Write the NXF at `path`.

    `token` names what is written: a draft with another is thrown away. Raises UsageError when
    something is at `path` and `overwrite` is not set, or when another process writes it;
    WriteFailed when there is too little space or the system refuses to write.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        nxf: Nxf,
        steps: Sequence[Step],
        *,
        token: bytes = b"",
        overwrite: bool = False,
        shard_nbytes: int | None = None,
    ) -> None:
        import numpy as np

        self.path = os.fspath(path)
        self.state = State.OPEN
        self.position = 0  # in `steps`: chunks before it are stored
        self._nxf = nxf
        self._steps = steps
        self._shard_nbytes = shard_nbytes
        self._codecs = {name: number for number, name in enumerate(nxf.codecs)}
        self._overwrite = overwrite
        refuse_existing(self.path, overwrite=overwrite)
        folder = os.path.dirname(os.path.abspath(self.path))
        if not os.path.isdir(folder):
            raise UsageError(
                f"{self.path}: the directory {folder} does not exist", hint="Create it first."
            )
        raw_nbytes = sum(step.nbytes for step in steps)
        self._max_shards = 0 if shard_nbytes is None else raw_nbytes // shard_nbytes + 1
        if not 0 <= self._max_shards <= MAX_SHARDS:
            raise UsageError(
                f"{raw_nbytes} bytes in shards of {shard_nbytes} make more than {MAX_SHARDS} files",
                hint="Name a larger size of shards.",
            )
        # Room for the longest descriptor: hashes and names of shards come at the end.
        names = [Shard(self._shard_name(i + 1, 0), 0, 0) for i in range(self._max_shards)]
        shards = "shards" if names else None
        requires = (*nxf.requires, *((shards,) if shards else ()))
        longest = replace(nxf, shards=tuple(names), requires=requires)
        self._descriptor_nbytes = len(encode_descriptor(longest))
        gguf = b"".join(file.header for file in nxf.files)
        self._gguf = gguf
        self._table_at = padded(PREAMBLE.size + self._descriptor_nbytes + len(gguf), ENTRY_NBYTES)
        self._header_nbytes = header_nbytes(
            self._descriptor_nbytes, len(gguf), nxf.n_chunks, nxf.alignment
        )
        self._check_limits()
        self._table = np.zeros(nxf.n_chunks, entry_dtype())
        digest = xxhash.xxh3_64(encode_descriptor(nxf) + gguf + token)
        digest.update(repr([(s.chunk, s.align, s.codec) for s in steps]).encode())
        digest.update(repr(shard_nbytes).encode())
        self._token = digest.intdigest()
        self._parts: list[Part] = []
        self._final: list[str] = []
        try:
            self._open(folder, raw_nbytes)
        except WriteFailed:
            self.discard()
            raise
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> NxfWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # An interrupt keeps what was written; anything else that ends the writing removes it.
        if error is not None and isinstance(error, Exception):
            self.discard()
        self.close()

    @property
    def table(self) -> Table:
        """The entries of all chunks; those that are not stored yet are zero."""
        return self._table

    def paths(self) -> tuple[str, ...]:
        """Return the names of the files that were finished: the main file, then its shards."""
        self._need(State.FINISHED)
        return tuple(self._final)

    def remaining(self) -> Iterator[Step]:
        """Yield the steps that are still to be added, in their order."""
        return iter(self._steps[self.position :])

    def add(self, step: Step, stored: bytes | bytearray | memoryview, codec: str) -> None:
        """Store the chunk of the next step."""
        self._need(State.OPEN)
        if self.position == len(self._steps) or step is not self._steps[self.position]:
            raise UsageError(f"chunk {step.chunk} is not the next one to be stored")
        part = self._parts[-1]
        if (
            self._shard_nbytes is not None
            and step.align == self._nxf.alignment
            and part.end >= self._shard_nbytes
            and len(self._parts) <= self._max_shards
        ):
            part.write_no_longer_behind()
            part = self._add_part(len(self._parts))
            self._write_behind()
        offset = padded(part.end, step.align)
        view = memoryview(stored).cast("B")
        entry = self._table[step.chunk : step.chunk + 1]
        entry["offset"], entry["stored"], entry["raw"] = offset, len(view), step.nbytes
        entry["hash"] = xxhash.xxh3_64_intdigest(view)
        entry["shard"], entry["codec"] = len(self._parts) - 1, self._codecs[codec]
        part.append(view, offset)
        # A draft may have the entry and not the bytes: whoever takes it up compares their hash.
        at = self._table_at + step.chunk * ENTRY_NBYTES
        self._parts[0].write(entry.tobytes(), at)
        part.end = offset + len(view)
        self.position += 1

    def finish(self, sha256: Sequence[str] = ()) -> None:
        """Write the header and give the files their names; `sha256` are those of the sources."""
        self._need(State.OPEN)
        if self.position != len(self._steps):
            raise UsageError(f"{len(self._steps) - self.position} chunks were not stored")
        nxf = self._nxf
        if sha256:
            files = zip(nxf.files, sha256, strict=True)
            nxf = replace(nxf, files=tuple(replace(f, sha256=digest) for f, digest in files))
        set_hash = xxhash.xxh3_64_intdigest(self._table.tobytes()) & 0xFFFFFFFF
        shards = []
        for index, part in enumerate(self._parts[1:], 1):
            text = carrier_descriptor(index)
            header = encode_header(text, b"", b"", part.end, nxf.alignment)
            part.write(header, 0)
            shards.append(
                Shard(
                    self._shard_name(index, set_hash),
                    part.end,
                    int.from_bytes(header[PREAMBLE.size - 8 : PREAMBLE.size], "little"),
                )
            )
        if shards:
            nxf = replace(nxf, shards=tuple(shards), requires=(*nxf.requires, "shards"))
        main = self._parts[0]
        header = encode_header(
            encode_descriptor(nxf).ljust(self._descriptor_nbytes),
            self._gguf,
            self._table.tobytes(),
            main.end,
            nxf.alignment,
        )
        assert len(header) == self._header_nbytes
        main.write(header, 0)
        self._name_files([s.name for s in shards])
        self.state = State.FINISHED

    def discard(self) -> None:
        """Remove what was written. Nothing happens to a file that was finished."""
        if self.state is State.OPEN:
            for part in self._parts:
                part.discard()
            self.close()

    def close(self) -> None:
        """Leave what was written to the next attempt."""
        for part in self._parts:
            part.close()
        if self.state is State.OPEN:
            self.state = State.CLOSED

    def _need(self, state: State) -> None:
        if self.state is not state:
            raise UsageError(f"{self.path}: the writer is {self.state.value}, not {state.value}")

    def _check_limits(self) -> None:
        for what, value, limit in (
            ("chunks", self._nxf.n_chunks, MAX_CHUNKS),
            ("bytes of descriptor", self._descriptor_nbytes, MAX_DESCRIPTOR_NBYTES),
            ("bytes of header", self._header_nbytes, MAX_HEADER_NBYTES),
        ):
            if value > limit:
                raise UsageError(f"{self.path}: needs {value} {what}, an NXF has up to {limit}")

    # -- drafts ---------------------------------------------------------------------------------

    def _open(self, folder: str, raw_nbytes: int) -> None:
        main = self._add_part(0)
        try:
            fcntl.flock(main.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(
                f"{self.path}: another process is writing it", hint="Wait until it is done."
            ) from None
        if not self._resume():
            self._start_over()
        left = raw_nbytes - sum(step.nbytes for step in self._steps[: self.position])
        if any(step.codec != "raw" for step in self._steps):
            left = int(left * _COMPRESSED)
        check_space(folder, left)
        self._write_behind()

    def _start_over(self) -> None:
        for part in self._parts[1:]:
            part.close()
        del self._parts[1:]
        self._table[:] = 0
        self.position = 0
        main = self._parts[0]
        os.ftruncate(main.descriptor, 0)
        main.end = self._header_nbytes
        main.write(self._draft_preamble(), 0)

    def _draft_preamble(self) -> bytes:
        sizes = (self._header_nbytes, self._descriptor_nbytes, len(self._table))
        return PREAMBLE.pack(DRAFT_MAGIC, VERSION, 0, *sizes, 0, 0, self._token)

    def _resume(self) -> bool:
        """Take over the chunks of a draft of the same steps; False if it is of others."""
        import numpy as np

        main = self._parts[0]
        if os.pread(main.descriptor, PREAMBLE.size, 0) != self._draft_preamble():
            return False
        wanted = self._table.nbytes
        encoded = os.pread(main.descriptor, wanted, self._table_at)
        table = np.frombuffer(encoded.ljust(wanted, b"\0"), entry_dtype())
        main.end = self._header_nbytes
        for step in self._steps:
            entry = table[step.chunk]
            if not self._take_over(step, entry):
                break
            self._table[step.chunk] = entry
            self.position += 1
        last = self._parts[-1]
        os.ftruncate(last.descriptor, max(last.end, self._header_nbytes))
        return True

    def _take_over(self, step: Step, entry: Any) -> bool:
        """Check one chunk of a draft: where it is and what it holds."""
        shard, stored = int(entry["shard"]), int(entry["stored"])
        if not 0 < stored <= int(entry["raw"]) == step.nbytes:
            return False
        part = self._parts[-1]
        if shard == len(self._parts):
            if (
                self._shard_nbytes is None
                or step.align != self._nxf.alignment
                or part.end < self._shard_nbytes
            ):
                return False
            part = self._add_part(shard, keep=True)
        elif shard != len(self._parts) - 1:
            return False
        offset = padded(part.end, step.align)
        if int(entry["offset"]) != offset or int(entry["codec"]) >= len(self._codecs):
            return False
        data = os.pread(part.descriptor, stored, offset)
        if len(data) != stored or xxhash.xxh3_64_intdigest(data) != int(entry["hash"]):
            return False
        part.end = offset + stored
        return True

    def _add_part(self, index: int, *, keep: bool = False) -> Part:
        name = self.path if index == 0 else f"{self.path}.{index:03d}"
        start = self._nxf.alignment if index else self._header_nbytes
        self._parts.append(Part(name + SUFFIX, start, keep=keep or index == 0))
        return self._parts[-1]

    def _write_behind(self) -> None:
        if sum(step.nbytes for step in self._steps) >= new_file.DIRECT_FROM_NBYTES:
            self._parts[-1].write_behind()

    # -- files ----------------------------------------------------------------------------------

    def _shard_name(self, index: int, set_hash: int) -> str:
        # The hash keeps the shards of a model apart from those of the one that it replaces.
        stem = Path(self.path).name.removesuffix(".nxf")
        return f"{stem}.{index:03d}-{set_hash:08x}.nxf"

    def _name_files(self, shards: list[str]) -> None:
        folder = os.path.dirname(os.path.abspath(self.path))
        old = shards_of(self.path) if self._overwrite else []
        for part in self._parts:
            part.complete()
        try:
            for part, name in zip(self._parts[1:], shards, strict=True):
                os.replace(part.path, os.path.join(folder, name))
            if not self._overwrite:
                refuse_existing(self.path, overwrite=False)
            # The main file last: until then, a file under its name is the old one, with its shards.
            os.replace(self._parts[0].path, self.path)
            sync_folder(folder)
        except OSError as error:
            raise write_failed(self.path, error) from error
        self._final = [self.path, *(os.path.join(folder, name) for name in shards)]
        for name in set(old) - set(shards):
            unlink(os.path.join(folder, name))
        for part in self._parts:
            part.close()
