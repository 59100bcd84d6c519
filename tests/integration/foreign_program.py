"""A llama.cpp program that knows nothing of nexus_ext: prints the tokens that it decodes.

    python foreign_program.py MODEL N load|ignore [OPTION ...]

With `load` it loads the backend that GGML_BACKEND_PATH names, as ggml_backend_load_all() does.
Behind the tokens comes a hash of the last logits. Options: `own=REGEX` keeps tensors in buffers of
its own, as a GPU does; `no-mmap`; `again` opens the model a second time when all is done.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
from typing import Any

import llama_cpp
import llama_cpp.llama_cpp as bindings

path, n_tokens, mode, *options = sys.argv[1:]


class Override(ctypes.Structure):
    """llama_model_tensor_buft_override, which the bindings do not have."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p))


default = bindings.llama_model_default_params
own = [word.removeprefix("own=").encode() for word in options if word.startswith("own=")]
overrides = (Override * (len(own) + 1))()  # ends with one that is empty
cpu = bindings._lib.ggml_backend_cpu_buffer_type
cpu.restype, cpu.argtypes = ctypes.c_void_p, ()
# A type of buffers that is the CPU's but for its address: nobody else takes what is meant for it.
own_buft = ctypes.create_string_buffer(ctypes.string_at(cpu(), 64), 64)
for slot, pattern in zip(overrides, own, strict=False):
    slot.pattern, slot.buft = pattern, ctypes.addressof(own_buft)


def plain_buffers() -> Any:
    params = default()
    params.use_extra_bufts = False
    if own:
        params.tensor_buft_overrides = ctypes.cast(overrides, ctypes.c_void_p)
    return params


def opened() -> llama_cpp.Llama:
    return llama_cpp.Llama(
        *(path,), n_ctx=128, n_batch=32, n_threads=2, seed=0, verbose=False,
        use_mmap="no-mmap" not in options,
    )  # fmt: skip


bindings.llama_model_default_params = plain_buffers
if mode == "load" and "GGML_BACKEND_PATH" in os.environ:
    load = bindings._lib.ggml_backend_load
    load.restype, load.argtypes = ctypes.c_void_p, (ctypes.c_char_p,)
    load(os.environ["GGML_BACKEND_PATH"].encode())
llm = opened()
tokens = []
for token in llm.generate(llm.tokenize(b"Once upon a time"), temp=0.0):
    tokens.append(token)
    if len(tokens) == int(n_tokens):
        break
logits = bindings.llama_get_logits_ith(llm.ctx, -1)
bits = ctypes.string_at(logits, 4 * llm.n_vocab())
print(*tokens, hashlib.sha256(bits).hexdigest(), flush=True)
print("on disk:", os.stat(path).st_blocks * 512, file=sys.stderr, flush=True)
if "again" in options:
    try:
        opened()
    except ValueError:
        print("not opened again", file=sys.stderr, flush=True)
llm.close()
