"""Which tokens of a text are predicted from which: the windows of llama.cpp's perplexity tool.

The text is cut into windows of `n_ctx` tokens that do not overlap; what is left over is not used.
The first token of each window is replaced by the beginning-of-sequence token where the model wants
one. The first half of a window is context only: predictions count from token n_ctx / 2 on, and the
last token has no successor in its window, so a window scores n_ctx - 1 - n_ctx / 2 predictions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nexus_ext.errors import UsageError

MIN_WINDOW = 4  # tokens: less leaves nothing to score
MIN_WINDOWS = 2  # as llama.cpp asks for


@dataclass(frozen=True, slots=True)
class Window:
    """One window: tokens to evaluate from an empty context, and what they should predict."""

    tokens: tuple[int, ...]
    first: int  # the first position whose logits count

    @property
    def targets(self) -> tuple[int, ...]:
        """The tokens that positions first, first + 1, ... are to predict."""
        return self.tokens[self.first + 1 :]

    @property
    def n_scored(self) -> int:
        return len(self.tokens) - 1 - self.first


def windows(
    tokens: Sequence[int], n_ctx: int, *, bos: int | None, most: int | None = None
) -> list[Window]:
    """Cut `tokens` (of the whole text, with its BOS) into at most `most` windows.

    `bos` is None for models that want no BOS. Raises UsageError when the text is too short.
    """
    if n_ctx < MIN_WINDOW:
        raise UsageError(
            f"a window of {n_ctx} tokens leaves nothing to score",
            hint=f"give a --ctx of at least {MIN_WINDOW}, usually 512",
        )
    if len(tokens) < MIN_WINDOWS * n_ctx:
        raise UsageError(
            f"the text has {len(tokens)} tokens, and windows of {n_ctx} need at least "
            f"{MIN_WINDOWS * n_ctx}",
            hint="give a longer text or a smaller --ctx",
        )
    n = len(tokens) // n_ctx if most is None else min(most, len(tokens) // n_ctx)
    found = []
    for i in range(n):
        part = list(tokens[i * n_ctx : (i + 1) * n_ctx])
        if bos is not None:
            part[0] = bos
        found.append(Window(tuple(part), n_ctx // 2))
    return found
