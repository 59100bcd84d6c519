"""How much of a prompt need not be computed again, and in which pieces the rest is. Pure.

llama.cpp's kernels sum in another order for one token, for a few, and for a whole tile of tokens,
so the KV state of a token that was generated (alone) is not bit by bit that of the same token
inside a prompt. Among batches of `TILE` tokens or more it makes no difference how many they are. A
request that belongs to no session gets what a fresh run would compute: only states that were
computed in such batches are used for it, and no token is computed in a smaller batch unless a fresh
run does. A request of a session goes on with what the session has, as one process that keeps its
context would.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

TILE: Final = 8  # tokens; tests/integration/test_batch.py tries what holds for it


def reusable(
    n_prompt: int, n_common: int, n_prefilled: int, n_ubatch: int, *, session: bool
) -> int:
    """Return how many of the first `n_common` tokens of a prompt to keep from a state.

    n_prompt: tokens of the prompt, of which the last is always computed.
    n_prefilled: the leading tokens of the state that were computed as a fresh run would.
    n_ubatch: tokens of a whole chunk, at least 2 * TILE.
    """
    n = min(n_common, n_prompt - 1)
    if session:
        return n
    rest = n_prompt % n_ubatch or n_ubatch  # a fresh run's last chunk
    n = min(n, n_prefilled)
    if rest < TILE:
        n = min(n, n_prompt - rest)
    end = chunk_end(n, n_prompt, n_ubatch)
    if n % n_ubatch and end - n < TILE:
        n = max(0, end - TILE)
    return n


def chunk_end(at: int, n_prompt: int, n_ubatch: int) -> int:
    """Return where the chunk of a prompt that begins at `at` ends: at a multiple of n_ubatch."""
    return min(n_prompt, (at // n_ubatch + 1) * n_ubatch)


def shared_chunk(lengths: Sequence[int], n_ubatch: int) -> tuple[list[int], int]:
    """Return which prompts are computed together, as their places, and how many tokens of each.

    lengths: tokens to the end of each prompt's chunk, the oldest first. One pass over the weights
    then serves several prompts; llama.cpp takes them as one batch when they are equally long. The
    oldest is always among them, and what is computed and what is left of each is a tile or more.
    """
    n = min(*lengths, n_ubatch // len(lengths)) if len(lengths) > 1 else 0
    together = [i for i, length in enumerate(lengths) if length == n or length - n >= TILE]
    if n < TILE or together[:1] != [0]:
        return [0], lengths[0]
    return together, n


def prefilled(n_computed: int, n_prefilled: int, at: int) -> int:
    """Return the new `n_prefilled` after tokens [at, n_computed) were computed as one chunk.

    Less than a tile does not count: a longer prompt would have them in a larger chunk.
    """
    return n_computed if n_prefilled >= at and n_computed - at >= TILE else n_prefilled
