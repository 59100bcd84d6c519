"""How much of a prompt need not be computed again. Pure.

llama.cpp's kernels sum a lone token in another order than several, so the KV state of a token that
was generated (alone) is not bit by bit that of the same token inside a prompt. Among tokens that
were computed together it makes no difference how many they were. A request that belongs to no
session gets what a fresh run would compute: only states that were computed as a prompt's are used
for it, and no token is left alone that would not be alone in a fresh run. A request of a session
goes on with what the session has, as one process that keeps its context would.
"""

from __future__ import annotations


def reusable(
    n_prompt: int, n_common: int, n_prefilled: int, n_ubatch: int, *, session: bool
) -> int:
    """Return how many of the first `n_common` tokens of a prompt to keep from a state.

    n_prompt: tokens of the prompt, of which the last is always computed.
    n_prefilled: the leading tokens of the state that were computed as a fresh run would.
    """
    n = min(n_common, n_prompt - 1)
    if session:
        return n
    n = min(n, n_prefilled)
    # Chunks end at multiples of n_ubatch. The one that begins at n must not be a single token,
    # unless a fresh run would compute just that one alone.
    end = min(n_prompt, (n // n_ubatch + 1) * n_ubatch)
    if n % n_ubatch and end - n == 1:
        n -= 1
    return n


def chunk_end(at: int, n_prompt: int, n_ubatch: int) -> int:
    """Return where the chunk of a prompt that begins at `at` ends."""
    return min(n_prompt, (at // n_ubatch + 1) * n_ubatch)


def prefilled(n_computed: int, n_prefilled: int, at: int) -> int:
    """Return the new `n_prefilled` after tokens [at, n_computed) were computed as one chunk.

    A lone token counts only where a fresh run of every longer prompt would compute it alone, which
    is nowhere: such a state ends before it.
    """
    if n_prefilled < at or n_computed - at < 2:
        return n_prefilled
    return n_computed
