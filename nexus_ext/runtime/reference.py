"""Distributions of a reference model on disk, so that two models need not be in memory together.

One unnamed temporary file, written once from front to back and read as often as there are models to
compare. Its rows are those of `quality.metrics.Reference`: a bit for each token of the vocabulary
and 16 bits for each whose probability counts, which for a sharp model is a small part of them.
"""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Iterator, Sequence
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from nexus_ext.errors import UsageError
from nexus_ext.quality.metrics import Reference, reference_of
from nexus_ext.quality.text import Window
from nexus_ext.runtime.predictions import Block
from nexus_ext.units import format_bytes


class ReferenceFile:
    """The predictions of one model for the windows of one text."""

    def __init__(self, parts: Sequence[Window], n_vocab: int, directory: str | None) -> None:
        self.windows = tuple(parts)
        self.n_vocab = n_vocab
        self.nbytes = 0
        self._blocks: list[int] = []  # rows of each block
        try:
            self._file: IO[bytes] = tempfile.TemporaryFile(prefix="nexus-quality-", dir=directory)
        except OSError as error:
            raise _no_room(directory, 0, error) from error
        self._directory = directory

    def __enter__(self) -> ReferenceFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the space on disk back."""
        self._file.close()

    @property
    def n_predictions(self) -> int:
        return sum(window.n_scored for window in self.windows)

    def add(self, block: Block) -> None:
        """Append a block of the reference's predictions. UsageError when the disk is full."""
        r = reference_of(block.logits, block.targets)
        mask = np.packbits(r.kept, axis=1)
        n_kept = r.kept.sum(axis=1, dtype=np.uint32)
        try:
            for array in (r.nll, r.top, r.lowest, r.step, n_kept, mask, r.codes):
                self.nbytes += self._file.write(np.ascontiguousarray(array).data.cast("B"))
            self._file.flush()
        except OSError as error:
            raise _no_room(self._directory, self.nbytes, error) from error
        self._blocks.append(len(block.targets))

    def blocks(self) -> Iterator[Reference]:
        """Yield the blocks as they were added."""
        self._file.seek(0)
        mask_bytes = (self.n_vocab + 7) // 8
        for n in self._blocks:
            nll = self._take(np.dtype(np.float64), n)
            top = self._take(np.dtype(np.int64), n)
            lowest = self._take(np.dtype(np.float32), n)
            step = self._take(np.dtype(np.float32), n)
            n_kept = self._take(np.dtype(np.uint32), n)
            mask = self._take(np.dtype(np.uint8), n * mask_bytes).reshape(n, mask_bytes)
            kept = np.unpackbits(mask, axis=1, count=self.n_vocab).astype(np.bool_)
            codes = self._take(np.dtype(np.uint16), int(n_kept.sum(dtype=np.int64)))
            yield Reference(nll=nll, top=top, lowest=lowest, step=step, kept=kept, codes=codes)

    def _take(self, kind: np.dtype[Any], count: int) -> npt.NDArray[Any]:
        data = self._file.read(kind.itemsize * count)
        assert len(data) == kind.itemsize * count, "nobody else writes to this file"
        return np.frombuffer(data, kind)


def _no_room(directory: str | None, nbytes: int, error: OSError) -> UsageError:
    where = directory or tempfile.gettempdir()
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return UsageError(
        f"the predictions of the reference cannot be kept in {where}: {error.strerror}"
        + (f" after {format_bytes(nbytes)}" if full else ""),
        hint="name a larger place with --scratch, or compare fewer windows with --windows",
    )
