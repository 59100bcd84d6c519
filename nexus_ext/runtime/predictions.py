"""What a model predicts for a text: logits, window by window, in bounded memory.

Goes through the low-level batch of llama-cpp-python: logits are asked for where they count, seen
where llama.cpp put them, and handed on in blocks. At no time are there more of them than the
positions of one batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nexus_ext.errors import UsageError
from nexus_ext.quality.text import Window, windows

if TYPE_CHECKING:
    from nexus_ext.placement import PlanRequest
    from nexus_ext.runtime.llama import Llama
    from nexus_ext.runtime.planning import Planned

_BLOCK_BYTES = 16 << 20  # of logits that are worked on at once


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive predictions of one window."""

    window: int
    logits: npt.NDArray[np.float32]  # (n, n_vocab), valid until the next block
    targets: npt.NDArray[np.int64]  # (n,) the tokens that followed


@contextlib.contextmanager
def opened(model: str, planned: Planned, request: PlanRequest, **more: Any) -> Iterator[Llama]:
    """Within the block: the model as it was planned, with logits wherever they are asked for."""
    from nexus_ext.formats.ggml_types import ggml_types
    from nexus_ext.runtime.llama import Llama
    from nexus_ext.runtime.worker import session_of

    session = session_of(request, planned)
    kv_types = {kind.name.lower(): number for number, kind in ggml_types().items()}
    llm = Llama(
        model,
        plan=planned.plan,
        hardware=planned.hardware,
        n_ctx=session.n_ctx,
        n_batch=session.n_batch,
        n_ubatch=session.n_ubatch,
        n_threads=session.n_threads,
        n_threads_batch=session.n_threads,
        type_k=kv_types[session.kv_type_k],
        type_v=kv_types[session.kv_type_v],
        flash_attn=session.flash_attn,
        logits_all=True,
        verbose=False,
        **more,
    )
    try:
        yield llm
    finally:
        llm.close()


def text_windows(llm: Any, text: bytes, n_ctx: int, most: int | None = None) -> list[Window]:
    """Cut a text into windows with the tokens of this model, as llama.cpp's tools do.

    They drop one line feed at the end of a file. Raises UsageError when the text is too short.
    """
    tokens = llm.tokenize(text.removesuffix(b"\n"), add_bos=True, special=False)
    bos = int(llm.token_bos()) if llm._model.add_bos_token() else None
    return windows(tokens, n_ctx, bos=bos, most=most)


def evaluate(llm: Any, tokens: Sequence[int], first: int) -> Iterator[npt.NDArray[np.float32]]:
    """Evaluate tokens from an empty context; yield the logits of positions >= first in order.

    Each array, (n, n_vocab), is valid until the next one is asked for.
    """
    batch, n_vocab = llm._batch, llm.n_vocab()
    llm.reset()
    llm._ctx.kv_cache_clear()
    for begin in range(0, len(tokens), llm.n_batch):
        chunk = tokens[begin : begin + llm.n_batch]
        batch.set_batch(batch=chunk, n_past=begin, logits_all=False)
        wanted = range(max(first - begin, 0), len(chunk))
        for i in wanted:
            batch.batch.logits[i] = True
        llm._ctx.decode(batch)
        if wanted:
            yield np.ctypeslib.as_array(llm._ctx.get_logits(), (len(wanted), n_vocab))


def predictions(llm: Any, parts: Sequence[Window]) -> Iterator[Block]:
    """Yield what the model predicts for the scored tokens of each window, in order."""
    rows = max(1, _BLOCK_BYTES // (4 * llm.n_vocab()))
    for number, window in enumerate(parts):
        targets = np.array(window.targets, dtype=np.int64)
        done = 0
        # The last token has no successor: what it predicts is not computed.
        for logits in evaluate(llm, window.tokens[:-1], window.first):
            for begin in range(0, len(logits), rows):
                block = logits[begin : begin + rows]
                yield Block(number, block, targets[done : done + len(block)])
                done += len(block)


def read_text(path: str) -> bytes:
    """Return the text in a file. UsageError when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise UsageError(
            f"the text {path!r} cannot be read: {error.strerror}", hint="name a text file"
        ) from error
