"""The element types of ggml: their numbers, names and block sizes.

Knows sizes only, not what the bits of a block mean. The table is that of the installed `gguf`
package, so that a newer package brings newer types, put right where it differs from ggml.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

# What releases of the `gguf` package lack or (Q8_1, whose scales ggml made smaller) state wrongly:
# number -> (name, elements per block, bytes per block).
_CORRECTIONS = {
    9: ("Q8_1", 32, 36),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}


@dataclass(frozen=True, slots=True)
class GgmlType:
    """One element type; a row is a whole number of blocks."""

    number: int
    name: str
    block_elements: int
    block_nbytes: int


@functools.cache
def ggml_types() -> Mapping[int, GgmlType]:
    """Return every known type by its number."""
    # Imported late: the package pulls in numpy, which only those who open a model shall pay for.
    from gguf.constants import GGML_QUANT_SIZES

    facts = {int(kind): (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}
    facts.update(_CORRECTIONS)
    return {number: GgmlType(number, *fact) for number, fact in facts.items()}
