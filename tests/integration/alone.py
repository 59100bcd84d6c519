"""What a request is compared with: its model alone in stock llama.cpp."""

from __future__ import annotations

from pathlib import Path

import llama_cpp.llama_cpp as bindings
import numpy as np

from nexus_ext.runtime.llama_log import silence_llama_log


class Alone:
    """Stock llama.cpp: one sequence, its own file mapping, plain CPU buffers."""

    def __init__(
        self, path: str | Path, n_ctx: int = 512, n_ubatch: int = 64, n_threads: int = 2
    ) -> None:
        silence_llama_log()
        self._n_ubatch = n_ubatch
        params = bindings.llama_model_default_params()
        params.use_extra_bufts, params.n_gpu_layers = False, 0
        self.model = bindings.llama_model_load_from_file(str(path).encode(), params)
        self.n_vocab = bindings.llama_vocab_n_tokens(bindings.llama_model_get_vocab(self.model))
        options = bindings.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = n_ctx, n_ubatch, n_ubatch
        options.n_seq_max, options.kv_unified, options.flash_attn_type = 1, False, 0
        options.n_threads = options.n_threads_batch = n_threads
        self.context = bindings.llama_init_from_model(self.model, options)

    def decode(self, tokens: list[int], begin: int) -> np.ndarray:
        batch = bindings.llama_batch_init(self._n_ubatch, 0, 1)
        for at in range(0, len(tokens), self._n_ubatch):
            part = tokens[at : at + self._n_ubatch]
            batch.n_tokens = len(part)
            for i, token in enumerate(part):
                batch.token[i], batch.pos[i] = token, begin + at + i
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                batch.logits[i] = at + i == len(tokens) - 1
            assert bindings.llama_decode(self.context, batch) == 0
        pointer = bindings.llama_get_logits_ith(self.context, len(part) - 1)
        bindings.llama_batch_free(batch)
        return np.ctypeslib.as_array(pointer, (self.n_vocab,)).copy()

    def clear(self) -> None:
        bindings.llama_memory_clear(bindings.llama_get_memory(self.context), True)

    def keep(self, n: int) -> None:
        """Forget all but the first `n` tokens."""
        assert bindings.llama_memory_seq_rm(bindings.llama_get_memory(self.context), 0, n, -1)

    def ends(self, token: int) -> bool:
        vocab = bindings.llama_model_get_vocab(self.model)
        return bool(bindings.llama_vocab_is_eog(vocab, token))

    def greedy(self, prompt: list[int], n: int) -> list[np.ndarray]:
        self.clear()
        logits = [self.decode(prompt, 0)]
        while len(logits) < n:
            position = len(prompt) + len(logits) - 1
            logits.append(self.decode([int(logits[-1].argmax())], position))
        return logits

    def close(self) -> None:
        bindings.llama_free(self.context)
        bindings.llama_model_free(self.model)

    def tokens(self, prompt: list[int], n: int) -> list[int]:
        """Return the first `n` tokens of the greedy answer, or fewer when it ends."""
        found: list[int] = []
        for logits in self.greedy(prompt, n):
            token = int(logits.argmax())
            if self.ends(token):
                break
            found.append(token)
        return found
