"""Everything of llama-cpp-python's class works on a paged model, with the same results."""

from __future__ import annotations

import ctypes
import gc
import pickle
from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
from llama_cpp import _internals
from llama_cpp import llama_cpp as bindings

from nexus_ext import Llama, Plan
from nexus_ext.errors import FormatError, Interrupted, UsageError
from nexus_ext.formats import open_gguf
from nexus_ext.plugins import plugins
from nexus_ext.runtime.stock import stock_llama
from nexus_ext.runtime.vocabulary import OwnVocabulary
from tests.integration.streaming import logits, paged, prompt, stock
from tests.models_folder import find_model

NAME = "tinydense-7M-Q4_K_M.gguf"
ARGUMENTS: dict[str, Any] = {"n_ctx": 256, "n_batch": 128, "logits_all": False, "seed": 7}


@pytest.fixture(scope="module")
def path() -> Path:
    return find_model(NAME)


def both(path: Path, use: Any, **arguments: Any) -> tuple[Any, Any]:
    """What `use` returns for a stock and for a paged model."""
    with stock(path, **{**ARGUMENTS, **arguments}) as llm:
        expected = use(llm)
    with paged(path, "1500K", **{**ARGUMENTS, **arguments}) as llm:
        assert llm.nexus.active
        return expected, use(llm)


def test_of_a_load_that_was_stopped_nobody_hears(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []
    for event in ("model_loaded", "model_closed"):
        monkeypatch.setattr(plugins(), event, lambda info, event=event: told.append(event))
    with pytest.raises(Interrupted):
        Llama(path, weights="1500K", verbose=False, progress=lambda done, total: True, **ARGUMENTS)
    gc.collect()
    assert told == []
    Llama(path, weights="1500K", verbose=False, **ARGUMENTS).close()
    assert told == ["model_loaded", "model_closed"]


def test_a_copy_through_pickle_keeps_to_the_same_budget(path: Path) -> None:
    wishes: dict[str, Any] = {"weights": "1500K", "pins": [("attn_q", "nvme")], "kernels": "ggml"}
    with closing(Llama(path, **wishes, verbose=False, **ARGUMENTS)) as llm:
        with closing(pickle.loads(pickle.dumps(llm))) as other:
            mine, its = llm.nexus.plan, other.nexus.plan
            assert (its.budget, its.tiers) == (mine.budget, mine.tiers)
            assert its.streamed_bytes_per_token > 0 and other.nexus.own_kernels == ()
            assert (
                other("Once", max_tokens=4, temperature=0)["choices"]
                == (llm("Once", max_tokens=4, temperature=0)["choices"])
            )


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"ram": 4.5}, r"ram is 4\.5, neither"),
        ({"weights": True}, "weights is True, neither"),
        ({"ram": b"4G"}, "ram is b'4G', neither"),
        ({"type_k": 999}, "type_k is 999"),
        ({"type_v": "q8_0"}, "type_v is 'q8_0'"),
    ],
)
def test_what_means_nothing_is_refused_before_llama_cpp_sees_it(
    path: Path, wishes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        Llama(path, verbose=False, **{**ARGUMENTS, **wishes})


@pytest.mark.parametrize("weights", ["1500K", None])
def test_an_adapter_that_cannot_be_loaded_is_refused(path: Path, weights: str | None) -> None:
    with pytest.raises(FormatError, match=r"nowhere\.gguf as a LoRA adapter"):
        Llama(path, weights=weights, verbose=False, lora_path="nowhere.gguf", **ARGUMENTS)


def unknown_model(path: Path, target: Path) -> Path:
    """Write a copy that is of an architecture which there is not."""
    data = path.read_bytes()
    start = open_gguf(path).tensors[0].offset
    target.write_bytes(data[:start].replace(b"llama", b"zorgl") + data[start:])
    return target


@pytest.mark.parametrize("weights", ["1500K", None])
def test_what_llama_cpp_says_of_a_model_that_it_cannot_load_is_told(
    path: Path, tmp_path: Path, weights: str | None
) -> None:
    heard: list[bytes] = []

    @bindings.llama_log_callback
    def mine(level: int, text: bytes, data: Any) -> None:
        heard.append(text)

    before, data = bindings.llama_log_callback(), ctypes.c_void_p()
    bindings.llama_log_get(ctypes.byref(before), ctypes.byref(data))
    model = unknown_model(path, tmp_path / "m.gguf")
    try:
        bindings.llama_log_set(mine, ctypes.c_void_p())
        with pytest.raises(FormatError, match=r"m\.gguf: unknown model architecture: 'zorgl'"):
            Llama(model, weights=weights, verbose=False, **ARGUMENTS)
        # Who listens besides hears all of it, and is there afterwards.
        assert any(b"zorgl" in text for text in heard)
        now = bindings.llama_log_callback()
        bindings.llama_log_get(ctypes.byref(now), ctypes.byref(data))
        address = ctypes.cast(now, ctypes.c_void_p).value
        assert address == ctypes.cast(mine, ctypes.c_void_p).value
    finally:
        bindings.llama_log_set(before, ctypes.c_void_p())
    with pytest.raises(FormatError, match="unknown model architecture"):
        stock_llama(str(model), **{**ARGUMENTS, "verbose": False})
    with pytest.raises(FormatError, match="unknown model architecture"):
        OwnVocabulary(open_gguf(model))


def test_sampled_completions_are_the_same(path: Path) -> None:
    expected, got = both(
        path, lambda llm: llm("Once upon a time", max_tokens=40, temperature=0.8, seed=3)
    )
    assert got["choices"] == expected["choices"]
    assert len(got["choices"][0]["text"]) > 20


def test_streamed_chat_is_the_same(path: Path) -> None:
    def chat(llm: Any) -> str:
        messages = [{"role": "user", "content": "Tell me of a dog."}]
        parts = llm.create_chat_completion(messages, max_tokens=24, temperature=0, stream=True)
        return "".join(part["choices"][0]["delta"].get("content") or "" for part in parts)

    expected, got = both(path, chat, chat_format="chatml")
    assert got == expected


def test_a_grammar_is_obeyed(path: Path) -> None:
    def constrained(llm: Any) -> str:
        grammar = llama_cpp.LlamaGrammar.from_string(
            'root ::= ("yes" | "no") " " [0-9]+', verbose=False
        )
        answer = llm("Answer:", grammar=grammar, max_tokens=8, temperature=0)
        return str(answer["choices"][0]["text"])

    expected, got = both(path, constrained)
    assert got == expected
    assert got.startswith(("yes ", "no "))


def test_embeddings_are_the_same(path: Path) -> None:
    expected, got = both(
        path, lambda llm: llm.embed(["a small dog", "a large cat"]), embedding=True, pooling_type=1
    )
    assert np.array_equal(np.array(got), np.array(expected))


def test_saved_state_continues_the_same(path: Path) -> None:
    def saved(llm: Any) -> list[int]:
        llm.eval(prompt(30, llm.n_vocab()))
        state = llm.save_state()
        llm.reset()
        llm.eval(prompt(20, llm.n_vocab(), seed=5))
        llm.load_state(state)
        out = []
        for token in llm.generate([int(llm.input_ids[llm.n_tokens - 1])], temp=0.0, reset=False):
            out.append(int(token))
            if len(out) == 8:
                return out
        return out

    expected, got = both(path, saved, logits_all=True)
    assert got == expected


def write_lora(path: Path, out: Path) -> None:
    """A random adapter of rank 4 for two matrices of the model."""
    writer = gguf.GGUFWriter(str(out), "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    rng = np.random.default_rng(0)
    for tensor in gguf.GGUFReader(str(path)).tensors:
        if tensor.name in ("blk.1.attn_q.weight", "blk.2.ffn_down.weight"):
            n_in, n_out = (int(n) for n in tensor.shape)
            for suffix, shape in (("lora_a", (4, n_in)), ("lora_b", (n_out, 4))):
                values = rng.normal(0, 0.05, shape).astype(np.float32)
                writer.add_tensor(f"{tensor.name}.{suffix}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_lora_adapters_apply_to_paged_weights(path: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter.gguf"
    write_lora(path, adapter)

    def use(llm: Any) -> Any:
        return logits(llm, prompt(33, llm.n_vocab()))

    plain, _ = both(path, use, logits_all=True)
    expected, got = both(path, use, logits_all=True, lora_path=str(adapter))
    assert np.array_equal(got, expected)
    assert not np.array_equal(got, plain), "the adapter did nothing"


def test_two_contexts_of_one_model_decode_in_turn(path: Path) -> None:
    with paged(path, "1500K", logits_all=True) as llm:
        tokens = prompt(40, llm.n_vocab())
        alone = logits(llm, tokens)
        second = _internals.LlamaContext(model=llm._model, params=llm.context_params, verbose=False)
        batch = _internals.LlamaBatch(n_tokens=64, embd=0, n_seq_max=1, verbose=False)
        llm.reset()
        rows = []
        for i, token in enumerate(tokens):  # one token here, one token there
            batch.set_batch([token], i, True)
            second.decode(batch)
            got = np.ctypeslib.as_array(second.get_logits(), shape=(llm.n_vocab(),))
            rows.append(got.copy().view(np.uint32))
            llm.eval([token])
            here = llm.scores[llm.n_tokens - 1].view(np.uint32)
            assert np.array_equal(here, rows[-1])
        batch.close()
        second.close()
        assert np.array_equal(alone, logits(llm, tokens))


def test_an_eval_callback_sees_the_same_graph_and_changes_nothing(path: Path) -> None:
    """The scheduler then computes in small pieces: what is read ahead must follow."""
    seen = []

    @llama_cpp.llama_cpp.ggml_backend_sched_eval_callback
    def callback(tensor: int, ask: bool, user_data: int) -> bool:
        seen.append(ask)
        return not ask or len(seen) % 5 == 0

    with stock(path, logits_all=True) as llm:
        expected = logits(llm, prompt(33, llm.n_vocab()))
    with paged(path, "1500K", logits_all=True) as llm:
        llm.context_params.cb_eval = callback
        context = _internals.LlamaContext(
            model=llm._model, params=llm.context_params, verbose=False
        )
        llm._ctx, original = context, llm._ctx
        got = logits(llm, prompt(33, llm.n_vocab()))
        llm._ctx = original
        context.close()
    assert np.array_equal(got, expected)
    assert len(seen) > 100


def test_thread_counts_and_abort_callbacks_reach_the_delegate(path: Path) -> None:
    with paged(path, "1500K", logits_all=True, n_threads=1, n_threads_batch=1) as llm:
        one = logits(llm, prompt(20, llm.n_vocab()))
        llm._ctx.set_n_threads(2, 2)
        assert np.array_equal(logits(llm, prompt(20, llm.n_vocab())), one)
        calls = []

        @llama_cpp.llama_cpp.ggml_abort_callback
        def stop(user_data: int) -> bool:
            calls.append(1)
            return len(calls) > 20

        llama_cpp.llama_cpp.llama_set_abort_callback(llm._ctx.ctx, stop, ctypes.c_void_p())
        llm.reset()
        with pytest.raises(RuntimeError):
            llm.eval(prompt(20, llm.n_vocab()))
        assert len(calls) > 20


def test_a_plan_from_a_file_is_used_as_it_is(path: Path, tmp_path: Path) -> None:
    with paged(path, "1500K") as llm:
        plan = llm.nexus.plan
    file = tmp_path / "plan.json"
    file.write_text(plan.to_json())
    with closing(Llama(path, plan=file, n_ctx=256, verbose=False)) as llm:
        assert llm.nexus.plan == plan
    assert Plan.from_json(file.read_text()) == plan


def test_a_plan_for_another_model_is_refused(path: Path) -> None:
    with paged(path, "1500K") as llm:
        plan = llm.nexus.plan
    with pytest.raises(UsageError, match="plan"):
        Llama(find_model("bitllama-3M-q4_k_m.gguf"), plan=plan, n_ctx=256, verbose=False)


def test_a_model_that_fits_runs_without_us(path: Path) -> None:
    with stock(path, **ARGUMENTS) as llm:
        expected = llm("Once upon a time", max_tokens=16, temperature=0)["choices"]
    llm = Llama(path, ram="2G", n_ctx=256, n_batch=128, seed=7, verbose=False)
    assert not llm.nexus.active
    with pytest.raises(UsageError):
        llm.nexus.stats()
    assert llm("Once upon a time", max_tokens=16, temperature=0)["choices"] == expected
    llm.close()


def test_a_file_that_is_no_model_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rubbish.gguf"
    path.write_bytes(b"not a model at all" * 100)
    with pytest.raises(FormatError, match=r"rubbish\.gguf"):
        Llama(path)
