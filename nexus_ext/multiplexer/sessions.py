"""KV states of sequences that had to leave a context: kept in memory, then on disk, then forgotten.

A state belongs to one model file and one kind of context (the key says which) and to the tokens
that it was computed from. Whoever asks gets the one that shares the longest beginning with a
prompt. Knows nothing of llama.cpp: a state is bytes.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

_SHORTEST = 16  # tokens; less is computed sooner than it is kept


@dataclass(slots=True)
class Saved:
    """One state. `data` is None while it is on disk."""

    key: str
    tokens: tuple[int, ...]
    n_prefilled: int  # of the tokens: computed as a part of a prompt, see prefix.reusable
    session: str | None
    nbytes: int
    data: bytearray | None
    file: Path | None = field(default=None)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens two sequences begin with together."""
    n = min(len(a), len(b))
    for i in range(n):
        if a[i] != b[i]:
            return i
    return n


class SessionStore:
    """States within `ram_bytes` of memory and `disk_bytes` of disk. Used by one thread."""

    def __init__(
        self, ram_bytes: int, disk_bytes: int = 0, directory: str | os.PathLike[str] | None = None
    ) -> None:
        self.ram_bytes = ram_bytes
        self.disk_bytes = disk_bytes if directory is not None else 0
        self._directory = directory
        self._place: tempfile.TemporaryDirectory[str] | None = None
        self._saved: list[Saved] = []  # oldest first

    @property
    def used_ram_bytes(self) -> int:
        return sum(saved.nbytes for saved in self._saved if saved.data is not None)

    @property
    def used_disk_bytes(self) -> int:
        return sum(saved.nbytes for saved in self._saved if saved.file is not None)

    def __len__(self) -> int:
        return len(self._saved)

    def wants(self, n_tokens: int, nbytes: int, session: str | None = None) -> bool:
        """Whether a state of this size would be kept: ask before it is copied.

        That of a session is kept however short it is: what was generated one by one and is computed
        again as a prompt is not bit by bit the same.
        """
        return (n_tokens >= _SHORTEST or session is not None) and nbytes <= self.ram_bytes

    def reserve(self, nbytes: int) -> None:
        """Make room in memory for a state of this size, before it is copied.

        Others go to disk or are forgotten, so that memory holds at most `ram_bytes` of states also
        while one is on its way.
        """
        self._shrink(nbytes)

    def put(self, saved: Saved) -> None:
        """Keep a state. One of the same session, or of its beginning, is forgotten."""
        for old in list(self._saved):
            same = old.session is not None and old.session == saved.session
            n = len(old.tokens)
            part = old.session is None and old.tokens == saved.tokens[:n]
            if old.key == saved.key and (same or part):
                self._drop(old)
        self._saved.append(saved)
        self._shrink()

    def best(self, key: str, prompt: Sequence[int], session: str | None) -> Saved | None:
        """Return the state that serves `prompt` best: of its session, else the longest prefix."""
        own = [saved for saved in self._saved if saved.key == key]
        if session is not None:
            for saved in reversed(own):
                if saved.session == session and common_prefix(saved.tokens, prompt):
                    return saved
        found = max(own, key=lambda saved: common_prefix(saved.tokens, prompt), default=None)
        return found if found and common_prefix(found.tokens, prompt) >= _SHORTEST else None

    def newest(self, key: str, n: int) -> list[Saved]:
        """Return the `n` states of `key` that were kept last."""
        return [saved for saved in self._saved if saved.key == key][-n:] if n else []

    def take(self, saved: Saved) -> bytearray | None:
        """Return the bytes of a state, and forget it.

        None: its file cannot be read any more, or it was forgotten to make room for another.
        """
        others = [each for each in self._saved if each is not saved]
        if len(others) == len(self._saved):
            return None
        self._saved = others
        if saved.file is None:
            return saved.data
        self.reserve(saved.nbytes)
        try:
            return _read(saved.file, saved.nbytes)
        finally:
            saved.file.unlink(missing_ok=True)

    def forget(self, key: str) -> None:
        """Forget all states of `key`."""
        for saved in [saved for saved in self._saved if saved.key == key]:
            self._drop(saved)

    def close(self) -> None:
        for saved in list(self._saved):
            self._drop(saved)
        if self._place is not None:
            self._place.cleanup()
            self._place = None

    def _drop(self, saved: Saved) -> None:
        self._saved.remove(saved)
        if saved.file is not None:
            saved.file.unlink(missing_ok=True)

    def _shrink(self, coming_bytes: int = 0) -> None:
        """Oldest first from memory to disk, and from disk to nothing."""
        for saved in list(self._saved):
            if self.used_ram_bytes + coming_bytes <= self.ram_bytes:
                break
            if saved.data is not None and not self._to_disk(saved):
                self._drop(saved)
        for saved in list(self._saved):
            if self.used_disk_bytes <= self.disk_bytes:
                break
            if saved.file is not None:
                self._drop(saved)

    def _to_disk(self, saved: Saved) -> bool:
        if saved.nbytes > self.disk_bytes or saved.data is None:
            return False
        if self._place is None:
            self._place = tempfile.TemporaryDirectory(prefix="nexus-kv-", dir=self._directory)
        try:
            descriptor, name = tempfile.mkstemp(dir=self._place.name, suffix=".kv")
            with os.fdopen(descriptor, "wb") as file:
                file.write(saved.data)
        except OSError:  # a full disk: the state is lost, which costs a prefill
            return False
        saved.file, saved.data = Path(name), None
        return True


def _read(file: Path, nbytes: int) -> bytearray | None:
    """Return the bytes of a file without a second copy of them; None: it is not as it was."""
    data = bytearray(nbytes)
    try:
        with open(file, "rb", buffering=0) as stream:
            view, at = memoryview(data), 0
            while at < nbytes and (n := stream.readinto(view[at:])):
                at += n
            return data if at == nbytes and not stream.read(1) else None
    except OSError:
        return None
