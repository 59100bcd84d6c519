"""Random quantized blocks that decode to weights of zero mean and a given spread.

Knows where the scales of each block format are; everything else in a block may be random bits.
Weights written with these are numerically harmless (activations stay finite), not trained.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

Bytes = npt.NDArray[np.uint8]

WEIGHT_STD = 0.02
# A matrix made by repeating a pattern has as many different rows as the pattern has blocks: the
# large one is enough for every vocabulary, the small one for tests.
SMALL_PATTERN_NBYTES = 1 << 20
LARGE_PATTERN_NBYTES = 32 << 20

# Type -> (offset of an fp16 in the block, its value in units of the block scale). The second
# number of formats with an offset (m, dmin) is chosen so that the mean of a block is zero.
_SCALES: dict[str, tuple[tuple[int, float], ...]] = {
    "Q4_0": ((0, 1),),
    "Q4_1": ((0, 1), (2, -7.5)),
    "Q5_0": ((0, 1),),
    "Q5_1": ((0, 1), (2, -15.5)),
    "Q8_0": ((0, 1),),
    "Q2_K": ((80, 1), (82, 1.5)),
    "Q3_K": ((108, 1),),
    "Q4_K": ((0, 1), (2, 7.5)),
    "Q5_K": ((0, 1), (2, 15.5)),
    "Q6_K": ((208, 1),),
    "IQ4_NL": ((0, 1),),
    "IQ4_XS": ((0, 1),),
    "IQ2_XXS": ((0, 1),),
    "IQ2_XS": ((0, 1),),
    "IQ2_S": ((0, 1),),
    "IQ3_XXS": ((0, 1),),
    "IQ3_S": ((0, 1),),
    "IQ1_S": ((0, 1),),
    "TQ1_0": ((52, 1),),
    "TQ2_0": ((64, 1),),
}
_FLOATS = ("F32", "F16", "BF16")
WEIGHT_TYPES = (*_FLOATS, *_SCALES, "MXFP4")


def block_elements(type_name: str) -> int:
    """Return how many weights a block of this type holds."""
    return GGML_QUANT_SIZES[GGMLQuantizationType[type_name]][0]


def nbytes_of(type_name: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor of ggml `shape`."""
    elements, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    count = 1
    for extent in shape:
        count *= extent
    return count // elements * nbytes


def storable_type(type_name: str, row_elements: int) -> str:
    """Return `type_name`, or what llama.cpp falls back to when rows do not fill its blocks."""
    for candidate in (type_name, "Q8_0"):
        if row_elements % block_elements(candidate) == 0:
            return candidate
    return "F16"


@functools.lru_cache(maxsize=16)
def pattern(type_name: str, seed: int, large: bool) -> bytes:
    """Return random blocks, a prime number of them, so that no two rows start at the same one."""
    if type_name not in WEIGHT_TYPES:
        raise ValueError(f"no random blocks for {type_name}; known: {', '.join(WEIGHT_TYPES)}")
    kind = GGMLQuantizationType[type_name]
    nbytes = GGML_QUANT_SIZES[kind][1]
    n_blocks = _prime_below((LARGE_PATTERN_NBYTES if large else SMALL_PATTERN_NBYTES) // nbytes)
    rng = np.random.default_rng((seed, int(kind)))
    if type_name in _FLOATS:
        weights = rng.normal(0.0, WEIGHT_STD, n_blocks).astype(np.float32)
        if type_name == "BF16":
            return (weights.view(np.uint32) >> 16).astype(np.uint16).tobytes()
        return weights.astype(np.float16 if type_name == "F16" else np.float32).tobytes()
    blocks = rng.integers(0, 256, (n_blocks, nbytes), dtype=np.uint8)
    if type_name == "TQ2_0":
        trits = rng.integers(0, 3, (n_blocks, 64, 4), dtype=np.uint8)
        blocks[:, :64] = (trits << np.array([0, 2, 4, 6], dtype=np.uint8)).sum(axis=2)
    if type_name == "MXFP4":
        blocks[:, 0] = 120  # the exponent of the shared scale, a power of two near 0.02 / 5
    else:
        # Both signs, since the levels of some formats (-8 to 7) are not balanced about zero.
        signs = rng.choice(np.array([-1.0, 1.0]), n_blocks)
        if type_name in ("TQ1_0", "TQ2_0"):
            signs[:] = 1.0  # -1, 0, 1: balanced already, and models trained so have one scale
        _set_scales(type_name, blocks, signs)
        spread = float(dequantize(blocks[:1024], kind).std())
        _set_scales(type_name, blocks, signs * (WEIGHT_STD / spread))
    return blocks.tobytes()


def _set_scales(type_name: str, blocks: Bytes, scales: npt.NDArray[np.float64]) -> None:
    for offset, factor in _SCALES[type_name]:
        encoded = (scales * factor).astype(np.float16).view(np.uint8)
        blocks[:, offset : offset + 2] = encoded.reshape(len(blocks), 2)


def _prime_below(limit: int) -> int:
    for candidate in range((limit - 1) | 1, 2, -2):
        if all(candidate % factor for factor in range(3, int(candidate**0.5) + 1, 2)):
            return candidate
    raise ValueError(f"no prime below {limit}")
