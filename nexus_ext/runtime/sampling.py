"""What a request says of how tokens are picked. Knows nothing of llama.cpp; see `sampler`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nexus_ext.errors import UsageError


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is picked, with llama.cpp's names and meaning. temperature 0 is greedy."""

    temperature: float = 0.8
    top_k: int = 40  # 0: all
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64  # -1: the whole context
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    seed: int | None = None  # None: another one each time
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    grammar: str | None = None  # GBNF

    def check(self, n_vocab: int) -> None:
        """Raise UsageError for a value that means nothing."""
        for name, low, high in (
            ("temperature", 0.0, 1e6),
            ("top_p", 0.0, 1.0),
            ("min_p", 0.0, 1.0),
            ("typical_p", 0.0, 1.0),
            ("repeat_penalty", 1e-6, 1e6),
            ("presence_penalty", -1e6, 1e6),
            ("frequency_penalty", -1e6, 1e6),
        ):
            value = getattr(self, name)
            if not low <= value <= high:  # also for NaN
                raise UsageError(f"{name} is {value}, not between {low:g} and {high:g}")
        if self.mirostat not in (0, 1, 2):
            raise UsageError(f"mirostat is {self.mirostat}, not 0, 1 or 2")
        for token in self.logit_bias:
            if not 0 <= token < n_vocab:
                raise UsageError(
                    f"logit_bias names token {token}, but the model has {n_vocab} tokens",
                    hint="token numbers are those of this model's vocabulary",
                )

    @property
    def penalizes(self) -> bool:
        """Whether tokens that were there already count for less."""
        penalties = (self.repeat_penalty, self.frequency_penalty, self.presence_penalty)
        return bool(self.repeat_last_n) and penalties != (1, 0, 0)
