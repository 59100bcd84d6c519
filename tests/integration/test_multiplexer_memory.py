"""Several models in one budget: what is in memory, what comes back, what is left behind."""

from __future__ import annotations

import asyncio
import gc
import os
import random
from pathlib import Path

import pytest

from nexus_ext.errors import DoesNotFit
from nexus_ext.multiplexer.api import (
    GenerateRequest,
)
from nexus_ext.multiplexer.settings import ModelSpec
from nexus_ext.runtime.blueprint import blueprint
from nexus_ext.units import MIB
from tests.integration.alone import Alone
from tests.integration.mux import (
    GREEDY,
    N_CTX,
    N_UBATCH,
    PATHS,
    a_prompt,
    answer,
    multiplexer,
    run,
    shape,
    takes,
)


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


def test_a_conversation_is_kept_however_short_it_is() -> None:
    async def test() -> None:
        async with multiplexer(session_ram_bytes=8 * MIB) as mux:
            prompt = [5, 6, 7]
            for cached in (0, 7, 15):  # all but the last token, which was never computed with
                tokens, _, done = await answer(mux, "tiny", prompt, 5, session="talk")
                assert done.n_cached_tokens == cached and len(tokens) == 5
                prompt = [*prompt, *tokens, 9, 10, 11]
                await mux.unload("tiny")
                await answer(mux, "bit", a_prompt(cached, 30), 1)

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
            used, total = mux.budget()
            assert used <= total

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
