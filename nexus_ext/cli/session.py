"""One model, asked again and again: prompts to tokens, tokens to text, and what each answer cost.

Drives `Llama.generate`. llama-cpp-python's own streaming is not used because it stops showing text
at the first byte that is no UTF-8, and drops what its last tokens held back. Writes nothing.
"""

from __future__ import annotations

import ctypes
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from nexus_ext.cli.text import TextStream
from nexus_ext.errors import Interrupted, UsageError

if TYPE_CHECKING:
    from nexus_ext.runtime import Llama, RunStats

Finish = Literal["stop", "length", "interrupted"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen; names and defaults of llama.cpp."""

    temp: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    mirostat_mode: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back, and what it cost. Statistics are None when nothing is streamed."""

    text: str
    finish: Finish
    tokens: tuple[int, ...]
    n_prompt: int
    n_prefill: int  # of the prompt: what was not in the KV cache yet
    prefill_s: float  # until the first token
    decode_s: float  # from the first token to the last
    prefill: RunStats | None
    decode: RunStats | None

    @property
    def tok_s(self) -> float | None:
        """Tokens a second after the first one; None when there were not two."""
        n = len(self.tokens) - 1
        return n / self.decode_s if n > 0 and self.decode_s > 0 else None

    @property
    def prefill_tok_s(self) -> float | None:
        return self.n_prefill / self.prefill_s if self.tokens and self.prefill_s > 0 else None


class _Captured(Exception):
    """Carries the prompt of a chat out of llama-cpp-python's handler."""

    def __init__(self, tokens: list[int], stops: list[str]) -> None:
        super().__init__()
        self.tokens, self.stops = tokens, stops


class _PromptOnly:
    """A `Llama` whose completion is never made: chat handlers see a model, we see the prompt."""

    def __init__(self, llm: Llama) -> None:
        self._llm = llm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    def create_completion(self, prompt: Any, stop: Any = None, **_: Any) -> Any:
        stops = [stop] if isinstance(stop, str) else list(stop or ())
        tokens = self._llm.tokenize(prompt.encode()) if isinstance(prompt, str) else list(prompt)
        raise _Captured(tokens, stops)


class Session:
    """A loaded model and its conversation."""

    def __init__(self, llm: Llama, n_ctx: int) -> None:
        self.llm = llm
        self.n_ctx = min(n_ctx, llm.n_ctx())
        # Taken through the runtime's handle; the class of llama-cpp-python has no method for it.
        from nexus_ext.runtime import ggml

        self._is_end = ggml.function(
            "llama_vocab_is_eog", ctypes.c_bool, ctypes.c_void_p, ctypes.c_int32
        )

    @property
    def has_template(self) -> bool:
        """Whether the model says itself how a chat is written."""
        return "tokenizer.chat_template" in self.llm.metadata or self.llm.chat_handler is not None

    def use_template(self, template: str) -> None:
        """Write chats with this Jinja template instead of the model's own."""
        llm: Any = self.llm

        def text(token: int) -> str:
            return str(llm._model.token_get_text(token)) if token >= 0 else ""

        formatter = sys.modules["llama_cpp.llama_chat_format"].Jinja2ChatFormatter
        made = formatter(template, eos_token=text(llm.token_eos()), bos_token=text(llm.token_bos()))
        llm.chat_handler = made.to_chat_handler()

    def complete(self, text: str) -> list[int]:
        """Return the tokens of a plain prompt."""
        return list(self.llm.tokenize(text.encode("utf-8", "replace"), special=True))

    def chat(self, messages: Sequence[dict[str, str]]) -> tuple[list[int], list[str]]:
        """Return the tokens of a chat as the model's own template writes it, and its stops."""
        try:
            handled: Any = _PromptOnly(self.llm)
            asked: Any = list(messages)
            type(self.llm).create_chat_completion(handled, messages=asked)
        except _Captured as captured:
            return captured.tokens, captured.stops
        except Exception as error:  # a template is a program in the file: it may raise anything
            raise UsageError(
                f"the model's chat template refuses this conversation: {error}",
                hint="use --no-chat for plain completion, or leave out --system",
            ) from error
        raise UsageError("the model's chat handler asked for no completion", hint="use --no-chat")

    def grammar(self, text: str, what: str) -> Any:
        """Return llama-cpp-python's grammar. UsageError when llama.cpp cannot parse it."""
        from nexus_ext.runtime import ggml

        # Tried first: llama-cpp-python does not look whether llama.cpp took the grammar.
        create = ggml.function(
            "llama_sampler_init_grammar",
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_char_p,
            ctypes.c_char_p,
        )
        sampler = create(self.llm._model.vocab, text.encode(), b"root")
        if not sampler:
            raise UsageError(
                f"{what} holds no grammar that llama.cpp can parse",
                hint='a GBNF grammar has a rule "root"; llama.cpp\'s message is above',
            )
        ggml.function("llama_sampler_free", None, ctypes.c_void_p)(sampler)
        # The runtime has imported it; naming it here would be a second way to the bindings.
        return sys.modules["llama_cpp"].LlamaGrammar.from_string(text, verbose=False)

    def schema_grammar(self, schema: str) -> Any:
        """Return the grammar of a JSON schema. UsageError when there is none."""
        try:
            text = sys.modules["llama_cpp.llama_grammar"].json_schema_to_gbnf(schema)
        except Exception as error:  # whatever the converter stumbles over in the user's schema
            raise UsageError(
                f"the JSON schema cannot be made a grammar: {error}",
                hint="check that it is JSON and a schema that llama.cpp supports",
            ) from error
        return self.grammar(text, "the JSON schema")

    def generate(
        self,
        prompt: Sequence[int],
        *,
        sampling: Sampling,
        seed: int,
        limit: int = -1,
        stops: Sequence[str] = (),
        grammar: Any = None,
        on_text: Callable[[str], None] = lambda text: None,
        on_token: Callable[[int], None] = lambda count: None,
    ) -> Answer:
        """Answer `prompt`; `limit` is a number of tokens, below zero as many as the context has.

        `on_text` gets the text as it comes, `on_token` the number of tokens so far. Ctrl-C ends the
        answer, not the session. Raises UsageError when the prompt does not fit in the context, and
        what the runtime raises.
        """
        llm, handle = self.llm, self.llm.nexus
        room = self.n_ctx - len(prompt)
        if not prompt:
            raise UsageError("the prompt is empty", hint="say something to the model")
        if room <= 0:
            raise UsageError(
                f"the prompt has {len(prompt)} tokens, the context has room for {self.n_ctx - 1}",
                hint="shorten it, or give a larger --ctx",
            )
        limit = room if limit < 0 else min(limit, room)
        known = llm.longest_token_prefix(llm.input_ids[: llm.n_tokens].tolist(), list(prompt))
        n_prefill = len(prompt) - min(known, len(prompt) - 1)
        stream, parts, tokens = TextStream(stops), [], []  # type: ignore[var-annotated]
        finish: Finish = "length"
        llm.set_seed(seed & 0xFFFFFFFF)
        if handle.active:
            handle.reset_stats()
        prefill: RunStats | None = None
        begin = first = last = time.perf_counter()

        def show(text: str) -> None:
            if text:
                parts.append(text)
                on_text(text)

        from nexus_ext.runtime.interrupts import interrupts_kept

        source: Any = llm.generate(list(prompt), grammar=grammar, **_arguments(sampling))
        try:
            # Asked for one at a time: a token beyond the limit would be computed for nothing.
            while len(tokens) < limit:
                with interrupts_kept(), _aborts_unsaid():
                    token = next(source)
                last = time.perf_counter()
                if not tokens:
                    first = last
                    if handle.active:
                        prefill = handle.stats()
                        handle.reset_stats()
                if self._is_end(llm._model.vocab, token):
                    finish = "stop"
                    break
                tokens.append(token)
                show(stream.feed(llm.detokenize([token])))
                on_token(len(tokens))
                if stream.stopped:
                    finish = "stop"
                    break
            show(stream.finish())
        except (KeyboardInterrupt, Interrupted):
            finish = "interrupted"
            show(stream.finish())
        finally:
            source.close()
        return Answer(
            text="".join(parts),
            finish=finish,
            tokens=tuple(tokens),
            n_prompt=len(prompt),
            n_prefill=n_prefill,
            prefill_s=first - begin,
            decode_s=last - first,
            prefill=prefill,
            decode=handle.stats() if handle.active and prefill is not None else None,
        )


@contextmanager
def _aborts_unsaid() -> Iterator[None]:
    """Keep llama.cpp from logging that it was aborted: the error that follows says so."""
    logger = logging.getLogger("llama-cpp-python")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _arguments(sampling: Sampling) -> dict[str, float]:
    return {name: getattr(sampling, name) for name in Sampling.__slots__}
