"""The integers inside of GGUF's quantized blocks: taken out, and put back beside the same scales.

A block is scales, whose layout is of no interest here, and one code a weight, in one or two planes
of bits. A plane is cut into chunks of `chunk` bytes; a byte holds 8 / width codes, the lowest bits
first, which belong to weights that are `chunk` apart. Code and weight are related by the scales:
w = base + step * levels[code], with a base and a step for each few weights.

Types whose codes stand for several weights at once (IQ1 to IQ3) are not known here.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Plane:
    """Some bits of every code of a block."""

    offset: int  # bytes, from the beginning of the block
    nbytes: int
    width: int  # bits of a code
    chunk: int  # bytes
    shift: int = 0  # where these bits are in the code


@dataclass(frozen=True, slots=True)
class BlockCodes:
    """Where the codes of a type are, and what they stand for."""

    planes: tuple[Plane, ...]
    levels: tuple[int, ...]  # of code 0, 1, ...

    def take(self, blocks: Bytes) -> Bytes:
        """Return the codes (n, n_weights) of blocks (n, block_nbytes)."""
        codes: Bytes | None = None
        for plane in self.planes:
            data = blocks[:, plane.offset : plane.offset + plane.nbytes]
            data = data.reshape(len(blocks), -1, 1, plane.chunk)
            bits = (data >> _shifts(plane)) & np.uint8((1 << plane.width) - 1)
            part = bits.reshape(len(blocks), -1) << np.uint8(plane.shift)
            codes = part if codes is None else codes | part
        assert codes is not None
        return codes

    def put(self, blocks: Bytes, codes: Bytes) -> None:
        """Write codes (n, n_weights) into blocks (n, block_nbytes), whose other bits stay."""
        for plane in self.planes:
            bits = (codes >> np.uint8(plane.shift)) & np.uint8((1 << plane.width) - 1)
            bits = bits.reshape(len(blocks), -1, 8 // plane.width, plane.chunk)
            data = np.bitwise_or.reduce(bits << _shifts(plane), axis=2)
            blocks[:, plane.offset : plane.offset + plane.nbytes] = data.reshape(len(blocks), -1)


def _shifts(plane: Plane) -> Bytes:
    return np.arange(0, 8, plane.width, dtype=np.uint8)[:, None]


@functools.cache
def block_codes() -> Mapping[str, BlockCodes]:
    """Return what is known, by the name of the type."""
    from gguf.quants import IQ4_NL

    uneven = tuple(int(v) for v in IQ4_NL.kvalues)
    signed = (*range(128), *range(-128, 0))
    return {
        "Q4_0": BlockCodes((Plane(2, 16, 4, 16),), tuple(range(16))),
        "Q4_1": BlockCodes((Plane(4, 16, 4, 16),), tuple(range(16))),
        "Q5_0": BlockCodes((Plane(6, 16, 4, 16), Plane(2, 4, 1, 1, 4)), tuple(range(32))),
        "Q5_1": BlockCodes((Plane(8, 16, 4, 16), Plane(4, 4, 1, 1, 4)), tuple(range(32))),
        "Q8_0": BlockCodes((Plane(2, 32, 8, 32),), signed),
        "Q2_K": BlockCodes((Plane(16, 64, 2, 32),), tuple(range(4))),
        "Q3_K": BlockCodes((Plane(32, 64, 2, 32), Plane(0, 32, 1, 32, 2)), tuple(range(8))),
        "Q4_K": BlockCodes((Plane(16, 128, 4, 32),), tuple(range(16))),
        "Q5_K": BlockCodes((Plane(48, 128, 4, 32), Plane(16, 32, 1, 32, 4)), tuple(range(32))),
        "Q6_K": BlockCodes((Plane(0, 128, 4, 64), Plane(128, 64, 2, 32, 4)), tuple(range(64))),
        "IQ4_NL": BlockCodes((Plane(2, 16, 4, 16),), uneven),
        "IQ4_XS": BlockCodes((Plane(8, 128, 4, 16),), uneven),
    }
