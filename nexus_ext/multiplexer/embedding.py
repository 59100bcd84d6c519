"""Embeddings: one vector a prompt, pooled as the model says, from a context made for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from nexus_ext.runtime.batch import BatchContext, Row, Shape
from nexus_ext.runtime.blueprint import Blueprint, context_bytes
from nexus_ext.runtime.elastic import ElasticModel

_LAST = 3  # llama.cpp's pooling types: 0 none, 1 mean, 2 cls, 3 last, 4 rank


@dataclass(slots=True, eq=False)
class EmbedJob:
    """Prompts to embed, and the vectors so far."""

    prompts: Sequence[Sequence[int]]
    tell: Callable[[list[list[float]] | BaseException], None]
    keep_alive_s: float | None = None
    cancelled: bool = False
    vectors: list[list[float]] = field(default_factory=list)


def pooling(plan: Blueprint) -> int:
    """Return llama.cpp's pooling type: the model's own, else the last token."""
    own = plan.catalog.metadata.get(f"{plan.catalog.shape.architecture}.pooling_type")
    return own if isinstance(own, int) and own else _LAST


def embed_shape(plan: Blueprint, n_tokens: int) -> Shape:
    """The whole prompt is one batch: pooling looks at all of it."""
    shape = plan.shape
    n_ctx = max(256, -(-n_tokens // 256) * 256)
    return Shape(1, n_ctx, max(n_tokens, 4), shape.n_threads, shape.kv_type)


def embed_bytes(plan: Blueprint, n_tokens: int) -> int:
    """Return the memory that embedding a prompt of `n_tokens` takes beside the model."""
    kv, compute = context_bytes(plan.catalog, embed_shape(plan, n_tokens), embeddings=True)
    return kv + compute


def embed(model: ElasticModel, tokens: Sequence[int]) -> list[float]:
    """Return the embedding of one prompt, not normalized. Raises what computing raises."""
    plan = model.blueprint
    context = BatchContext(
        model.pointer, model.core, embed_shape(plan, len(tokens)), pooling=pooling(plan)
    )
    try:
        context.compute([Row(token, i, 0, True) for i, token in enumerate(tokens)])
        return context.embedding(0)
    finally:
        context.close()
