"""GGUF to NXF, NXF to NXF of another layout, NXF to GGUF.

Reading and encoding run in a few threads ahead of the one that writes; what lies between them is
bounded, so that memory does not grow with the model. Sources give their bytes, the writer keeps the
file whole; this module only moves one to the other.
"""

from __future__ import annotations

import functools
import hashlib
import mmap
import os
import queue
import re
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

from nexus_ext._version import __version__
from nexus_ext.codecs import RAW, Codecs, builtin
from nexus_ext.errors import Damaged
from nexus_ext.formats.file_read import DIRECT_ALIGNMENT
from nexus_ext.formats.ggml_types import ggml_types
from nexus_ext.formats.new_file import NewFile
from nexus_ext.formats.nxf_check import PART_ALIGNMENT
from nexus_ext.formats.nxf_header import NO_SHA256, Nxf
from nexus_ext.formats.nxf_layout import Order, Rules, Step, plan_layout, steps
from nexus_ext.formats.nxf_writer import NxfWriter
from nexus_ext.formats.sections import WithSections
from nexus_ext.formats.source_digest import SourceDigest
from nexus_ext.formats.sources import GgufSource, NxfSource, Source

MIN_GAIN: Final = 0.03  # of a codec; below it a chunk is stored as it is
AHEAD_NBYTES: Final = 48 << 20  # decoded, between the reading threads and the writing one
_PIECE_NBYTES: Final = 1 << 20
_READERS: Final = 4  # at least: a disk wants several reads at a time
_AHEAD_PIECES: Final = 8  # of a GGUF that is written
WRITER: Final = f"nexus_ext {__version__}"

Progress = Callable[[int, int], None]
"""Called with (done, total) decoded bytes."""


@dataclass(frozen=True, slots=True)
class TensorReport:
    """What became of one tensor (or rest, or section)."""

    name: str
    type_name: str
    nbytes: int
    stored_nbytes: int
    codec: str  # that was asked for
    n_chunks: int
    n_raw: int  # chunks that are stored as they are


@dataclass(frozen=True, slots=True)
class Report:
    """What a conversion wrote."""

    paths: tuple[str, ...]
    nbytes: int  # of all weights
    file_nbytes: int
    resumed_nbytes: int  # decoded, taken over from an attempt before
    sha256: tuple[str, ...]  # of the GGUF files; "" where not computed
    tensors: tuple[TensorReport, ...]


def to_nxf(
    source: Source,
    target: str | os.PathLike[str],
    *,
    rules: Rules | None = None,
    order: Order | None = None,
    overwrite: bool = False,
    shard_nbytes: int | None = None,
    n_threads: int | None = None,
    sha256: bool = True,
    codecs: Codecs | None = None,
    progress: Progress | None = None,
) -> Report:
    """Write `source` (a GGUF, or an NXF to be laid out anew) as the NXF `target`.

    An attempt that was killed is taken up where it stopped. Raises UsageError, WriteFailed,
    ReadFailed, FormatError.
    """
    rules = rules or Rules()
    rules.check([tensor.name for tensor in source.catalog.tensors])
    codecs = codecs or builtin()
    for name in rules.codecs():
        if name != RAW:
            codecs.get(name)  # before anything is written
    nxf = plan_layout(
        source.catalog,
        source.files,
        source.rests,
        rules,
        writer=WRITER,
        block_nbytes={t.name: t.block_nbytes for t in ggml_types().values()},
        sections=source.sections,
    )
    plan = list(steps(nxf, rules, PART_ALIGNMENT, order))
    total = sum(step.nbytes for step in plan)
    types = [t.type_name for t in source.catalog.tensors]
    types += [""] * (len(nxf.items) - len(types))
    known = tuple(file.sha256 for file in source.files)
    writer = NxfWriter(
        target,
        nxf,
        plan,
        token=source.token(),
        overwrite=overwrite,
        shard_nbytes=shard_nbytes,
    )
    with writer, ExitStack() as stack:
        resumed = sum(step.nbytes for step in plan[: writer.position])
        done = resumed
        hashing: SourceDigest | None = None
        origin = source.source if isinstance(source, WithSections) else source
        if sha256 and NO_SHA256 in known and isinstance(origin, GgufSource):
            hashing = SourceDigest([file.path for file in source.catalog.files])
            stack.callback(hashing.stop)
        # Experts are not read in the order in which they are hashed, which reads them again then.
        if isinstance(origin, GgufSource | NxfSource) and not (hashing and nxf.groups):
            origin.read_past_the_cache()
        places = [(t.file, t.offset) for t in source.catalog.tensors]
        places += [(file, offset) for file, offset, _ in source.rests]
        work = _Work(source, codecs, types)
        for step, chunk in work.run(writer.remaining(), n_threads):
            writer.add(step, chunk.stored, chunk.codec)
            done += step.nbytes
            if hashing is not None and step.item < len(places):
                file, start = places[step.item]
                free = functools.partial(work.give_back, chunk.buffer)
                hashing.feed(file, start + step.offset, chunk.raw, done, free)
            else:
                work.give_back(chunk.buffer)
            if progress is not None:
                progress(done, total)
        if hashing is not None:
            known = hashing.result()
        writer.finish(known)
        return _report(writer, nxf, plan, types, resumed, known)


def to_gguf(
    source: NxfSource,
    target: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write the GGUF files that `source` was made of, byte for byte.

    The files of a split model get the names that llama.cpp looks for, from that of `target`; a
    directory as `target` gives all files their own names. Raises Damaged when what was written
    has another SHA-256 than the files had.
    """
    nxf = source.file.nxf
    source.read_past_the_cache()
    total = sum(file.nbytes for file in nxf.files)
    done = 0
    digests: list[str] = []
    with ExitStack() as stack:
        outputs = []
        hashing = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="nexus-sha256"))
        for number, path in enumerate(gguf_paths(os.fspath(target), nxf)):
            file = nxf.files[number]
            output = NewFile(path, expected_nbytes=file.nbytes, overwrite=overwrite)
            outputs.append(stack.enter_context(output))
            digest = hashlib.sha256()
            hashed: Future[None] | None = None
            for piece in _ahead(_file_pieces(source, number), _AHEAD_PIECES):
                if hashed is not None:
                    hashed.result()
                hashed = hashing.submit(digest.update, piece)
                output.write(piece)
                done += len(piece)
                if progress is not None:
                    progress(done, total)
            if hashed is not None:
                hashed.result()
            digests.append(digest.hexdigest())
            if file.sha256 not in (NO_SHA256, digests[-1]):
                raise Damaged(
                    f"{source.path}: gives {file.name} with the SHA-256 {digests[-1]}, the file "
                    f"had {file.sha256}",
                    hint="Check the NXF with `nexus check`, and report this.",
                    path=source.path,
                    item=file.name,
                    chunk=-1,
                    offset=0,
                )
        for output in outputs:
            output.commit()
    return Report(
        paths=tuple(output.path for output in outputs),
        nbytes=source.catalog.nbytes,
        file_nbytes=total,
        resumed_nbytes=0,
        sha256=tuple(digests),
        tensors=(),
    )


def gguf_paths(target: str, nxf: Nxf) -> list[str]:
    """Return where the GGUF files of `nxf` go."""
    if os.path.isdir(target):
        return [os.path.join(target, file.name) for file in nxf.files]
    count = len(nxf.files)
    if count == 1:
        return [target]
    stem = re.sub(r"(-\d{5}-of-\d{5})?\.gguf$", "", target)
    return [f"{stem}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]


def _file_pieces(source: NxfSource, number: int) -> Iterator[bytes | memoryview]:
    """Yield one GGUF file from its first to its last byte; a piece is valid until the next."""
    nxf = source.file.nxf
    file = nxf.files[number]
    yield file.header
    at = len(file.header)
    extents = enumerate((*nxf.tensors, *nxf.rests))
    items = [(e.offset, i, e.nbytes) for i, e in extents if e.file == number]
    for offset, item, nbytes in sorted(items):
        yield from _zeros(offset - at)
        yield from source.views(item)
        at = offset + nbytes
    yield from _zeros(file.nbytes - at)


def _zeros(nbytes: int) -> Iterator[bytes]:
    while nbytes > 0:
        yield bytes(min(nbytes, _PIECE_NBYTES))
        nbytes -= _PIECE_NBYTES


def _ahead(pieces: Iterator[bytes | memoryview], depth: int) -> Iterator[memoryview]:
    """Run `pieces` in a thread of its own, up to `depth` ahead.

    What is yielded is a copy that is valid until the next but one: memory that is used again costs
    the system less than the pages of new one.
    """
    results: queue.Queue[tuple[bytearray, int] | BaseException | None] = queue.Queue(depth)
    free: queue.SimpleQueue[bytearray] = queue.SimpleQueue()
    stop = threading.Event()

    def copied(piece: bytes | memoryview) -> tuple[bytearray, int]:
        try:
            buffer = free.get_nowait()
        except queue.Empty:
            buffer = bytearray()
        if len(buffer) < len(piece):
            buffer = bytearray(len(piece))
        memoryview(buffer)[: len(piece)] = piece
        return buffer, len(piece)

    def put(item: tuple[bytearray, int] | BaseException | None) -> bool:
        while not stop.is_set():
            try:
                results.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def run() -> None:
        try:
            for piece in pieces:
                if not put(copied(piece)):
                    return
            put(None)
        except BaseException as error:  # raised again where the pieces are used
            put(error)

    thread = threading.Thread(target=run, name="nexus-read", daemon=True)
    thread.start()
    held: deque[bytearray] = deque()
    try:
        while True:
            item = results.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            buffer, nbytes = item
            held.append(buffer)
            yield memoryview(buffer)[:nbytes]
            if len(held) > 1:
                free.put(held.popleft())
    finally:
        stop.set()
        thread.join()


@dataclass(frozen=True, slots=True)
class _Chunk:
    """One chunk on its way into the file."""

    stored: bytes | memoryview
    codec: str
    raw: memoryview  # decoded, in `buffer`
    buffer: mmap.mmap  # to be given back


class _Work:
    """Reads and encodes chunks in a few threads, and hands them out in order."""

    def __init__(self, source: Source, codecs: Codecs, types: list[str]) -> None:
        self._source = source
        self._codecs = codecs
        self._types = types
        self._free: deque[mmap.mmap] = deque()

    def run(self, todo: Iterator[Step], n_threads: int | None) -> Iterator[tuple[Step, _Chunk]]:
        """Yield what becomes of the steps, in the order of `todo`."""
        count = n_threads or max(_READERS, min(os.cpu_count() or 1, 16))
        waiting: deque[tuple[Step, Future[_Chunk]]] = deque()
        ahead = 0
        with ThreadPoolExecutor(count, thread_name_prefix="nexus-encode") as pool:
            try:
                for step in todo:
                    while waiting and (ahead + step.nbytes > AHEAD_NBYTES or len(waiting) > 256):
                        first, future = waiting.popleft()
                        ahead -= first.nbytes
                        yield first, future.result()
                    waiting.append((step, pool.submit(self._one, step)))
                    ahead += step.nbytes
                while waiting:
                    first, future = waiting.popleft()
                    yield first, future.result()
            finally:
                for _, future in waiting:
                    future.cancel()

    def give_back(self, buffer: mmap.mmap) -> None:
        self._free.append(buffer)

    def _one(self, step: Step) -> _Chunk:
        room = (-(-step.nbytes // DIRECT_ALIGNMENT) + 2) * DIRECT_ALIGNMENT
        try:
            buffer = self._free.pop()
        except IndexError:
            buffer = mmap.mmap(-1, room)
        if len(buffer) < room:
            buffer = mmap.mmap(-1, room)
        raw = self._source.read(step.item, step.offset, step.nbytes, buffer)
        if step.codec == RAW:
            return _Chunk(raw, RAW, raw, buffer)
        encoded = self._codecs.get(step.codec).encode(raw, self._types[step.item])
        if len(encoded) > (1 - MIN_GAIN) * len(raw):
            return _Chunk(raw, RAW, raw, buffer)
        return _Chunk(encoded, step.codec, raw, buffer)


def _report(
    writer: NxfWriter,
    nxf: Nxf,
    plan: list[Step],
    types: list[str],
    resumed: int,
    sha256: tuple[str, ...],
) -> Report:
    asked = {step.item: step.codec for step in plan}
    table = writer.table
    raw = nxf.codecs.index(RAW)
    rows = []
    for number, item in enumerate(nxf.items):
        part = table[item.first_chunk : item.first_chunk + item.n_chunks]
        rows.append(
            TensorReport(
                name=item.name,
                type_name=types[number],
                nbytes=item.nbytes,
                stored_nbytes=int(part["stored"].sum(dtype="u8")),
                codec=asked[number],
                n_chunks=item.n_chunks,
                n_raw=int((part["codec"] == raw).sum()),
            )
        )
    paths = writer.paths()
    return Report(
        paths=paths,
        nbytes=sum(tensor.nbytes for tensor in nxf.tensors),
        file_nbytes=sum(os.stat(path).st_size for path in paths),
        resumed_nbytes=resumed,
        sha256=sha256,
        tensors=tuple(rows),
    )
