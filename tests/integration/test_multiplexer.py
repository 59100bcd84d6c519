"""Several models in one budget: right answers, kept promises, nothing left behind."""

from __future__ import annotations

import asyncio
import gc
import os
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from nexus_ext.errors import DoesNotFit, FormatError, ModelClosed, ReadFailed, UsageError
from nexus_ext.multiplexer.api import (
    ContextTooLong,
    Done,
    GenerateRequest,
    ModelNotFound,
    Overloaded,
    Piece,
    Sampling,
)
from nexus_ext.multiplexer.engine import Multiplexer
from nexus_ext.multiplexer.settings import ModelSpec, Settings
from nexus_ext.runtime.batch import Shape
from nexus_ext.runtime.elastic import blueprint
from nexus_ext.units import MIB
from tests.integration.alone import Alone

MODELS = Path(__file__).resolve().parents[1] / "models"
PATHS = {
    "bit": MODELS / "bitllama-3M-q4_k_m.gguf",
    "tiny": MODELS / "tinydense-7M-Q4_K_M.gguf",
    "f32": MODELS / "stories260K-f32.gguf",
}
N_CTX, N_UBATCH = 512, 64
GREEDY = Sampling(temperature=0.0)


def find(name: str) -> ModelSpec:
    if name not in PATHS:
        raise ModelNotFound(f"there is no model {name!r}", hint="`nexus list` shows what there is")
    return ModelSpec(name, str(PATHS[name]))


def shape(n_parallel: int = 4) -> Shape:
    return Shape(n_parallel, N_CTX, N_UBATCH, 2)


def takes(name: str, n_parallel: int = 4) -> tuple[int, int]:
    """(fixed part with the vocabulary that tokenizes, units) of a model in bytes."""
    plan = blueprint(PATHS[name], shape(n_parallel))
    return plan.sizes.total + plan.vocabulary_bytes, plan.units_bytes


@asynccontextmanager
async def multiplexer(
    budget_bytes: int = 512 * MIB, find: Callable[[str], ModelSpec] = find, **settings: Any
) -> AsyncIterator[Multiplexer]:
    values = {"n_ctx": N_CTX, "n_ubatch": N_UBATCH, "n_threads": 2, "patience_s": 0.05, **settings}
    mux = Multiplexer(find, Settings(budget_bytes=budget_bytes, **values))
    try:
        yield mux
    finally:
        await mux.close()


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 120))


async def answer(
    mux: Multiplexer, model: str, prompt: list[int], n: int | None = 8, **more: Any
) -> tuple[list[int], str, Done]:
    tokens: list[int] = []
    text, done = "", None
    sampling = more.pop("sampling", GREEDY)
    request = GenerateRequest(model, prompt, sampling, max_tokens=n, **more)
    async for event in mux.generate(request):
        assert done is None
        if isinstance(event, Piece):
            tokens += event.tokens
            text += event.text
        else:
            done = event
    assert done is not None
    return tokens, text, done


def a_prompt(seed: int, n: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 500) for _ in range(n)]


def test_every_answer_is_that_of_its_model_alone_within_half_the_memory() -> None:
    whole = [takes(name) for name in PATHS]
    budget = sum(sum(parts) for parts in whole) // 2 + 8 * MIB
    rng = random.Random(3)
    asked = [
        (rng.choice(list(PATHS)), a_prompt(i, rng.choice((1, 2, 9, 64, 65, 150))), 12)
        for i in range(40)
    ]

    async def test() -> None:
        async with multiplexer(budget, session_ram_bytes=8 * MIB) as mux:
            few = asyncio.Semaphore(9)

            async def ask(model: str, prompt: list[int], n: int) -> list[int]:
                async with few:
                    tokens, _, done = await answer(mux, model, prompt, n)
                    used, total = mux.budget()
                    assert used <= total == budget
                    assert done.n_tokens == len(tokens) and done.n_prompt_tokens == len(prompt)
                    return tokens

            answers = await asyncio.gather(*(ask(*one) for one in asked))
            kinds = [event.kind for event in mux.log.events()]
            assert "evict" in kinds or "unload" in kinds
        for name, path in PATHS.items():
            alone = Alone(path, N_CTX, N_UBATCH)
            for (model, prompt, n), tokens in zip(asked, answers, strict=True):
                if model == name:
                    assert tokens == alone.tokens(prompt, n), (model, len(prompt))
            alone.close()

    run(test())


def test_a_model_larger_than_the_budget_streams() -> None:
    fixed, units = takes("tiny", 1)

    async def test() -> None:
        budget = fixed + units // 3
        async with multiplexer(budget, n_parallel=1, session_ram_bytes=0) as mux:
            tokens, _, _ = await answer(mux, "tiny", a_prompt(1, 20))
            status = mux.status()[0]
            assert status.tier.endswith("% resident") or status.tier == "streaming"
            alone = Alone(PATHS["tiny"], N_CTX, N_UBATCH)
            assert tokens == alone.tokens(a_prompt(1, 20), 8)
            alone.close()

    run(test())


def test_what_can_never_fit_is_refused_and_others_go_on() -> None:
    fixed, _ = takes("bit", 1)

    async def test() -> None:
        async with multiplexer(fixed // 2, n_parallel=1, session_ram_bytes=0) as mux:
            with pytest.raises(DoesNotFit) as error:
                await answer(mux, "bit", [5, 6])
            assert error.value.smallest_bytes > fixed // 2
            with pytest.raises(DoesNotFit):
                await mux.load("bit")

    run(test())


def test_a_conversation_goes_on_after_its_model_was_away() -> None:
    async def conversation(swap: bool) -> list[tuple[list[int], int]]:
        async with multiplexer(session_ram_bytes=64 * MIB) as mux:
            said, prompt = [], a_prompt(5, 70)
            for turn in range(3):
                tokens, _, done = await answer(mux, "bit", prompt, 20, session="talk")
                said.append((tokens, done.n_cached_tokens))
                prompt = [*prompt, *tokens, *a_prompt(turn, 9)]
                if swap:
                    await mux.unload("bit")
                    assert "bit" not in [status.name for status in mux.status()]
                    await answer(mux, "tiny", a_prompt(8, 30))
            kinds = [event.kind for event in mux.log.events()]
            assert ("resume" in kinds) == swap
            return said

    with_swap = asyncio.run(asyncio.wait_for(conversation(True), 60))
    without = asyncio.run(asyncio.wait_for(conversation(False), 60))
    assert with_swap == without
    # All but the answer's last token, which was never computed with, and what is new.
    assert [cached for _, cached in with_swap] == [0, 89, 118]


def test_a_beginning_in_common_is_computed_once() -> None:
    async def test() -> None:
        async with multiplexer() as mux:
            shared = a_prompt(11, 100)
            first, _, done = await answer(mux, "f32", [*shared, *range(7, 16)])
            assert done.n_cached_tokens == 0
            second, _, done = await answer(mux, "f32", [*shared, *range(15, 6, -1)])
            assert done.n_cached_tokens == 100
            third, _, done = await answer(mux, "f32", [*shared, *range(7, 16)])
            assert done.n_cached_tokens >= 100
            alone = Alone(PATHS["f32"], N_CTX, N_UBATCH)
            assert first == third == alone.tokens([*shared, *range(7, 16)], 8)
            assert second == alone.tokens([*shared, *range(15, 6, -1)], 8)
            alone.close()

    run(test())


def test_who_goes_away_frees_the_place_within_a_token() -> None:
    async def test() -> None:
        async with multiplexer(n_parallel=1) as mux:
            stream = mux.generate(GenerateRequest("bit", a_prompt(2, 10), GREEDY))
            async for event in stream:
                assert isinstance(event, Piece)
                break
            await stream.aclose()  # type: ignore[attr-defined]
            tokens, _, _ = await answer(mux, "bit", a_prompt(3, 10), 4)
            assert len(tokens) == 4
            waiting = asyncio.create_task(answer(mux, "bit", a_prompt(4, 10), 400))
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            await answer(mux, "bit", a_prompt(3, 10), 4)
            assert mux.status()[0].n_running == 0

    run(test())


def test_the_queue_is_bounded_and_late_requests_are_told() -> None:
    async def test() -> None:
        async with multiplexer(n_parallel=1, max_queue=2) as mux:
            await mux.load("bit")
            running = mux.generate(GenerateRequest("bit", a_prompt(2, 10), GREEDY))
            async for _ in running:
                break
            late = answer(mux, "bit", a_prompt(3, 5), deadline_s=0.05)
            waiting = asyncio.create_task(answer(mux, "bit", a_prompt(3, 5)))
            tasks = [asyncio.create_task(late), waiting]
            await asyncio.sleep(0.01)
            with pytest.raises(Overloaded) as full:
                await answer(mux, "bit", a_prompt(3, 5))
            assert full.value.retry_after_s >= 1.0
            with pytest.raises(Overloaded, match="deadline"):
                await tasks[0]
            await running.aclose()  # type: ignore[attr-defined]
            assert len((await waiting)[0]) == 8

    run(test())


def test_models_are_kept_as_long_as_asked() -> None:
    async def test() -> None:
        async with multiplexer(keep_alive_s=-1) as mux:
            await mux.load("bit")
            assert [s.until_s for s in mux.status()] == [None]
            request = GenerateRequest("bit", [5, 6], GREEDY, max_tokens=2)
            async for _ in mux.generate(request, keep_alive_s=0):
                pass
            while mux.status():
                await asyncio.sleep(0.01)
            await mux.unload("bit")  # not loaded: nothing to do, but what was to be done is done
            assert [e.why for e in mux.log.events() if e.kind == "unload"] == [
                "its keep-alive has ended"
            ]

    run(test())


def test_answers_end_where_they_should() -> None:
    async def test() -> None:
        async with multiplexer() as mux:
            tokens = await mux.tokenize("bit", "Once upon a time", add_bos=True, special=False)
            whole, text, done = await answer(mux, "bit", tokens, 30)
            assert done.reason in ("length", "stop") and done.stop_text is None
            stop = text[5:9]
            _, cut, done = await answer(mux, "bit", tokens, 30, stop=(stop,))
            assert cut == text[: text.index(stop)]
            assert done.reason == "stop" and done.stop_text == stop
            _, nothing, done = await answer(mux, "bit", tokens, 0)
            assert nothing == "" and done.reason == "length" and done.n_tokens == 0
            long = a_prompt(1, N_CTX - 5)
            got, _, done = await answer(mux, "f32", long, None)
            assert done.reason == "stop" or len(got) == 5
            assert await mux.detokenize("bit", whole)

    run(test())


def test_logprobs_are_those_of_the_model() -> None:
    async def test() -> None:
        async with multiplexer() as mux:
            request = GenerateRequest("bit", [5, 6, 7], GREEDY, max_tokens=3, logprobs=4)
            async for event in mux.generate(request):
                if isinstance(event, Piece) and event.tokens:
                    ((chosen, best),) = event.logprobs
                    assert chosen.token == event.tokens[0] == best[0].token
                    values = [entry.logprob for entry in best]
                    assert values == sorted(values, reverse=True) and len(values) == 4
                    assert all(value <= 0 for value in values)

    run(test())


def test_sampling_with_a_seed_repeats_also_in_company() -> None:
    async def test() -> None:
        async with multiplexer() as mux:
            sampling = Sampling(temperature=1.2, seed=42)
            first = await answer(mux, "bit", [5, 6, 7], 12, sampling=sampling)
            both = await asyncio.gather(
                *(answer(mux, "bit", [5, 6, 7], 12, sampling=sampling) for _ in range(3)),
                answer(mux, "bit", a_prompt(1, 40), 12),
            )
            assert all(one[0] == first[0] for one in both[:3])

    run(test())


def test_requests_that_make_no_sense_are_refused() -> None:
    async def test() -> None:
        async with multiplexer() as mux:
            with pytest.raises(ModelNotFound):
                await answer(mux, "none", [5])
            with pytest.raises(ModelNotFound):
                await mux.unload("none")
            with pytest.raises(UsageError, match="no tokens"):
                await answer(mux, "bit", [])
            with pytest.raises(UsageError, match="not one of"):
                await answer(mux, "bit", [10**6])
            with pytest.raises(ContextTooLong):
                await answer(mux, "bit", a_prompt(1, N_CTX))
            with pytest.raises(ContextTooLong):
                await mux.embed("bit", [a_prompt(1, N_CTX + 1)])
            with pytest.raises(UsageError, match="grammar"):
                await answer(mux, "bit", [5], sampling=Sampling(grammar="root ::= none"))
            assert len((await answer(mux, "bit", [5, 6], 3))[0]) == 3
        with pytest.raises(ModelClosed):
            await answer(mux, "bit", [5, 6])

    run(test())


def test_a_grammar_shapes_one_answer_and_not_its_neighbour() -> None:
    async def test() -> None:
        async with multiplexer() as mux:
            shaped = Sampling(temperature=0.0, grammar='root ::= ("x" | "y") "z"')
            plain, (_, text, done) = await asyncio.gather(
                answer(mux, "bit", [5, 6, 7], 8), answer(mux, "bit", [5, 6, 7], 8, sampling=shaped)
            )
            assert text in ("xz", "yz") and done.reason == "stop"
            assert plain[0] == (await answer(mux, "bit", [5, 6, 7], 8))[0]

    run(test())


def test_embeddings_are_the_same_in_any_company() -> None:
    async def test() -> None:
        async with multiplexer() as mux:
            texts = [a_prompt(i, 5 + i) for i in range(3)]
            vectors = await mux.embed("bit", texts)
            assert len(vectors) == 3 and len(vectors[0]) == (await mux.facts("bit")).n_embd
            assert (await mux.embed("bit", [texts[1]])) == [vectors[1]]
            assert await mux.embed("bit", []) == []
            assert vectors[0] != vectors[1]

    run(test())


def test_facts_need_no_weights() -> None:
    async def test() -> None:
        async with multiplexer() as mux:
            facts = await mux.facts("bit")
            assert facts.n_ctx == N_CTX and facts.n_vocab > 100
            assert facts.architecture == "bitnet" and facts.end_tokens
            assert not mux.status()

    run(test())


def test_a_file_that_is_no_model_is_an_error_of_its_request(tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF" + bytes(40))

    def find_broken(name: str) -> ModelSpec:
        return ModelSpec(name, str(broken)) if name == "broken" else find(name)

    async def test() -> None:
        async with multiplexer(find=find_broken) as mux:
            with pytest.raises(FormatError):
                await answer(mux, "broken", [5])
            assert (await answer(mux, "bit", [5, 6], 3))[0]

    run(test())


def test_a_disk_that_fails_fails_the_requests_and_the_next_one_works() -> None:
    async def test() -> None:
        async with multiplexer() as mux:
            first = await answer(mux, "tiny", [5, 6, 7])
            entry = mux._scheduler.entries["tiny"]
            done = asyncio.Event()
            loop = asyncio.get_running_loop()

            def break_it() -> None:
                runner = entry.runner
                assert runner is not None
                runner.model.set_resident(0)
                entry.resident = 0
                entry.settled = False
                runner.model.core.inject("eio")
                loop.call_soon_threadsafe(done.set)

            mux._scheduler.post(break_it)
            await done.wait()
            with pytest.raises(ReadFailed):
                await answer(mux, "tiny", [9, 6, 7])
            assert entry.runner is not None
            entry.runner.model.core.clear_faults()
            assert (await answer(mux, "tiny", [5, 6, 7]))[0] == first[0]
            assert "fail" in [event.kind for event in mux.log.events()]

    run(test())


def test_a_name_that_gets_another_model_answers_with_it() -> None:
    paths = {"m": PATHS["bit"]}

    def find_changing(name: str) -> ModelSpec:
        return ModelSpec(name, str(paths[name]))

    async def test() -> None:
        async with multiplexer(find=find_changing) as mux:
            await answer(mux, "m", [5, 6, 7])
            paths["m"] = PATHS["tiny"]
            tokens, _, _ = await answer(mux, "m", [5, 6, 7])
            alone = Alone(PATHS["tiny"], N_CTX, N_UBATCH)
            assert tokens == alone.tokens([5, 6, 7], 8)
            alone.close()
            while len(mux._scheduler.entries) > 1:
                await asyncio.sleep(0.01)

    run(test())


def test_weights_of_idle_models_come_back_when_there_is_room() -> None:
    bit, tiny = takes("bit", 1), takes("tiny", 1)

    async def test() -> None:
        budget = sum(bit) + sum(tiny) - bit[1] // 2
        async with multiplexer(budget, n_parallel=1, session_ram_bytes=0) as mux:
            await mux.load("bit")
            await mux.load("tiny")
            tiers = {status.name: status.tier for status in mux.status()}
            assert tiers["tiny"] == "resident" and tiers["bit"] != "resident"
            await mux.unload("tiny")
            while [(s.name, s.tier) for s in mux.status()] != [("bit", "resident")]:
                await asyncio.sleep(0.05)
            assert [e.kind for e in mux.log.events()][-1] == "restore"

    run(test())


def test_pins_and_shares_hold_against_others() -> None:
    bit, tiny = takes("bit", 1), takes("tiny", 1)

    sizes = blueprint(PATHS["bit"], shape(1)).sizes
    fixed, permanent = sizes.total, sizes.permanent

    def find_pinned(name: str) -> ModelSpec:
        share = fixed + bit[1] // 2 if name == "bit" else 0
        return ModelSpec(name, str(PATHS[name]), share_bytes=share)

    async def test() -> None:
        budget = sum(bit) + tiny[0] + bit[1] // 4
        async with multiplexer(
            budget, find_pinned, n_parallel=1, session_ram_bytes=0, keep_alive_s=-1
        ) as mux:
            await mux.load("bit")
            await answer(mux, "tiny", [5, 6, 7])
            held = {status.name: status.resident_bytes for status in mux.status()}
            assert bit[1] // 2 <= held["bit"] - permanent < bit[1]
            assert mux.budget()[0] <= budget

    run(test())


def test_loading_and_unloading_leaves_nothing_behind() -> None:
    def held() -> tuple[int, int]:
        gc.collect()
        text = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        anonymous = next(line for line in text if line.startswith("RssAnon"))
        return int(anonymous.split()[1]) * 1024, len(os.listdir("/proc/self/fd"))

    async def test() -> None:
        async with multiplexer(session_ram_bytes=0) as mux:
            for cycle in range(45):
                for name in PATHS:
                    await answer(mux, name, a_prompt(cycle, 20), 2)
                    await mux.unload(name)
                if cycle == 9:
                    before = held()
            memory, descriptors = held()
            assert descriptors == before[1]
            # 105 models were opened since; their smallest takes 7 MiB.
            assert memory - before[0] < 24 * MIB

    if not Path("/proc/self/status").exists():
        pytest.skip("the system does not tell what a process holds")
    run(test())


def test_a_vocabulary_that_does_not_fit_is_refused() -> None:
    async def test() -> None:
        async with multiplexer(64 * 1024, session_ram_bytes=0) as mux:
            with pytest.raises(DoesNotFit, match="vocabulary"):
                await mux.facts("bit")
            assert mux.budget()[0] == 0

    run(test())


def test_a_load_shows_how_far_it_is() -> None:
    async def test() -> None:
        async with multiplexer() as mux:
            seen: list[float] = []
            mux.log.listen(lambda _: seen.extend(s.load_done for s in mux.status()))
            before = mux.status()
            loading = asyncio.create_task(mux.load("tiny"))
            while not loading.done():
                seen.extend(status.load_done for status in mux.status())
                await asyncio.sleep(0)
            await loading
            assert not before
            assert seen[-1] == 1.0 and all(0.0 <= done <= 1.0 for done in seen)
            assert mux.status()[0].load_done == 1.0

    run(test())
