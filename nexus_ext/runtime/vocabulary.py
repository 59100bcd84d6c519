"""A model's vocabulary: text to tokens and back, and the tokens that end an answer."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import llama_cpp.llama_cpp as bindings

from nexus_ext import core
from nexus_ext.errors import UsageError
from nexus_ext.runtime import backend
from nexus_ext.runtime.llama_log import load_failed, reasons_heard, silence_llama_log
from nexus_ext.runtime.loading import load_paged
from nexus_ext.runtime.manifest import manifest_text
from nexus_ext.types import Catalog


class Vocabulary:
    """The vocabulary of a llama_model. Safe to use from several threads."""

    def __init__(self, model: Any) -> None:
        self.pointer = bindings.llama_model_get_vocab(model)
        self.n_tokens = int(bindings.llama_vocab_n_tokens(self.pointer))

    def tokenize(self, text: str, *, add_bos: bool, special: bool) -> list[int]:
        """Return the tokens of `text`. add_bos: with BOS (and EOS), where the model wants them."""
        raw = text.encode("utf-8", "surrogatepass")
        n = len(raw) + 8
        for _ in range(2):
            tokens = (bindings.llama_token * n)()
            got = bindings.llama_tokenize(self.pointer, raw, len(raw), tokens, n, add_bos, special)
            if got >= 0:
                return list(tokens[:got])
            n = -got
        raise UsageError(f"a text of {len(raw)} bytes cannot be tokenized")

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Return the text of `tokens`, special ones included."""
        self.check(tokens)
        array = (bindings.llama_token * len(tokens))(*tokens)
        n = 8 * len(tokens) + 16
        for _ in range(2):
            buffer = ctypes.create_string_buffer(n)
            got = bindings.llama_detokenize(
                self.pointer,
                array,
                len(tokens),
                ctypes.cast(buffer, ctypes.c_char_p),
                n,
                False,
                True,
            )
            if got >= 0:
                return buffer.raw[:got].decode("utf-8", "replace")
            n = -got
        raise UsageError(f"{len(tokens)} tokens cannot be turned into text")

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """Return the bytes of one token, maybe a part of a UTF-8 sequence.

        Control tokens (end of turn and the like) are empty, unless `special`.
        """
        n = 64
        for _ in range(2):
            buffer = ctypes.create_string_buffer(n)
            got = bindings.llama_token_to_piece(
                self.pointer, token, ctypes.cast(buffer, ctypes.c_char_p), n, 0, special
            )
            if got >= 0:
                return buffer.raw[:got]
            n = -got
        return b""

    def ends(self, token: int) -> bool:
        """Whether `token` ends an answer."""
        return bool(bindings.llama_vocab_is_eog(self.pointer, token))

    def text(self, token: int) -> str:
        """Return how the vocabulary writes a token ("<|im_end|>"); "" for none (-1)."""
        raw = bindings.llama_vocab_get_text(self.pointer, token) if token >= 0 else b""
        return raw.decode("utf-8", "replace") if raw else ""

    @property
    def bos(self) -> int:
        return int(bindings.llama_vocab_bos(self.pointer))

    @property
    def eos(self) -> int:
        return int(bindings.llama_vocab_eos(self.pointer))

    def end_tokens(self) -> tuple[int, ...]:
        return tuple(token for token in range(self.n_tokens) if self.ends(token))

    def check(self, tokens: Sequence[int]) -> None:
        """Raise UsageError unless all are tokens of this vocabulary."""
        for token in tokens:
            if not 0 <= token < self.n_tokens:
                raise UsageError(
                    f"token {token} is not one of the {self.n_tokens} of this model",
                    hint="tokenize the text with the model that computes it",
                )


class OwnVocabulary(Vocabulary):
    """The vocabulary of a model file whose weights are not loaded."""

    def __init__(self, catalog: Catalog) -> None:
        """Read it. Raises ReadFailed, or FormatError when llama.cpp does not know it."""
        backend.register()
        tiers = {tensor.name: "host" for tensor in catalog.tensors}
        with contextlib.ExitStack() as stack:
            model = core.Model(
                manifest_text(catalog, tiers, _NoAreas(), "direct", ()), catalog.header
            )
            stack.callback(model.release)
            silence_llama_log()
            bindings.llama_backend_init()
            params = bindings.llama_model_default_params()
            params.vocab_only = True
            params.n_gpu_layers = 0
            reasons = stack.enter_context(reasons_heard())
            self._model: Any = load_paged(model, params)
        if not self._model:
            raise load_failed(catalog.files[0].path, reasons, "its vocabulary cannot be read")
        super().__init__(self._model)

    def __del__(self) -> None:
        # With the last reference: some thread may be tokenizing still.
        model: Any = getattr(self, "_model", None)
        if model:
            self._model = None
            bindings.llama_model_free(model)


@dataclass(frozen=True, slots=True)
class _NoAreas:
    """Nothing is streamed."""

    ring_bytes: int = 0
    slab_bytes: int = 0
    scratch_bytes: int = 0
