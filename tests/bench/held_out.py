"""What quantized models lose on text that they were not fitted to: paired differences.

Perplexities here are not those that the models are quoted with, for two reasons. The text is not
even: stories of the second half of tinystories-eval.txt are harder. Each alone after its beginning
of sequence, they have a perplexity of 11.1 in the first half and 15.8 in the second half with
tinydense-7M (quoted: 11.13), 9.5 and 13.8 with tinymoe-41M (9.74), 3.1 and 4.2 with bitllama-3M;
what is measured on is mostly of the second half. And windows cut the text as it is: they begin in
the middle of stories, and one story follows another without the end and beginning of sequence that
models are trained with (tinydense-7M: 12.7 in the windows of the first third). The 5.25 of
bitllama-3M and 5.88 of stories260K match none of these figures; nobody knows why. Differences are
what they are for.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from nexus_ext.placement import PlanRequest
from nexus_ext.quality.metrics import Scores
from nexus_ext.quality.report import QualityReport, summarize
from nexus_ext.quality.text import Window
from nexus_ext.runtime.planning import plan_model
from nexus_ext.runtime.predictions import opened, predictions, text_windows
from nexus_ext.runtime.quality import scores_against
from nexus_ext.runtime.quantize import Quantized
from nexus_ext.runtime.reference import ReferenceFile


def request_of(args: argparse.Namespace) -> PlanRequest:
    """Return how models are opened for `--ctx` and `--threads`."""
    return PlanRequest(
        n_ctx=args.ctx,
        n_batch=args.ctx,
        n_ubatch=min(512, args.ctx),
        n_threads=args.threads,
        gpu_bytes=0,
        logits_all=True,
    )


def split_text(text: bytes, split: str = "first") -> tuple[bytes, bytes]:
    """Return (calibration, evaluation): the first third, cut between two lines, and the rest.

    Or, when `split` is "stories", every third story and the others: both are of one kind then.
    """
    if split == "stories":
        stories = text.split(b"\n\n")
        rest = [story for i, story in enumerate(stories) if i % 3]
        return b"\n\n".join(stories[::3]), b"\n\n".join(rest)
    at = text.index(b"\n", len(text) // 3) + 1
    return text[:at], text[at:]


def cut_twice(llm: Any, text: bytes, n_ctx: int, most: int | None) -> list[Window]:
    """Return windows whose scored halves lie side by side: pairs of them score n_ctx tokens."""
    first = text_windows(llm, text, n_ctx, most)
    tokens = [t for window in first for t in window.tokens]
    half, found = n_ctx // 2, []
    for i, window in enumerate(first[:-1]):
        begin = i * n_ctx + half
        later = (window.tokens[0], *tokens[begin + 1 : begin + n_ctx])
        found += [window, Window(later, window.first)]
    return found


def paired(ours: npt.NDArray[np.float64], theirs: npt.NDArray[np.float64], n: int) -> str:
    """Return the mean of ours - theirs over `n` stretches of text, with its 95 % interval."""
    each = (ours - theirs).reshape(n, -1).mean(axis=1)
    error = float(each.std(ddof=1)) / math.sqrt(n)
    halves = (float(part.mean()) for part in np.array_split(each, 2))
    return (
        f"{each.mean():+.5f} ± {1.96 * error:.5f} (halves {next(halves):+.5f} {next(halves):+.5f})"
    )


class HeldOut:
    """The original's predictions for a text, and reports of what takes its place."""

    def __init__(
        self,
        model: str,
        target: str,
        text: bytes,
        request: PlanRequest,
        directory: str,
        most: int | None,
    ) -> None:
        self._target, self._request = target, request
        with opened(model, plan_model(model, request), request) as llm:
            self._parts = cut_twice(llm, text, request.n_ctx, most)
            self._reference = ReferenceFile(self._parts, llm.n_vocab(), directory)
            for block in predictions(llm, self._parts):
                self._reference.add(block)

    def __enter__(self) -> HeldOut:
        self._reference.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._reference.__exit__(*error)

    def report(
        self, name: str, made: Quantized, against: Scores | None = None, other: str = "the mixture"
    ) -> Scores:
        """Print the figures of the model at `target`, and its differences from another's scores."""
        with opened(self._target, plan_model(self._target, self._request), self._request) as llm:
            scores = scores_against(llm, self._reference)
        n = len(self._parts)
        found: QualityReport = summarize(scores, n_windows=n, n_ctx=self._request.n_ctx)
        ratio, kl = found.log_perplexity_ratio, found.kl_mean
        print(
            f"  {name:<28} {made.weight_nbytes:>10} bytes {made.bits_per_weight:5.2f} bpw  "
            f"PPL {found.perplexity.value:8.4f}  ln ratio {ratio.value:+.5f} ± {ratio.error:.5f}  "
            f"KL {kl.value:.6f} ± {kl.error:.6f}  p99 {found.kl_p99.value:.4f}  "
            f"same top {100 * found.same_top.value:.2f} %",
            flush=True,
        )
        if against is not None:
            self.difference(scores, against, other)
        return scores

    def difference(self, scores: Scores, against: Scores, other: str) -> None:
        """Print how the scores of a model differ from those of another."""
        n = len(self._parts) // 2
        print(
            f"      minus {other}: ln PPL {paired(scores.nll, against.nll, n)}  "
            f"KL {paired(scores.kl, against.kl, n)}",
            flush=True,
        )
