"""How much memory llama.cpp and Python take beside the weights, from the shape of a model alone.

The formulas follow what llama.cpp allocates (KV cache, the worst-case compute graph, the output
buffer, the CPU backend's work buffer) and were fitted to what it reports for some 200 pairs of
shape and context. For the architectures in `CALIBRATED` they are above the reported size by at
most about a quarter; for others they carry a wider margin. They do not know of extra contexts,
of adapters or of vision projectors.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from nexus_ext.errors import UsageError
from nexus_ext.types import Catalog, ChunkTable, ModelShape, Role, TensorInfo

if TYPE_CHECKING:
    from nexus_ext.placement.plan import PlanRequest

PAGE: Final = 4096
KIB: Final = 1 << 10
MIB: Final = 1 << 20

# ggml type of a KV cache -> (values a block, bytes a block)
KV_TYPES: Final[Mapping[str, tuple[int, int]]] = {
    "f32": (1, 4),
    "f16": (1, 2),
    "bf16": (1, 2),
    "q8_0": (32, 34),
    "q5_1": (32, 24),
    "q5_0": (32, 22),
    "q4_1": (32, 20),
    "q4_0": (32, 18),
    "iq4_nl": (32, 18),
}

# Architectures whose compute buffers were compared with llama.cpp's own report.
CALIBRATED: Final = frozenset(
    ("llama", "qwen2", "qwen3", "qwen3moe", "phi3", "gemma2", "gemma3", "bitnet")
)

# Resident memory of Python with numpy, llama_cpp and this package after a first token, without
# vocabulary, weights, caches and compute buffers: 47 MiB were measured for the first three, the
# rest is for this package, its command line and the I/O engine.
PROCESS_BYTES: Final = 64 * MIB
_TOKEN_BYTES: Final = 200  # a token of the vocabulary, its hash node and the sampler's arrays
_MERGE_BYTES: Final = 170  # a merge of the vocabulary, its hash node and its text while loading
_TENSOR_BYTES: Final = 10 * KIB  # graph and scheduler nodes: 8.5 to 9.1 KiB were measured
_CELL_BYTES: Final = 64  # bookkeeping of one cell of the KV cache
_THREAD_BYTES: Final = 256 * KIB
_TILE_BYTES: Final = 512 * KIB  # scratch of ggml's tiled matrix product, per thread
_PANEL_TYPES: Final = ("Q4_0", "Q8_0", "IQ4_NL", "MXFP4")  # of nexus_products.h
_DECODER_BYTES: Final = 512 * KIB  # tables and stack of a thread that decodes
_CHUNK_BUFFERS: Final = 32 * MIB  # for chunks on their way, all threads together
_FLASH_TILE: Final = 64  # edge of the tiles of ggml's flash attention


@dataclass(frozen=True, slots=True)
class Context:
    """The sizes of a llama.cpp context after llama.cpp has rounded and clamped them."""

    n_ctx: int  # cells of the KV cache, all sequences together
    n_ctx_seq: int  # cells that one sequence can see
    n_batch: int
    n_ubatch: int
    n_seq_max: int
    n_outputs: int  # rows of logits that the worst-case graph computes
    n_outputs_kept: int  # rows of logits that the output buffer grows to
    n_threads: int
    kv_type_k: str
    kv_type_v: str
    flash_attn: bool
    logits_all: bool


def round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def context_of(shape: ModelShape, request: PlanRequest, n_threads: int) -> Context:
    """Return the context that llama.cpp would make of `request`. UsageError for unusable types."""
    for name, kind in (("kv_type_k", request.kv_type_k), ("kv_type_v", request.kv_type_v)):
        if kind not in KV_TYPES:
            raise UsageError(
                f"{name} is {kind!r}, which is not a type of a KV cache",
                hint=f"Use one of {', '.join(KV_TYPES)}.",
            )
    if KV_TYPES[request.kv_type_v][0] > 1 and not request.flash_attn:
        raise UsageError(
            f"kv_type_v is {request.kv_type_v!r}, which llama.cpp refuses without flash attention",
            hint="Switch flash attention on, or use f16 for the values.",
        )
    wanted = request.n_ctx or shape.n_ctx_train or 512
    n_batch = min(wanted, request.n_batch)
    n_ubatch = min(n_batch, request.n_ubatch or n_batch)
    n_ctx = round_up(wanted, 256)
    n_ctx_seq = n_ctx
    if not request.kv_unified:
        n_ctx_seq = round_up(max(n_ctx // request.n_seq_max, 1), 256)
        n_ctx = n_ctx_seq * request.n_seq_max
    n_outputs = min(n_ubatch, request.n_outputs_max or n_batch)
    kept = n_batch if request.logits_all else 1
    return Context(
        n_ctx=n_ctx,
        n_ctx_seq=n_ctx_seq,
        n_batch=n_batch,
        n_ubatch=n_ubatch,
        n_seq_max=request.n_seq_max,
        n_outputs=n_outputs,
        n_outputs_kept=max(min(kept, request.n_outputs_max or kept), request.n_seq_max),
        n_threads=n_threads,
        kv_type_k=request.kv_type_k,
        kv_type_v=request.kv_type_v,
        flash_attn=request.flash_attn,
        logits_all=request.logits_all,
    )


def kv_layer_bytes(catalog: Catalog, context: Context) -> tuple[int, ...]:
    """Return the bytes of KV cache, or of recurrent state, that each layer holds."""
    shape = catalog.shape
    heads = shape.n_heads_kv or (shape.n_heads,) * shape.n_layers
    recurrent = _recurrent_bytes(catalog, context)
    # Latent attention keeps one compressed row for keys and values.
    has_values = not _number(catalog, "attention.key_length_mla")
    # Without flash attention the values lie transposed, every layer as wide as the widest.
    widest = max(heads, default=0) * shape.head_dim_v
    layers = []
    for n_heads_kv in heads:
        if not n_heads_kv:
            layers.append(recurrent)
            continue
        width_v = n_heads_kv * shape.head_dim_v if context.flash_attn else widest
        n_bytes = context.n_ctx * _row_bytes(context.kv_type_k, n_heads_kv * shape.head_dim_k)
        if has_values:
            n_bytes += context.n_ctx * _row_bytes(context.kv_type_v, width_v)
        layers.append(n_bytes + 128)  # alignment of the two tensors
    return tuple(layers)


def compute_bytes(catalog: Catalog, context: Context) -> int:
    """Return the bytes of compute, output and work buffers on the CPU."""
    outputs = 4 * context.n_outputs_kept * catalog.shape.n_vocab + 4 * context.n_batch
    return graph_bytes(catalog, context) + outputs + _work_bytes(catalog, context)


def graph_bytes(catalog: Catalog, context: Context) -> int:
    """Return what the scheduler reserves for the worst-case graph ("compute buffer size").

    The peak of the activations is at one of four places: the logits, the feed-forward block, the
    experts, or the attention scores (without flash attention). The counts of rows that are alive
    there were read off llama.cpp's graphs and its reports.
    """
    shape = catalog.shape
    n_tokens = round_up(context.n_ubatch, context.n_seq_max)
    q = shape.n_heads * shape.head_dim_k
    kv = max(shape.n_heads_kv, default=0) * (shape.head_dim_k + shape.head_dim_v)
    embd = shape.n_embd
    n_kv = context.n_ctx_seq
    if context.flash_attn:
        attention = max(3 * q + embd, 2 * q + kv + 3 * embd)
    else:
        attention = shape.n_heads * n_kv + 2 * q + kv + 3 * embd
    peaks = [n_tokens * attention, context.n_outputs * shape.n_vocab + 2 * embd * n_tokens]
    if shape.n_ff:
        dense = 3 * shape.n_ff + 4 * embd + kv + max(0, q - embd)
        peaks.append(n_tokens * dense)
    if shape.n_experts:
        ff = _expert_width(catalog)
        used = shape.n_experts_used
        gates = used * 3 * ff + 4 * embd + kv + max(0, q - embd) + 2 * shape.n_experts
        peaks.append(n_tokens * max(gates, used * 2 * (ff + embd)))
    inner = _number(catalog, "ssm.inner_size")
    if inner:
        peaks.append(n_tokens * (10 * inner + 4 * embd))
    floats = 4 * max(peaks)
    exact = shape.architecture in CALIBRATED
    margin = floats * (2 if exact else 8) // 25 + (1 if exact else 8) * MIB
    # Layers with a sliding window have a second mask.
    n_masks = 2 if _number(catalog, "attention.sliding_window") else 1
    mask = n_masks * n_kv * n_tokens * (2 if context.flash_attn else 4)
    inputs = 64 * n_tokens + 16 * n_kv
    return floats + margin + mask + inputs


def chunk_nbytes(catalog: Catalog) -> tuple[int, int]:
    """Return (stored, decoded) bytes of the largest chunk that has to be decoded or gathered."""
    if catalog.chunks is None:
        return 0, 0
    found = _stored(catalog.chunks, tuple(t.name for t in catalog.tensors if t.nbytes))
    stored = max((largest for _, largest, _ in found.values()), default=0)
    return stored, max((raw for _, _, raw in found.values()), default=0)


def stored_shares(catalog: Catalog) -> Mapping[str, float]:
    """Return stored by decoded bytes, by tensor; empty where all are stored as they are."""
    if catalog.chunks is None:
        return {}
    found = _stored(catalog.chunks, tuple(t.name for t in catalog.tensors if t.nbytes))
    return {name: share for name, (share, _, _) in found.items()}


@functools.lru_cache(maxsize=4)
def _stored(chunks: ChunkTable, names: tuple[str, ...]) -> dict[str, tuple[float, int, int]]:
    """Return (stored by decoded bytes, largest chunk stored, and decoded) by tensor."""
    result = {}
    for name in names:
        found = chunks.chunks_of(name)
        sizes = [chunk.stored_nbytes for chunk in found.chunks]
        nbytes = found.n_matrices * found.matrix_nbytes
        result[name] = (sum(sizes) / nbytes, max(sizes), found.chunk_nbytes)
    return result


def chunk_threads(catalog: Catalog) -> int:
    """Return how many threads read and decode chunks: fewer where chunks are large."""
    return max(2, min(8, _CHUNK_BUFFERS // max(sum(chunk_nbytes(catalog)), 1)))


def bounce_bytes(catalog: Catalog) -> int:
    """Return the memory of the threads that read and decode chunks; 0 without chunks."""
    stored, raw = chunk_nbytes(catalog)
    if not raw:
        return 0
    each = round_up(stored, PAGE) + 2 * PAGE + round_up(raw, PAGE) + _DECODER_BYTES
    return chunk_threads(catalog) * each


def runtime_bytes(catalog: Catalog, context: Context) -> int:
    """Return the bytes of the process itself: Python, libraries, vocabulary, bookkeeping."""
    n_vocab = catalog.shape.n_vocab
    # A catalog keeps the lengths of long arrays only.
    n_merges = getattr(catalog.metadata.get("tokenizer.ggml.merges"), "length", 0)
    if "tokenizer.ggml.model" not in catalog.metadata:
        n_merges = n_vocab  # nothing is known of the vocabulary: as many as is usual
    # llama-cpp-python's batch holds an array of n_ctx ids for each token; only the first page of
    # such an array is ever written.
    batch = context.n_batch * min(4 * context.n_ctx + 64, PAGE)
    scores = 4 * context.n_ctx * n_vocab if context.logits_all else 0
    return (
        PROCESS_BYTES
        + _TOKEN_BYTES * n_vocab
        + _MERGE_BYTES * n_merges
        + _TENSOR_BYTES * len(catalog.tensors)
        + bounce_bytes(catalog)
        + _CELL_BYTES * context.n_ctx
        + _THREAD_BYTES * context.n_threads
        + batch
        + scores
    )


def _work_bytes(catalog: Catalog, context: Context) -> int:
    """Return the CPU backend's work buffer: the largest need of any one node of the graph."""
    shape = catalog.shape
    n_tokens, n_threads = context.n_ubatch, context.n_threads
    n_kv = context.n_ctx_seq
    needs = [_product_bytes(t, shape, n_tokens) for t in catalog.tensors if len(t.shape) > 1]
    products = max(needs, default=0) + _TILE_BYTES * n_threads + 64
    rows = 4 * max(n_kv, shape.n_heads * shape.head_dim_k, shape.n_vocab) * n_threads
    dk, dv = shape.head_dim_k, shape.head_dim_v
    if context.flash_attn:
        tile = _FLASH_TILE
        prefill = 4 * (2 * tile * (dk + dv) + 2 * tile * tile) * n_threads
        decode = 4 * n_threads * (shape.n_heads * (2 + dv) + dk + 2 * dv)
        attention = max(prefill, decode)
    else:
        # The product of scores and values rewrites the scores in the type of the values.
        attention = 2 * shape.n_heads * n_kv * n_tokens if context.kv_type_v != "f32" else 0
    panels = max((_panel_bytes(t, shape, n_tokens) for t in catalog.tensors), default=0)
    return max(products, rows, attention) + 64 * n_threads + panels


def _panel_bytes(tensor: TensorInfo, shape: ModelShape, n_tokens: int) -> int:
    """Return what our kernels for experts in a prompt put side by side, see nexus_products.h."""
    if tensor.role is not Role.EXPERT or tensor.type_name.upper() not in _PANEL_TYPES:
        return 0
    n_picked = n_tokens * max(shape.n_experts_used, 1)
    # Eight columns of 32 activations take 320 bytes; an expert's last panel may not be full.
    n_panels = n_picked // 8 + min(tensor.n_experts, n_picked)
    return n_panels * tensor.shape[0] // 32 * 320 + 8 * n_picked


def _product_bytes(tensor: TensorInfo, shape: ModelShape, n_tokens: int) -> int:
    """Return the room for the activations of one matrix product, rewritten in its dot type."""
    n_in = tensor.shape[0]
    extra = 0
    if tensor.role is Role.EXPERT:
        if n_in != shape.n_embd or "down" in tensor.name:
            n_in *= max(shape.n_experts_used, 1)
        slots = tensor.n_experts * (72 + 8 * max(shape.n_experts_used, 1) * n_tokens)
        extra = slots + 128
    kind = tensor.type_name.upper()
    if kind == "F32":
        return extra
    if kind in ("F16", "BF16"):
        return extra + 2 * n_in * n_tokens
    return extra + n_in * n_tokens * 37 // 32  # Q8_K, Q8_0 and Q8_1 take 1.06 to 1.14 bytes


def _expert_width(catalog: Catalog) -> int:
    """Return the widest feed-forward layer inside an expert."""
    n_embd = catalog.shape.n_embd
    widths = [
        tensor.shape[0] if "down" in tensor.name else tensor.shape[1]
        for tensor in catalog.tensors
        if tensor.role is Role.EXPERT and len(tensor.shape) > 2
    ]
    fused = any("gate_up" in t.name for t in catalog.tensors if t.role is Role.EXPERT)
    widest = max(widths, default=catalog.shape.n_ff or n_embd)
    return -(-widest // 2) if fused else widest


def _recurrent_bytes(catalog: Catalog, context: Context) -> int:
    """Return the state that a layer without attention keeps (state-space and short convolution)."""
    inner = _number(catalog, "ssm.inner_size")
    state = _number(catalog, "ssm.state_size")
    kernel = _number(catalog, "ssm.conv_kernel")
    groups = _number(catalog, "ssm.group_count")
    short = _number(catalog, "shortconv.l_cache")
    values = max(kernel - 1, 0) * (inner + 2 * groups * state) + state * inner
    values += catalog.shape.n_embd * max(short - 1, 0)
    return 4 * values * context.n_seq_max


def _number(catalog: Catalog, key: str) -> int:
    """Return a hyperparameter, of an array (one value a layer) the largest; 0 if there is none."""
    value = catalog.metadata.get(f"{catalog.shape.architecture}.{key}", 0)
    values = value if isinstance(value, tuple) else (value,)
    return max((n for n in values if isinstance(n, int)), default=0)


def _row_bytes(kind: str, width: int) -> int:
    block, n_bytes = KV_TYPES[kind]
    return -(-width // block) * n_bytes
