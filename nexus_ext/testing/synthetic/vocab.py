"""A SentencePiece-style vocabulary with byte fallback, of any size from 259 on.

Every text can be tokenized with it; its words mean nothing.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterator

from nexus_ext.testing.synthetic.container import Value

N_SPECIAL = 3
MIN_TOKENS = N_SPECIAL + 256
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6


def tokenizer_pairs(n_vocab: int) -> dict[str, Value]:
    """Return the key-value pairs of a tokenizer with `n_vocab` tokens."""
    if n_vocab < MIN_TOKENS:
        raise ValueError(f"n_vocab is {n_vocab}, the least with byte fallback is {MIN_TOKENS}")
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    types = [_UNKNOWN, _CONTROL, _CONTROL] + [_BYTE] * 256
    n_words = n_vocab - MIN_TOKENS
    tokens += itertools.islice(_words(), n_words)
    types += [_NORMAL] * n_words
    scores = [0.0] * MIN_TOKENS + [-float(rank + 1) for rank in range(n_words)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
    }


def _words() -> Iterator[str]:
    """Yield the space sign and then every word of letters, with and without a space before it."""
    yield "▁"
    for length in itertools.count(1):
        for letters in itertools.product(string.ascii_lowercase, repeat=length):
            word = "".join(letters)
            yield word
            yield "▁" + word
