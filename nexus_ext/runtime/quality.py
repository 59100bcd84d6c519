"""Measure a model against its reference on a text, one after the other, in bounded memory.

Perplexities are those of llama.cpp's perplexity tool for the same text, context and attention:
the windows are the same, and so is the arithmetic. Says nothing about speed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nexus_ext.errors import UsageError
from nexus_ext.placement import PlanRequest
from nexus_ext.quality.metrics import Estimate, Scores, compare, negative_log_likelihoods
from nexus_ext.quality.metrics import perplexity as perplexity_of
from nexus_ext.quality.report import QualityReport, summarize
from nexus_ext.runtime.interrupts import cleaned_up_when_ended
from nexus_ext.runtime.planning import Planned, plan_model
from nexus_ext.runtime.predictions import opened, predictions, text_windows
from nexus_ext.runtime.reference import ReferenceFile

if TYPE_CHECKING:
    from nexus_ext.hardware import HardwareProfile

Tick = Callable[[str, int, int], None]
"""Called with what is going on, and windows done and in all."""


def _nothing(what: str, done: int, total: int) -> None:
    pass


def quality_request(request: PlanRequest) -> PlanRequest:
    """Return the request for a model whose logits are wanted: they count as memory."""
    return replace(request, logits_all=True)


def record_reference(
    llm: Any,
    text: bytes,
    *,
    n_ctx: int,
    most: int | None = None,
    scratch_dir: str | None = None,
    tick: Tick = _nothing,
) -> ReferenceFile:
    """Keep what an open model predicts for a text; close the result when it is not needed.

    Raises UsageError when the text is too short or the disk too small.
    """
    parts = text_windows(llm, text, n_ctx, most)
    file = ReferenceFile(parts, llm.n_vocab(), scratch_dir)
    with contextlib.ExitStack() as stack:
        stack.callback(file.close)
        for block in predictions(llm, parts):
            tick("reference", block.window, len(parts))
            file.add(block)
        stack.pop_all()
    return file


def scores_against(
    llm: Any, reference: ReferenceFile, text: bytes | None = None, tick: Tick = _nothing
) -> Scores:
    """Score an open model against a reference.

    With `text` given it is cut into tokens by this model, too. Raises UsageError when the two
    models do not share a vocabulary.
    """
    parts = reference.windows
    n_ctx = len(parts[0].tokens)
    same = llm.n_vocab() == reference.n_vocab
    if same and text is not None:
        same = tuple(text_windows(llm, text, n_ctx, len(parts))) == parts
    if not same:
        raise UsageError(
            f"the models do not share a vocabulary ({llm.n_vocab()} and {reference.n_vocab} "
            "tokens), so their predictions cannot be compared",
            hint="compare a model with what it was made from",
        )
    found = []
    for block, kept in zip(predictions(llm, parts), reference.blocks(), strict=True):
        tick("model", block.window, len(parts))
        found.append(compare(block.logits, block.targets, kept))
    return Scores.joined(found)


def measure_perplexity(
    llm: Any, text: bytes, *, n_ctx: int, most: int | None = None, tick: Tick = _nothing
) -> Estimate:
    """Return the perplexity of an open model on a text, as llama.cpp's tool prints it."""
    import numpy as np

    parts = text_windows(llm, text, n_ctx, most)
    found = []
    for block in predictions(llm, parts):
        tick("model", block.window, len(parts))
        found.append(negative_log_likelihoods(block.logits, block.targets))
    return perplexity_of(np.concatenate(found))


@cleaned_up_when_ended()
def compare_models(
    model: str,
    against: str,
    text: bytes,
    request: PlanRequest,
    *,
    hardware: HardwareProfile | None = None,
    most: int | None = None,
    scratch_dir: str | None = None,
    tick: Tick = _nothing,
    **options: Any,
) -> QualityReport:
    """Run the reference, then the model, each alone in memory, and return the report.

    `options` go to the model alone (not to the reference) when it is opened.
    """
    request = quality_request(request)
    n_ctx = request.n_ctx
    with _open(against, request, hardware) as llm:
        file = record_reference(
            llm, text, n_ctx=n_ctx, most=most, scratch_dir=scratch_dir, tick=tick
        )
    with file, _open(model, request, hardware, **options) as llm:
        scores = scores_against(llm, file, text, tick)
    return summarize(scores, n_windows=len(file.windows), n_ctx=n_ctx)


@contextlib.contextmanager
def _open(
    path: str, request: PlanRequest, hardware: HardwareProfile | None, **options: Any
) -> Iterator[Any]:
    planned: Planned = plan_model(path, request, hardware=hardware)
    with opened(path, planned, request, **options) as llm:
        yield llm
