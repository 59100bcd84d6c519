"""A llama.cpp program that knows nothing of nexus_ext: prints the tokens that it decodes.

    python foreign_program.py MODEL N load|ignore

With `load` it loads the backend that GGML_BACKEND_PATH names, as ggml_backend_load_all() does.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

import llama_cpp
import llama_cpp.llama_cpp as bindings

path, n_tokens, mode = sys.argv[1], int(sys.argv[2]), sys.argv[3]

default = bindings.llama_model_default_params


def plain_buffers() -> Any:
    params = default()
    params.use_extra_bufts = False
    return params


bindings.llama_model_default_params = plain_buffers
if mode == "load" and "GGML_BACKEND_PATH" in os.environ:
    load = bindings._lib.ggml_backend_load
    load.restype, load.argtypes = ctypes.c_void_p, (ctypes.c_char_p,)
    load(os.environ["GGML_BACKEND_PATH"].encode())
llm = llama_cpp.Llama(path, n_ctx=128, n_batch=32, n_threads=2, seed=0, verbose=False)
tokens = []
for token in llm.generate(llm.tokenize(b"Once upon a time"), temp=0.0):
    tokens.append(token)
    if len(tokens) == n_tokens:
        break
print(*tokens, flush=True)
llm.close()
