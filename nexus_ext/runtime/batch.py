"""One llama.cpp context in which several sequences are computed side by side.

Every sequence has a part of the KV cache of its own (`kv_unified` off): what one sequence sees, and
the order in which it is summed up, does not depend on who is in the batch beside it. Flash
attention is off for the same reason: it splits the cache of a lone query over the threads, and that
of several not. tests/integration/test_batch.py holds it to that: logits are bit by bit those of the
sequence alone.

Not thread safe: one thread owns a context. Only `stop` may be set from elsewhere.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import llama_cpp.llama_cpp as bindings
import numpy as np

from nexus_ext import core
from nexus_ext.errors import Interrupted, NexusError, OutOfMemory, UsageError
from nexus_ext.runtime.sampler import Logits

KV_TYPES = ("f32", "f16", "bf16", "q8_0")


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a context."""

    n_seq: int  # sequences side by side
    n_ctx: int  # tokens of one sequence, prompt and answer
    n_ubatch: int = 512
    n_threads: int = 0  # 0: as ggml chooses
    kv_type: str = "f16"


@dataclass(frozen=True, slots=True)
class Row:
    """One token of one sequence. `output`: its logits are wanted."""

    token: int
    position: int
    sequence: int
    output: bool


class BatchContext:
    """A context over `model` (a llama_model pointer), whose weights `paged` may hold."""

    def __init__(
        self,
        model: Any,
        paged: core.Model,
        shape: Shape,
        *,
        pooling: int | None = None,
        on_gpu: bool = False,
    ) -> None:
        """Allocate the KV cache. Raises OutOfMemory.

        `pooling`: for embeddings, llama.cpp's pooling type; None: for logits. `on_gpu`: layers that
        are on a GPU have their KV cache there.
        """
        self.shape = shape
        self._paged = paged
        self._stop = core.StopFlag()
        params = bindings.llama_context_default_params()
        params.n_ctx = shape.n_ctx * shape.n_seq
        params.n_batch = params.n_ubatch = max(shape.n_ubatch, shape.n_seq)
        params.n_seq_max = shape.n_seq
        params.kv_unified = False
        params.flash_attn_type = 0  # disabled
        params.offload_kqv = on_gpu
        params.embeddings = pooling is not None
        if pooling is None:
            params.n_outputs_max = shape.n_seq  # rows of logits that are wanted at once
        else:
            params.pooling_type = pooling
        params.no_perf = True
        if shape.n_threads:
            params.n_threads = params.n_threads_batch = shape.n_threads
        if shape.kv_type not in KV_TYPES:
            raise UsageError(
                f"kv_type is {shape.kv_type!r}", hint=f"use one of {', '.join(KV_TYPES)}"
            )
        params.type_k = getattr(bindings, f"GGML_TYPE_{shape.kv_type.upper()}")
        # Without flash attention llama.cpp takes no quantized values.
        v_type = "f16" if shape.kv_type == "q8_0" else shape.kv_type
        params.type_v = getattr(bindings, f"GGML_TYPE_{v_type.upper()}")
        params.abort_callback = ctypes.cast(self._stop.callback, bindings.ggml_abort_callback)
        params.abort_callback_data = self._stop.address
        self._context = bindings.llama_init_from_model(model, params)
        if not self._context:
            raise OutOfMemory(
                f"a context of {shape.n_seq} sequences of {shape.n_ctx} tokens cannot be made",
                hint="use a shorter context or fewer sequences",
            )
        self._memory = bindings.llama_get_memory(self._context)
        self._n_vocab = bindings.llama_vocab_n_tokens(bindings.llama_model_get_vocab(model))
        self.n_embd = bindings.llama_model_n_embd_out(model)
        self._batch = bindings.llama_batch_init(params.n_batch, 0, 1)

    def stop(self) -> None:
        """End the computation that runs, from any thread: it raises Interrupted."""
        self._stop.set()

    def arm(self) -> None:
        """Forget a `stop` that came too late for what it was meant to end."""
        self._stop.clear()

    def compute(self, rows: Sequence[Row]) -> None:
        """Compute the rows as one batch; logits of row i are then `logits(i)`.

        The decoding of several sequences is computed column by column, so that its bits are those
        of one sequence alone (some kernels sum in another order for more than one column). On any
        error the sequences of the rows are as before. Raises Interrupted after `stop`, or what
        reading weights raises.
        """
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, row in enumerate(rows):
            batch.token[i] = row.token
            batch.pos[i] = row.position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = row.sequence
            batch.logits[i] = row.output
        sequences = {row.sequence for row in rows}
        self._paged.set_columns(len(sequences) == len(rows) > 1)
        status = bindings.llama_decode(self._context, batch)
        if status == 0:
            return
        stopped = self._stop.clear()
        for sequence in sequences:  # ubatches that were computed stay in the cache
            first = min(row.position for row in rows if row.sequence == sequence)
            self.keep(sequence, first)
        named = self._paged.take_error("decoding")
        if stopped or status == 2:
            raise Interrupted("the computation was stopped")
        if named is not None:
            raise named
        raise NexusError(f"llama.cpp cannot compute the batch (status {status})")

    def logits(self, row: int) -> Logits:
        """Return the logits (n_vocab,) of a row of the last batch: a view, until the next one."""
        pointer = bindings.llama_get_logits_ith(self._context, row)
        return np.ctypeslib.as_array(pointer, (self._n_vocab,))

    def embedding(self, sequence: int) -> list[float]:
        """Return the pooled embedding of a sequence of the last batch, not normalized."""
        pointer = bindings.llama_get_embeddings_seq(self._context, sequence)
        return [float(x) for x in np.ctypeslib.as_array(pointer, (self.n_embd,))]

    def keep(self, sequence: int, n: int) -> int:
        """Forget what a sequence holds from position `n` on; return how much it still holds.

        Less than `n`, namely 0, where a model cannot forget a part (recurrent ones).
        """
        if n > 0 and bindings.llama_memory_seq_rm(self._memory, sequence, n, -1):
            return n
        bindings.llama_memory_seq_rm(self._memory, sequence, -1, -1)
        return 0

    def state_bytes(self, sequence: int) -> int:
        """Return the size of what `save` would return."""
        return int(bindings.llama_state_seq_get_size(self._context, sequence))

    def save(self, sequence: int) -> bytearray:
        """Return the state of a sequence, for `restore` in a context of the same shape."""
        size = self.state_bytes(sequence)
        data = bytearray(size)
        buffer = (ctypes.c_uint8 * size).from_buffer(data)
        written = bindings.llama_state_seq_get_data(self._context, buffer, size, sequence)
        if written != size:
            raise NexusError(f"the state of sequence {sequence} could not be saved")
        return data

    def restore(self, sequence: int, data: bytearray) -> None:
        """Put a saved state into a sequence, instead of what it holds."""
        self.keep(sequence, 0)
        buffer = (ctypes.c_uint8 * len(data)).from_buffer(data)
        if not bindings.llama_state_seq_set_data(self._context, buffer, len(data), sequence):
            self.keep(sequence, 0)
            raise NexusError(
                f"a saved state of {len(data)} bytes does not fit this context",
                hint="states belong to one model and one kind of context",
            )

    def close(self) -> None:
        if self._context:
            bindings.llama_free(self._context)
            bindings.llama_batch_free(self._batch)
        self._context = None
