"""What every endpoint works with: the engine, the library of models, settings and metrics."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from nexus_ext.errors import UsageError
from nexus_ext.multiplexer.api import ContextTooLong, Engine, ModelFacts, Sampling
from nexus_ext.server.config import Config
from nexus_ext.server.errors import HttpError
from nexus_ext.server.grammars import check_grammar
from nexus_ext.server.metrics import Metrics
from nexus_ext.store import Library, StoredModel
from nexus_ext.store.own import OwnStore

_SAMPLING = {f.name for f in fields(Sampling)}
_MAX_SEED = 0xFFFFFFFF  # llama.cpp takes this one for "another one each time"


@dataclass(frozen=True, slots=True)
class Model:
    """A model that a request has named."""

    stored: StoredModel
    facts: ModelFacts

    @property
    def name(self) -> str:
        return str(self.stored.name)

    @property
    def template(self) -> str | None:
        return self.stored.template or self.facts.chat_template

    def chat_template(self) -> str:
        """Return the chat template. Raises UsageError when there is none."""
        if self.template is None:
            raise UsageError(
                f"{self.name} has no chat template: it completes text and does not chat",
                hint="use a completion endpoint, or give it a template with "
                "`nexus create NAME FROM FILE --template FILE`",
            )
        return self.template


@dataclass(slots=True)
class Service:
    """One server."""

    engine: Engine
    library: Library
    config: Config
    metrics: Metrics = field(default_factory=Metrics)
    started_s: float = field(default_factory=time.time)
    waiting_for: list[str] = field(default_factory=list)  # models to load before it is ready
    failed: dict[str, str] = field(default_factory=dict)  # of those, with the reason

    async def model(self, name: str, *, keep_alive_s: float | None = None) -> Model:
        """Return the model of that name. Raises ModelNotFound."""
        stored = self.library.find(name)
        return Model(stored, await self.engine.facts(str(stored.name), keep_alive_s=keep_alive_s))

    @property
    def own(self) -> OwnStore:
        return self.library.own

    def own_model(self, name: str) -> StoredModel:
        """Return a model that the store of our own holds. Raises ModelNotFound, UsageError."""
        stored = self.library.find(name)
        if stored.origin != "nexus":
            raise UsageError(
                f"{stored.name} belongs to {stored.origin}, whose store is only read",
                hint=f"remove it with {stored.origin}",
            )
        return stored

    async def tokenize_plain(self, model: Model, text: str) -> list[int]:
        """Return the tokens of a prompt without a template, with BOS where the model wants it."""
        tokens = await self.engine.tokenize(model.name, text, add_bos=True, special=True)
        return self.checked(model, tokens)

    def checked(self, model: Model, tokens: list[int]) -> list[int]:
        """Return a prompt that may be computed. Raises UsageError, ContextTooLong."""
        if not tokens:
            raise UsageError("the prompt is empty", hint="say something to the model")
        limit = self.config.server.max_prompt_tokens
        if limit is not None and len(tokens) > limit:
            raise ContextTooLong(
                f"the prompt has {len(tokens)} tokens, this server takes {limit}",
                hint="shorten it, or raise max_prompt_tokens in the configuration",
            )
        wrong = next((t for t in tokens if not 0 <= t < model.facts.n_vocab), None)
        if wrong is not None:
            raise HttpError(
                400,
                f"the prompt has the token {wrong}, the model's are 0 to {model.facts.n_vocab - 1}",
                param="prompt",
            )
        return tokens

    def limit(self, model: Model, asked: int | None) -> int | None:
        """Return how many tokens may be generated; None: as many as the context holds.

        Below 0 is what clients of llama.cpp and LM Studio send for no limit.
        """
        if asked is None:
            default = model.stored.parameters.get("num_predict")
            asked = default if isinstance(default, int) else None
        if asked is not None and asked < 0:
            asked = None
        most = self.config.server.max_output_tokens
        return most if asked is None else asked if most is None else min(asked, most)

    def sampling(self, model: Model, asked: Mapping[str, Any]) -> Sampling:
        """Return llama.cpp's defaults, then what the model brings along, then what is asked."""
        chosen: dict[str, Any] = {
            name: value for name, value in model.stored.parameters.items() if name in _SAMPLING
        }
        chosen.update({k: v for k, v in asked.items() if k in _SAMPLING and v is not None})
        if "seed" in chosen:
            seed = int(chosen["seed"])
            chosen["seed"] = None if seed < 0 else seed % _MAX_SEED
        if chosen.get("grammar"):
            check_grammar(chosen["grammar"])
        for token in chosen.get("logit_bias", {}):
            if not 0 <= token < model.facts.n_vocab:
                raise HttpError(
                    400,
                    f"logit_bias names the token {token}, the model's are 0 to "
                    f"{model.facts.n_vocab - 1}",
                    param="logit_bias",
                )
        return replace(Sampling(), **chosen)

    def stops(self, model: Model, asked: str | Sequence[str] | None) -> tuple[str, ...]:
        if asked is None:
            default = model.stored.parameters.get("stop", ())
            return tuple(default) if isinstance(default, (list, tuple)) else ()
        return (asked,) if isinstance(asked, str) else tuple(asked)
