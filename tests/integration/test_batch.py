"""Sequences computed side by side are bit by bit what each would be alone in stock llama.cpp."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nexus_ext.errors import Interrupted, OutOfMemory, ReadFailed, UsageError
from nexus_ext.multiplexer.prefix import TILE
from nexus_ext.runtime.batch import BatchContext, Row, Shape
from nexus_ext.runtime.blueprint import Blueprint, blueprint
from nexus_ext.runtime.elastic import ElasticModel
from nexus_ext.runtime.sampler import Sampler, log_probabilities
from nexus_ext.runtime.sampling import Sampling
from nexus_ext.testing.synthetic.models import write_moe
from tests.integration.alone import Alone

MODELS = Path(__file__).resolve().parents[1] / "models"
N_CTX = 512
SHAPE = Shape(n_seq=4, n_ctx=N_CTX, n_ubatch=128, n_threads=2)
PROMPTS = (5, 37, 64, 130)  # tokens; the last takes three chunks
N_DECODED = 12


def prompts(n_vocab: int) -> list[list[int]]:
    rng = np.random.default_rng(7)
    return [[int(t) for t in rng.integers(3, n_vocab, n)] for n in PROMPTS]


def prefill(
    context: BatchContext, sequence: int, prompt: list[int], chunk: int, begin: int = 0
) -> np.ndarray:
    for at in range(begin, len(prompt), chunk):
        part = prompt[at : at + chunk]
        rows = [Row(t, at + i, sequence, at + i == len(prompt) - 1) for i, t in enumerate(part)]
        context.compute(rows)
    return context.logits(len(part) - 1).copy()


class Opened:
    def __init__(self, path: Path, shape: Shape = SHAPE) -> None:
        self.plan: Blueprint = blueprint(path, shape)
        self.model = ElasticModel(self.plan)
        self.context = BatchContext(self.model.pointer, self.model.core, shape)

    def close(self) -> None:
        self.context.close()
        self.model.close()


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("batch") / "moe.gguf"
    write_moe(path, arch="qwen3moe", quant="F16")
    return path


@pytest.mark.parametrize(
    "name",
    ["stories260K-f32", "bitllama-3M-q4_k_m", "tinydense-7M-Q4_K_M", "bitllama-3M-tq1_0", "moe"],
)
def test_four_sequences_are_four_single_runs_whatever_is_resident(
    name: str, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue("moe") if name == "moe" else MODELS / f"{name}.gguf"
    alone = Alone(path)
    texts = prompts(alone.n_vocab)
    expected = [alone.greedy(text, N_DECODED) for text in texts]
    alone.close()
    opened = Opened(path)
    context, n_units = opened.context, len(opened.plan.units)
    # In whole chunks, in pieces of which none is a token alone, or several prompts in one batch:
    # no difference.
    logits = [prefill(context, s, text, (64, 13)[s]) for s, text in enumerate(texts[:2])]
    context.compute([Row(texts[s][i], i, s, False) for s in (2, 3) for i in range(31)])
    logits.append(prefill(context, 2, texts[2], 64, begin=31))
    # Its last two tokens are a chunk of two in a fresh run as well.
    logits.append(prefill(context, 3, texts[3], 97, begin=31))
    for step in range(N_DECODED):
        for sequence, row in enumerate(logits):
            assert np.array_equal(row, expected[sequence][step]), (name, sequence, step)
        opened.model.set_resident((0, n_units, n_units // 2, 1, n_units - 1)[step % 5])
        if step % 4 == 1:
            for sequence in range(4):
                context.restore(3 - sequence, context.save(3 - sequence))
        context.compute(
            [Row(int(row.argmax()), len(texts[s]) + step, s, True) for s, row in enumerate(logits)]
        )
        logits = [context.logits(s).copy() for s in range(4)]
    opened.close()


@pytest.mark.parametrize("name", ["bitllama-3M-q4_k_m", "stories260K-f32", "bitllama-3M-tq1_0"])
def test_chunks_of_a_tile_or_more_make_no_difference(name: str) -> None:
    opened = Opened(MODELS / f"{name}.gguf")
    text = prompts(opened.model.vocabulary.n_tokens)[3]
    whole = None
    rng = random.Random(5)
    for _ in range(10):
        opened.context.keep(0, 0)
        at = 0
        while len(text) - at >= 2 * TILE:
            n = rng.randrange(TILE, len(text) - at - TILE + 1)
            opened.context.compute([Row(text[i], i, 0, False) for i in range(at, at + n)])
            at += n
        last = prefill(opened.context, 0, text, 512, begin=at)
        whole = last if whole is None else whole
        assert np.array_equal(last, whole), name
    opened.close()


@pytest.fixture
def opened() -> Iterator[Opened]:
    opened = Opened(MODELS / "bitllama-3M-q4_k_m.gguf")
    yield opened
    opened.close()


def test_memory_of_units_is_what_the_plan_says(opened: Opened) -> None:
    units = opened.plan.units
    for n in (len(units), 3, 0, 5):
        moved = opened.model.set_resident(n)
        assert opened.model.resident == n
        assert opened.model.core.resident_bytes() == sum(u.nbytes for u in units[:n])
        assert moved >= 0


def test_a_read_error_keeps_the_units_that_are_whole(opened: Opened) -> None:
    plan, model = opened.plan, opened.model
    last = plan.catalog.tensors[plan.units[2].extents[-1]]
    model.core.inject("eio", last.offset, last.offset + last.nbytes)
    with pytest.raises(ReadFailed, match=r"reading weights back"):
        model.set_resident(4)
    assert model.resident == 2
    assert model.core.resident_bytes() == sum(u.nbytes for u in plan.units[:2])
    model.core.clear_faults()
    model.set_resident(len(plan.units))
    assert prefill(opened.context, 0, [5, 6, 7], 64).shape == (opened.model.vocabulary.n_tokens,)


@pytest.mark.parametrize(("grows", "what"), [(True, "resize_cache"), (False, "demote")])
def test_what_cannot_be_given_or_given_back_is_counted_as_it_is(
    grows: bool, what: str, moe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Opened(moe)
    try:
        model, n_units = opened.model, len(opened.plan.units)
        assert opened.plan.caches
        model.set_resident(0 if grows else n_units)
        before = model.core.resident_bytes()

        def fails(*arguments: Any) -> None:
            monkeypatch.undo()
            raise OutOfMemory("for this test")

        monkeypatch.setattr(model.core, what, fails)
        with pytest.raises(OutOfMemory):
            model.set_resident(n_units if grows else 0)
        held = sum(unit.nbytes for unit in opened.plan.units[: model.resident])
        assert before <= held if not grows else model.core.resident_bytes() <= held
        for n in (n_units, 0):
            model.set_resident(n)
            assert model.resident == n
        assert model.core.resident_bytes() == 0
    finally:
        opened.close()


def test_a_failed_or_stopped_batch_leaves_sequences_as_they_were(opened: Opened) -> None:
    context, model = opened.context, opened.model
    prompt = list(range(10, 40))
    before = prefill(context, 0, prompt, 64)
    model.core.inject("eio")
    with pytest.raises(ReadFailed):
        context.compute([Row(5, 30, 0, True)])
    model.core.clear_faults()
    context.stop()
    with pytest.raises(Interrupted):
        context.compute([Row(5, 30, 0, True)])
    context.compute([Row(5, 30, 0, True)])
    after = context.logits(0).copy()
    context.keep(0, 0)
    assert np.array_equal(prefill(context, 0, prompt, 64), before)
    context.compute([Row(5, 30, 0, True)])
    assert np.array_equal(context.logits(0), after)


def test_a_kv_type_that_does_not_exist_is_named() -> None:
    with pytest.raises(UsageError, match="q3_x"):
        blueprint(MODELS / "stories260K-f32.gguf", Shape(1, 64, kv_type="q3_x"))


# -- samplers --------------------------------------------------------------------------------------


def _sampler(opened: Opened, **options: Any) -> Sampler:
    vocabulary = opened.model.vocabulary
    values = {"temperature": 0.0, **options}
    return Sampler(vocabulary.pointer, vocabulary.n_tokens, Sampling(**values), N_CTX)


def test_samplers_do_what_their_names_say(opened: Opened) -> None:
    logits = prefill(opened.context, 0, [5, 9, 12], 64)
    best = int(logits.argmax())
    assert _sampler(opened).pick(logits) == best
    assert _sampler(opened, logit_bias={best: -1e9}).pick(logits) != best
    assert _sampler(opened, logit_bias={17: 1e9}).pick(logits) == 17
    drawn = [_sampler(opened, temperature=1.5, seed=s).pick(logits) for s in range(20)]
    again = [_sampler(opened, temperature=1.5, seed=s).pick(logits) for s in range(20)]
    assert drawn == again and len(set(drawn)) > 1
    assert _sampler(opened, temperature=1.5, top_k=1).pick(logits) == best
    assert _sampler(opened, temperature=1.5, mirostat=2, seed=1).pick(logits) in range(len(logits))
    assert _sampler(opened, temperature=1.5, mirostat=1, seed=1).pick(logits) in range(len(logits))
    penalized = _sampler(opened, frequency_penalty=2.0, presence_penalty=2.0)
    penalized.accept_prompt([best] * 40)
    assert penalized.pick(logits) != best
    assert abs(float(np.exp(log_probabilities(logits)).sum()) - 1.0) < 1e-9


def test_a_grammar_is_obeyed(opened: Opened) -> None:
    vocabulary = opened.model.vocabulary
    sampler = _sampler(opened, grammar='root ::= "a" "b" "c"')
    text = b""
    logits = prefill(opened.context, 0, [5, 9, 12], 64)
    for _ in range(4):
        token = sampler.pick(logits)
        sampler.accept(token)
        if vocabulary.ends(token):
            break
        text += vocabulary.piece(token)
    assert text == b"abc" and vocabulary.ends(token)
    with pytest.raises(UsageError, match="grammar"):
        _sampler(opened, grammar="root ::= missing")


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"top_p": 2.0},
        {"mirostat": 3},
        {"logit_bias": {10**6: 1.0}},
        {"min_p": float("nan")},
    ],
)
def test_sampling_options_out_of_range_are_refused(opened: Opened, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        _sampler(opened, **options)


# -- vocabulary ------------------------------------------------------------------------------------


def test_text_goes_to_tokens_and_back(opened: Opened) -> None:
    vocabulary = opened.model.vocabulary
    tokens = vocabulary.tokenize("Once upon a time", add_bos=True, special=False)
    assert tokens[0] == vocabulary.bos
    assert "Once upon a time" in vocabulary.detokenize(tokens)
    assert b"".join(vocabulary.piece(t) for t in tokens[1:]).strip() == b"Once upon a time"
    assert vocabulary.eos in vocabulary.end_tokens()
    with pytest.raises(UsageError, match="not one of"):
        vocabulary.check([vocabulary.n_tokens])
    assert vocabulary.text(-1) == ""
