"""Whether a codec keeps its promises: what it must give back, and what it must refuse."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from nexus_ext.codecs import Codec, is_codec_name
from nexus_ext.errors import FormatError

_TYPES: Final = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K", "MXFP4", "TQ2_0")
_SAMPLE_BYTES: Final = 1 << 16
_SIZES: Final = (1, 2, 3, 255, 4097)
_THREADS: Final = 4


@dataclass(frozen=True, slots=True)
class CodecReport:
    """What a codec did to random weights; trained weights are somewhat easier."""

    codec: str
    ratios: Mapping[str, float]  # type -> stored bytes / raw bytes


def check_codec(codec: Codec) -> CodecReport:
    """Put a codec through what files will; AssertionError says what it does wrong.

    Round trips of weights of many types, of bytes of any kind and of odd sizes, from several
    threads at once. Damaged bytes, or bytes of another size, must raise FormatError, or decode to
    something of the right size: the hash of each chunk finds those. Any other error is a failure.
    """
    assert is_codec_name(codec.name), f"{codec.name!r} is no name of a codec"
    samples = {name: _weights(name) for name in _TYPES}
    ratios = {}
    for name, raw in samples.items():
        ratios[name] = len(_round_trip(codec, raw, name)) / len(raw)
    for size in _SIZES:
        for raw in (bytes(size), samples["F32"][:size], b"\xff" * size):
            _round_trip(codec, raw, "F32")
    _round_trip(codec, samples["Q8_0"], "")
    _round_trip(codec, samples["Q8_0"], "a type of later")
    _damage(codec, samples["BF16"][:4096])
    with ThreadPoolExecutor(_THREADS) as pool:
        rounds = [pool.submit(_round_trip, codec, raw, n) for n, raw in samples.items()]
        for one in rounds:
            one.result()
    return CodecReport(codec.name, ratios)


def _weights(type_name: str) -> bytes:
    from nexus_ext.testing.synthetic.blocks import pattern

    return pattern(type_name, 0, False)[:_SAMPLE_BYTES]


def _round_trip(codec: Codec, raw: bytes, type_name: str) -> bytes:
    what = f"{codec.name}: {len(raw)} bytes of {type_name or 'no type'}"
    stored = codec.encode(memoryview(raw), type_name)
    assert isinstance(stored, bytes), f"{what}: encode returned {type(stored).__name__}"
    out = bytearray(len(raw))
    try:
        codec.decode(memoryview(stored), memoryview(out))
    except FormatError as error:
        raise AssertionError(f"{what} do not come back: {error}") from error
    assert out == raw, f"{what} do not come back"
    return stored


def _damage(codec: Codec, raw: bytes) -> None:
    stored = codec.encode(memoryview(raw), "BF16")
    for size in (len(raw) - 1, len(raw) + 1, 0):
        assert not _decodes(codec, stored, size), (
            f"{codec.name}: {len(raw)} bytes decode to {size} without an error"
        )
    for cut in (0, 1, len(stored) // 2, len(stored) - 1):
        assert not _decodes(codec, stored[:cut], len(raw)), (
            f"{codec.name}: the first {cut} of {len(stored)} bytes decode without an error"
        )
    for at in range(0, len(stored), max(1, len(stored) // 64)):
        _decodes(codec, stored[:at] + bytes([stored[at] ^ 0xFF]) + stored[at + 1 :], len(raw))


def _decodes(codec: Codec, stored: bytes, size: int) -> bool:
    """Tell whether there was no error; any other than FormatError is one too many."""
    out = bytearray(size)
    try:
        codec.decode(memoryview(stored), memoryview(out))
    except FormatError:
        return False
    except Exception as error:
        raise AssertionError(
            f"{codec.name}: {type(error).__name__} instead of FormatError: {error}"
        ) from error
    return True
