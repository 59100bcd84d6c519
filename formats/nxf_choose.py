"""Which codec pays on this machine: by the ratio and the decode rate of samples, and the disk.

Reading and decoding overlap, so that stored weights arrive at the smaller of two rates: the disk's
divided by the ratio, and the decoder's. A codec is chosen where that beats the disk.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from nexus_ext.codecs import RAW, Codecs
from nexus_ext.formats.sources import Source

SAMPLE_NBYTES: Final = 1 << 20
N_SAMPLES: Final = 3  # tensors of a type
_REPEATS: Final = 3
_MARGIN: Final = 1.03  # a gain that is smaller is not worth another codec


@dataclass(frozen=True, slots=True)
class Choice:
    """What was measured for the tensors of one type, and what follows."""

    type_name: str
    ratio: float  # stored to decoded bytes
    decode_bytes_s: float  # decoded bytes a second, one thread
    arrives_bytes_s: float  # decoded bytes a second, from a disk of `disk_bytes_s`
    codec: str


def choose_codecs(
    source: Source, codecs: Codecs, codec: str, disk_bytes_s: float, n_threads: int = 1
) -> tuple[Mapping[str, str], tuple[Choice, ...]]:
    """Measure `codec` on samples of every type; `n_threads` decode while the disk is read.

    Returns the codec by tensor, and what was measured.
    """
    samples: dict[str, list[int]] = {}
    for number, tensor in enumerate(source.catalog.tensors):
        samples.setdefault(tensor.type_name, []).append(number)
    choices = []
    for type_name, members in sorted(samples.items()):
        members.sort(key=lambda i: -source.catalog.tensors[i].nbytes)
        ratio, rate = _measure(source, codecs, codec, type_name, members[:N_SAMPLES])
        arrives = min(disk_bytes_s / ratio, rate * n_threads)
        pays = arrives > disk_bytes_s * _MARGIN
        choices.append(Choice(type_name, ratio, rate, arrives, codec if pays else RAW))
    by_type = {choice.type_name: choice.codec for choice in choices}
    named = {tensor.name: by_type[tensor.type_name] for tensor in source.catalog.tensors}
    return named, tuple(choices)


def _measure(
    source: Source, codecs: Codecs, codec: str, type_name: str, numbers: list[int]
) -> tuple[float, float]:
    """Return the ratio and the decode rate over the first bytes of some tensors."""
    coder = codecs.get(codec)
    raw_nbytes = stored_nbytes = 0
    seconds = 0.0
    for number in numbers:
        nbytes = min(SAMPLE_NBYTES, source.catalog.tensors[number].nbytes)
        raw = memoryview(bytes(source.read(number, 0, nbytes, bytearray(nbytes))))
        stored = memoryview(coder.encode(raw, type_name))
        out = memoryview(bytearray(nbytes))
        best = float("inf")
        for _ in range(_REPEATS):
            start = time.perf_counter()
            coder.decode(stored, out)
            best = min(best, time.perf_counter() - start)
        raw_nbytes += nbytes
        stored_nbytes += len(stored)
        seconds += best
    return stored_nbytes / raw_nbytes, raw_nbytes / max(seconds, 1e-9)
