"""Requests to several models: right answers, whoever else asks, and errors that help."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import numpy as np
import pytest

from nexus_ext.errors import FormatError, ModelClosed, ReadFailed, UsageError
from nexus_ext.formats import open_gguf
from nexus_ext.multiplexer.api import (
    ContextTooLong,
    GenerateRequest,
    ModelNotFound,
    Overloaded,
    Piece,
    Sampling,
)
from nexus_ext.multiplexer.settings import ModelSpec
from tests.integration.alone import Alone
from tests.integration.mux import (
    GREEDY,
    N_CTX,
    N_UBATCH,
    PATHS,
    a_prompt,
    answer,
    find,
    multiplexer,
    run,
)


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


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("loaded", [True, False])
def test_a_file_that_becomes_another_model_is_opened_again(
    tmp_path: Path, loaded: bool, in_place: bool
) -> None:
    """The other has the same header: weights that were trained on, of the same types."""
    path, other = tmp_path / "m.gguf", tmp_path / "other.gguf"
    shutil.copyfile(PATHS["tiny"], path)
    data = bytearray(PATHS["tiny"].read_bytes())
    tensor = next(t for t in open_gguf(path).tensors if t.name == "blk.0.ffn_norm.weight")
    place = slice(tensor.offset, tensor.offset + tensor.nbytes)
    data[place] = np.negative(np.frombuffer(data[place], np.float32)).tobytes()
    other.write_bytes(data)
    prompt = a_prompt(1, 40)  # long enough for its state to be kept
    expected = []
    for file in (path, other):
        alone = Alone(file, N_CTX, N_UBATCH)
        expected.append(alone.tokens(prompt, 8))
        alone.close()
    assert expected[0] != expected[1]

    async def test() -> None:
        async with multiplexer(find=lambda name: ModelSpec(name, str(path))) as mux:
            assert (await answer(mux, "m", prompt))[0] == expected[0]
            if not loaded:
                await mux.unload("m")
            if in_place:
                path.write_bytes(data)
            else:
                other.replace(path)
            assert (await answer(mux, "m", prompt))[0] == expected[1]
            path.unlink()
            with pytest.raises(ReadFailed, match="No such file"):
                await answer(mux, "m", prompt)
            await mux.unload("m")

    run(test())
