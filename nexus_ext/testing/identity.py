"""Whether a model computes the same with a plugin: streamed with it against stock llama.cpp."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from nexus_ext.errors import DoesNotFit
from nexus_ext.formats import open_model
from nexus_ext.plugins import Plugins
from nexus_ext.testing.engine import assert_healthy
from nexus_ext.testing.hardware import machine
from nexus_ext.testing.loading import load_plugins, use_plugins
from nexus_ext.testing.plans import expert_plan

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Bits = npt.NDArray[np.uint32]

_PROMPT: Final = (1, *range(5, 52))  # tokens that every vocabulary has
_SHARE: Final = 0.6  # of the weights in memory, unless that is too little
_OPTIONS: Final[dict[str, Any]] = {
    "n_ctx": 128,
    "n_batch": 128,
    "n_ubatch": 32,  # the prompt takes more than one pass
    "n_threads": 2,
    "logits_all": True,
    "verbose": False,
}


@dataclass(frozen=True, slots=True)
class SameTokens:
    """What was compared."""

    n_positions: int
    n_vocab: int
    read_bytes: int  # by the streamed run
    expert_hit_rate: float | None  # None without a cache of experts


def assert_same_tokens(
    model: str | os.PathLike[str],
    plugins: Plugins,
    *,
    weights: int | str | None = None,
    prompt: Sequence[int] = _PROMPT,
    n_tokens: int = 12,
) -> SameTokens:
    """Run a model streamed with `plugins`, and resident in stock llama.cpp; compare all logits.

    `weights` is the memory for weights, planned for `machine()`: nothing is measured, and each run
    has the same plan. By default, half of the experts of a mixture are cached and all else is in
    memory; of a dense model 60 % of the file, or the least that is enough. `prompt` are tokens,
    after which `n_tokens` are decoded greedily.

    Raises AssertionError that names the first position whose logits differ in any bit, when nothing
    was streamed, and when a plugin has failed at something.
    """
    import numpy as np

    from nexus_ext.runtime.stock import stock_llama

    path = os.fspath(model)
    options = {**_OPTIONS, "n_ctx": max(_OPTIONS["n_ctx"], len(prompt) + n_tokens)}
    with use_plugins(load_plugins()):
        resident = stock_llama(path, **options)
        try:
            expected = _logits(resident, prompt, n_tokens)
        finally:
            resident.close()
    with use_plugins(plugins):
        streamed = _streamed(path, weights, options)
        try:
            assert not streamed.nexus.plan.everything_fits, (
                f"all of {path} fits, so nothing is streamed"
            )
            found = _logits(streamed, prompt, n_tokens)
            stats = streamed.nexus.stats()
        finally:
            streamed.close()
    assert not stats.disabled, "; ".join(stats.disabled)
    assert stats.bytes_read, f"{path}: nothing was read, so nothing was shown"
    different = np.nonzero((found != expected).any(axis=1))[0]
    assert not len(different), (
        f"logits differ from position {different[0]} on ({len(prompt)} are the prompt)"
    )
    assert_healthy(plugins)
    return SameTokens(
        n_positions=len(expected),
        n_vocab=expected.shape[1],
        read_bytes=stats.bytes_read,
        expert_hit_rate=stats.expert_hit_rate,
    )


def _streamed(path: str, weights: int | str | None, options: dict[str, Any]) -> Any:
    from nexus_ext import Llama

    options = {**options, "policy": "direct", "warm_start": False, "hardware": machine()}
    n_experts = open_model(path).shape.n_experts
    if n_experts and weights is None:
        plan = expert_plan(path, n_experts // 2, n_ctx=options["n_ctx"])
        return Llama(path, plan=plan, **options)
    if weights is not None:
        return Llama(path, weights=weights, **options)
    try:
        return Llama(path, weights=int(os.path.getsize(path) * _SHARE), **options)
    except DoesNotFit as error:
        return Llama(path, weights=error.smallest_bytes, **options)


def _logits(llm: Any, prompt: Sequence[int], n_tokens: int) -> Bits:
    """Return the bits of all logits: (len(prompt) + n_tokens, n_vocab)."""
    import numpy as np

    llm.eval(list(prompt))
    for _ in range(n_tokens):
        llm.eval([int(np.argmax(llm.scores[llm.n_tokens - 1]))])
    scores: npt.NDArray[np.float32] = llm.scores[: llm.n_tokens].copy()
    return scores.view(np.uint32)
