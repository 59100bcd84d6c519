"""Warm start: which experts a model uses most, kept from one session to the next.

One small file for each model, beside the hardware profiles: how often routers chose each expert,
by the name of the layer's first tensor of experts. With it the cache is filled while nothing else
is asked of the disk, from the end of loading to the first graph. A file that cannot be read or
understood is as good as none, and is replaced; one that cannot be written costs a cold start next
time. Both are logged, neither is an error. Where there is no file, the section `popularity` of an
NXF is as good: its contents are the same.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import os
import sys
import threading
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from nexus_ext import core
from nexus_ext.errors import FormatError, NexusError
from nexus_ext.formats.new_file import replace_whole
from nexus_ext.formats.sections import read_section
from nexus_ext.hardware.cache import default_cache_dir
from nexus_ext.types import Catalog

_log = logging.getLogger("nexus_ext.runtime")

VERSION: Final = 1
VARIABLE: Final = "NEXUS_WARM_START"  # "0" is the same as `warm_start=False`
MOST: Final = 0xFFFF  # of a count: above it all counts of a layer are halved, so that old uses fade
MOST_EXPERTS: Final = 1 << 16
MOST_BYTES: Final = 64 << 20  # of a file
_STEP_S: Final = 0.05  # of reading, between two looks at whether to stop


@dataclass(frozen=True, slots=True)
class Popularity:
    """How often the experts of each layer were chosen, all sessions together."""

    fingerprint: str  # of the model
    counts: Mapping[str, tuple[int, ...]]  # first tensor of the layer's experts -> of each expert

    def plus(self, counts: Mapping[str, Sequence[int]]) -> Popularity:
        """Return this with another session's counts added."""
        merged = dict(self.counts)
        for name, new in counts.items():
            old = merged.get(name, ())
            if len(old) != len(new):
                old = (0,) * len(new)
            sums = [a + b for a, b in zip(old, new, strict=True)]
            while max(sums, default=0) > MOST:
                sums = [n // 2 for n in sums]
            merged[name] = tuple(sums)
        return Popularity(self.fingerprint, merged)

    def to_json(self) -> str:
        """Return the text of the file: counts as base64 of little-endian 16-bit numbers."""
        layers = {name: _encoded(counts) for name, counts in self.counts.items()}
        crc = binascii.crc32(json.dumps(layers, sort_keys=True).encode())
        return json.dumps(
            {
                "nexus_popularity": VERSION,
                "fingerprint": self.fingerprint,
                "crc32": crc,
                "layers": layers,
            }
        )

    @classmethod
    def from_json(cls, text: str, *, source: str) -> Popularity:
        """Return what `to_json` wrote. Raises FormatError, which names what is wrong."""
        try:
            fields = json.loads(text)
            version, layers = fields["nexus_popularity"], fields["layers"]
            if version != VERSION:
                raise ValueError(f"its version is {version!r}, this is {VERSION}")
            if binascii.crc32(json.dumps(layers, sort_keys=True).encode()) != fields["crc32"]:
                raise ValueError("its checksum is wrong")
            return cls(
                str(fields["fingerprint"]),
                {str(name): _decoded(data) for name, data in layers.items()},
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise FormatError(
                f"{source} is no popularity of experts: {error}", hint="it is replaced when it can"
            ) from error


def _encoded(counts: Sequence[int]) -> str:
    data = b"".join(n.to_bytes(2, "little") for n in counts)
    return base64.b64encode(data).decode("ascii")


def _decoded(text: str) -> tuple[int, ...]:
    data = base64.b64decode(text, validate=True)
    if len(data) % 2 or len(data) > 2 * MOST_EXPERTS:
        raise ValueError(f"a layer has {len(data)} bytes of counts")
    numbers = array("H", data)
    if sys.byteorder == "big":
        numbers.byteswap()
    return tuple(numbers)


def popularity_file(fingerprint: str) -> str:
    """Return the path of the file for a model; it may not exist yet."""
    directory = default_cache_dir(os.environ, os.path.expanduser("~"))
    return os.path.join(directory, f"experts-{fingerprint}.json")


def load(file: str, fingerprint: str) -> Popularity:
    """Return what is known of a model; nothing when the file is absent, broken or of another."""
    none = Popularity(fingerprint, {})
    try:
        if os.path.getsize(file) > MOST_BYTES:
            raise FormatError(f"{file} is larger than any popularity of experts", hint="remove it")
        with open(file, encoding="utf-8") as stream:
            found = Popularity.from_json(stream.read(), source=file)
    except FileNotFoundError:
        return none
    except (OSError, UnicodeDecodeError, FormatError) as error:
        _log.warning("the stored popularity of experts is ignored: %s", error)
        return none
    if found.fingerprint != fingerprint:
        _log.warning("%s is for the model %s and is ignored", file, found.fingerprint)
        return none
    return found


def store(file: str, popularity: Popularity) -> bool:
    """Write the file and return whether that worked; readers see the old one or the whole new."""
    try:
        replace_whole(file, popularity.to_json().encode())
    except OSError as error:
        _log.warning("the popularity of experts is not stored: %s", error)
        return False
    return True


def wanted(warm_start: bool | None) -> bool:
    """Return whether to start warm: as the argument says, else as the environment does."""
    return os.environ.get(VARIABLE, "") != "0" if warm_start is None else warm_start


class WarmStart:
    """Fills the cache of a model that was just loaded, and remembers what it used.

    Between `start` and `stop` a thread reads experts into empty slots, until the first graph wants
    to run. `stop` must be called before the model is released.
    """

    def __init__(self, model: core.Model, catalog: Catalog) -> None:
        self._model = model
        self._fingerprint = catalog.fingerprint
        self._path = catalog.files[0].path
        self._names = [tensor.name for tensor in catalog.tensors]
        self._file = popularity_file(catalog.fingerprint)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        known = load(self._file, self._fingerprint)
        if not known.counts:
            known = self._of_the_model() or known
        number = {name: i for i, name in enumerate(self._names)}
        counts = {number[name]: c for name, c in known.counts.items() if name in number}
        if not counts:
            return
        self._model.set_popularity(counts)
        self._thread = threading.Thread(target=self._preload, name="nexus-warm", daemon=True)
        self._thread.start()

    def _of_the_model(self) -> Popularity | None:
        """What an NXF says of itself: where it was never run here, that is what is known."""
        try:
            text = read_section(self._path, "popularity")
            found = Popularity.from_json(text.decode(), source=self._path) if text else None
        except (NexusError, UnicodeDecodeError) as error:
            _log.warning("the popularity of experts in %s is ignored: %s", self._path, error)
            return None
        if found is not None and found.fingerprint != self._fingerprint:
            _log.warning("the popularity of experts in %s is of another model", self._path)
            return None
        return found

    def wait(self) -> None:
        """Wait until nothing is left to read, or a graph has run."""
        if self._thread is not None:
            self._thread.join()

    def stop(self) -> None:
        """End reading, and add what this session has used to the file."""
        self._stop.set()
        self.wait()
        counts = {self._names[i]: c for i, c in self._model.popularity().items() if any(c)}
        if counts:  # the file may have changed since: other sessions of the model write it too
            store(self._file, load(self._file, self._fingerprint).plus(counts))

    def _preload(self) -> None:
        try:
            while not self._stop.is_set() and self._model.preload(_STEP_S):
                pass
        except NexusError as error:  # what cannot be read now is read, or fails, when it is used
            _log.warning("experts are not read ahead: %s", error)
