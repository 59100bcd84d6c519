"""How the next token of one sequence is picked: llama.cpp's own samplers in its own order.

Knows nothing of requests or batches: it gets a row of logits and returns a token.
"""

from __future__ import annotations

import ctypes
import secrets
from collections.abc import Sequence
from typing import Any

import llama_cpp.llama_cpp as bindings
import numpy as np
import numpy.typing as npt

from nexus_ext.errors import NexusError, UsageError
from nexus_ext.runtime.sampling import Sampling

Logits = npt.NDArray[np.float32]

_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
_MIROSTAT_M = 100  # tokens that mirostat 1 estimates the exponent of Zipf's law from


class Sampler:
    """Picks tokens for one sequence, and remembers what penalties and a grammar must know."""

    def __init__(self, vocab: Any, n_vocab: int, options: Sampling, n_ctx: int) -> None:
        """Build the chain. Raises UsageError for a grammar that cannot be read."""
        options.check(n_vocab)
        self._chain = self._grammar = None
        self.seed = secrets.randbits(32) if options.seed is None else options.seed & 0xFFFFFFFF
        if options.grammar is not None:
            grammar = bindings.llama_sampler_init_grammar(vocab, options.grammar.encode(), b"root")
            if not grammar:
                raise UsageError(
                    "the grammar cannot be read",
                    hint="a GBNF grammar has a rule for every name, and one called root",
                )
            self._grammar = grammar
        self._chain = bindings.llama_sampler_chain_init(
            bindings.llama_sampler_chain_default_params()
        )
        for sampler in _samplers(options, n_vocab, self.seed, n_ctx):
            bindings.llama_sampler_chain_add(self._chain, sampler)
        self._candidates: npt.NDArray[Any] | None = None  # who waits in a queue needs none

    def pick(self, logits: Logits) -> int:
        """Return the next token for `logits` (n_vocab,). NexusError when the grammar allows none.

        The grammar looks at all tokens only when what was picked without it breaks it, as in
        llama.cpp: most of the time it need not.
        """
        token = self._apply(logits, grammar_first=False)
        if self._grammar is None or self._allowed(token):
            return token
        return self._apply(logits, grammar_first=True)

    def accept(self, token: int) -> None:
        """Note a token of the answer."""
        bindings.llama_sampler_accept(self._chain, token)
        if self._grammar is not None:
            bindings.llama_sampler_accept(self._grammar, token)

    def accept_prompt(self, tokens: Sequence[int]) -> None:
        """Note the prompt: penalties look at it, a grammar does not."""
        for token in tokens:
            bindings.llama_sampler_accept(self._chain, token)

    def close(self) -> None:
        for sampler in (self._chain, self._grammar):
            if sampler:
                bindings.llama_sampler_free(sampler)
        self._chain = self._grammar = None

    def _apply(self, logits: Logits, *, grammar_first: bool) -> int:
        candidates = self._candidates
        if candidates is None:
            candidates = self._candidates = np.empty(len(logits), _CANDIDATE)
        candidates["id"] = np.arange(len(candidates), dtype=np.int32)
        candidates["logit"] = logits
        candidates["p"] = 0
        array = _array(candidates)
        if grammar_first:
            bindings.llama_sampler_apply(self._grammar, ctypes.byref(array))
            if not np.isfinite(candidates["logit"]).any():
                raise NexusError(
                    "the grammar allows no token here",
                    hint="every alternative of a grammar must be able to end",
                )
        bindings.llama_sampler_apply(self._chain, ctypes.byref(array))
        return int(array.data[array.selected].id)

    def _allowed(self, token: int) -> bool:
        one = np.array([(token, 1.0, 0.0)], _CANDIDATE)
        bindings.llama_sampler_apply(self._grammar, ctypes.byref(_array(one)))
        return bool(np.isfinite(one["logit"][0]))


def log_probabilities(logits: Logits) -> npt.NDArray[np.float64]:
    """Return the natural logarithms of the probabilities (n_vocab,) before any sampler."""
    shifted = logits.astype(np.float64) - float(logits.max())
    return shifted - float(np.log(np.exp(shifted).sum()))


def _array(candidates: npt.NDArray[Any]) -> Any:
    data = ctypes.cast(candidates.ctypes.data, ctypes.POINTER(bindings.llama_token_data))
    return bindings.llama_token_data_array(
        data=data, size=len(candidates), selected=-1, sorted=False
    )


def _samplers(options: Sampling, n_vocab: int, seed: int, n_ctx: int) -> list[Any]:
    """The samplers in llama.cpp's order. The chain owns them."""
    b = bindings
    chain = []
    if options.logit_bias:
        entries = (b.llama_logit_bias * len(options.logit_bias))(
            *(b.llama_logit_bias(token=t, bias=v) for t, v in options.logit_bias.items())
        )
        chain.append(b.llama_sampler_init_logit_bias(n_vocab, len(entries), entries))
    if options.penalizes:
        last_n = n_ctx if options.repeat_last_n < 0 else options.repeat_last_n
        chain.append(
            b.llama_sampler_init_penalties(
                n_vocab,
                last_n,
                options.repeat_penalty,
                options.frequency_penalty,
                options.presence_penalty,
            )
        )
    if options.temperature == 0:
        return [*chain, b.llama_sampler_init_greedy()]
    temperature = b.llama_sampler_init_temp(options.temperature)
    tau, eta = options.mirostat_tau, options.mirostat_eta
    if options.mirostat == 1:
        mirostat = b.llama_sampler_init_mirostat(n_vocab, seed, tau, eta, _MIROSTAT_M)
        return [*chain, temperature, mirostat]
    if options.mirostat == 2:
        return [*chain, temperature, b.llama_sampler_init_mirostat_v2(seed, tau, eta)]
    return [
        *chain,
        b.llama_sampler_init_top_k(options.top_k),
        b.llama_sampler_init_typical(options.typical_p, 1),
        b.llama_sampler_init_top_p(options.top_p, 1),
        b.llama_sampler_init_min_p(options.min_p, 1),
        temperature,
        b.llama_sampler_init_dist(seed),
    ]
