"""Tokenizers of the hub in GGUF terms: tokens, types, scores, merges, special ones, templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus_ext.errors import FormatError
from nexus_ext.formats.hf.folder import HfFolder
from nexus_ext.formats.hf.pretokenizers import pretokenizer_name
from nexus_ext.formats.hf.sentencepiece import parse_sentencepiece
from nexus_ext.formats.hf.tokenizer import Tokenizer, read_tokenizer
from tests.synth.hf import (
    change_json,
    config_of,
    llama3_steps,
    qwen2_steps,
    split_steps,
    spm_bytes,
    spm_pieces,
    write_bpe,
    write_json,
    write_spm,
    write_spm_json,
)

N_PIECES = len(spm_pieces())


def folder_of(path: Path, write: Any) -> Path:
    path.mkdir(exist_ok=True)
    write_json(path / "config.json", config_of("llama"))
    write(path)
    return path


def read(path: Path, n_vocab: int = 320, pre: str | None = None) -> Tokenizer:
    folder = HfFolder(path)
    return read_tokenizer(folder, n_vocab, folder.read_json("config.json"), pre)


def pairs(path: Path, n_vocab: int = 320) -> dict[str, Any]:
    found = read(path, n_vocab).pairs
    return {key.removeprefix("tokenizer.").removeprefix("ggml."): v for key, v in found.items()}


# -- SentencePiece --------------------------------------------------------------------------------


def test_pieces_scores_and_types(tmp_path: Path) -> None:
    found = pairs(folder_of(tmp_path / "m", write_spm))
    pieces = spm_pieces()
    assert (found["model"], found["pre"]) == ("llama", "default")
    assert found["tokens"][:N_PIECES] == [text.encode() for text, _, _ in pieces]
    assert found["scores"][:N_PIECES] == pytest.approx([score for _, score, _ in pieces])
    assert found["token_type"][:N_PIECES] == [kind for _, _, kind in pieces]
    assert found["tokens"][N_PIECES] == f"[PAD{N_PIECES}]".encode()
    assert found["token_type"][N_PIECES:] == [5] * (320 - N_PIECES)
    assert len(found["tokens"]) == len(found["scores"]) == len(found["token_type"]) == 320
    assert (found["bos_token_id"], found["eos_token_id"], found["unknown_token_id"]) == (1, 2, 0)
    assert found["add_bos_token"] is True and found["add_eos_token"] is False
    assert found["add_space_prefix"] is True and "merges" not in found


def test_added_tokens_of_sentencepiece(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", write_spm)
    write_json(folder / "added_tokens.json", {"<old>": 300, "beyond": 400})
    decoder = {
        "0": {"content": "<unk>", "special": True},
        "1": {"content": "<s>", "special": True},
        "301": {"content": "<extra▁one>", "special": False},
        "302": {"content": "<|looks|>", "special": False},
        "303": {"content": "[REAL]", "special": True},
    }
    write_json(
        folder / "tokenizer_config.json",
        {
            "added_tokens_decoder": decoder,
            "eos_token": {"content": "[REAL]"},
            "pad_token": "<unk>",
            "add_bos_token": False,
            "add_eos_token": True,
            "add_prefix_space": False,
        },
    )
    tokenizer = read(folder)
    found = pairs(folder)
    tokens = dict(zip(found["tokens"], found["token_type"], strict=True))
    assert tokens[b"<old>"] == tokens[b"<extra one>"] == 4
    assert tokens[b"<|looks|>"] == tokens[b"[REAL]"] == tokens[b"<s>"] == 3
    assert tokens[b"<unk>"] == 2
    assert (found["eos_token_id"], found["padding_token_id"]) == (303, 0)
    assert found["add_bos_token"] is False and found["add_eos_token"] is True
    assert found["add_space_prefix"] is False
    (note,) = tokenizer.notes
    assert "1 tokens have no row in the embedding (320 rows)" in note and "'beyond'" in note


def test_what_the_normalizer_of_sentencepiece_does_is_said(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", write_spm)
    model = spm_bytes(prefix=False, normalizer="nmt_nfkc")
    (folder / "tokenizer.model").write_bytes(model)
    assert "nmt_nfkc" in read(folder).notes[0]
    assert pairs(folder)["add_space_prefix"] is False


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "has no pieces"),
        (b"\x08", "was cut off"),
        (b"\x0a\x05ab", "was cut off"),
        (b"\x0b", "wire type 3"),
        (b"\x08\x01", "a number where a message should be"),
        (b"\xff" * 20, "was cut off"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "was cut off"),
        (spm_bytes([("a", 0.0, 9)]), "piece 0 has the type 9"),
        (spm_bytes([("a", float("nan"), 1)]), "piece 0 has no number"),
        (spm_bytes([("", 0.0, 1)]), "piece 0 is empty"),
        (spm_bytes(kind=1), "of the kind 'unigram'"),
        (b"IQ== 0\nIg== 1\n", "was cut off|wire type|no SentencePiece model"),
    ],
)
def test_files_that_are_no_sentencepiece_model(tmp_path: Path, data: bytes, message: str) -> None:
    folder = folder_of(tmp_path / "m", lambda path: (path / "tokenizer.model").write_bytes(data))
    with pytest.raises(FormatError, match=message) as info:
        read(folder)
    assert "tokenizer.model" in str(info.value)


@settings(max_examples=100)
@given(st.data())
def test_any_bytes_are_a_sentencepiece_model_or_refused(data: st.DataObject) -> None:
    encoded = bytearray(spm_bytes(spm_pieces()[255:]))
    for _ in range(data.draw(st.integers(1, 4))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    del encoded[data.draw(st.integers(0, len(encoded))) :]
    try:
        model = parse_sentencepiece("x", bytes(encoded))
    except FormatError:
        return
    assert len(model.pieces) == len(model.scores) == len(model.types)


def test_a_vocabulary_without_every_byte_would_abort_llama_cpp(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", write_spm)
    pieces = [piece for piece in spm_pieces() if piece[0] != "<0x41>"]
    (folder / "tokenizer.model").write_bytes(spm_bytes(pieces))
    with pytest.raises(FormatError, match="no token for the byte 0x41"):
        read(folder)


def test_a_token_that_is_there_twice_would_abort_llama_cpp(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", write_spm)
    write_json(folder / "added_tokens.json", {"hello": 301})
    with pytest.raises(FormatError, match="are both 'hello'"):
        read(folder)


def test_the_same_vocabulary_as_json_merges_in_the_same_order(tmp_path: Path) -> None:
    found = pairs(folder_of(tmp_path / "j", write_spm_json))
    wanted = pairs(folder_of(tmp_path / "p", write_spm))
    for key in wanted:
        if key != "scores":
            assert found[key] == wanted[key], key
    joined = [text for text, _, kind in spm_pieces() if kind == 1 and len(text) > 1]
    by_rank = sorted(
        joined, key=lambda text: -found["scores"][found["tokens"].index(text.encode())]
    )
    assert by_rank == joined


@pytest.mark.parametrize("change", ["a way less", "not in a row"])
def test_merges_that_are_not_those_of_sentencepiece_are_refused(
    tmp_path: Path, change: str
) -> None:
    folder = folder_of(tmp_path / "m", write_spm_json)
    path = folder / "tokenizer.json"
    value = json.loads(path.read_text())
    merges = value["model"]["merges"]
    several = next(m for m in merges if sum(a + b == m[0] + m[1] for a, b in merges) > 1)
    merges.remove(several)
    if change == "not in a row":
        merges.append(several)
    write_json(path, value)
    with pytest.raises(FormatError, match="not those of a SentencePiece model"):
        read(folder)


@pytest.mark.parametrize(
    ("step", "prefix", "said"),
    [
        ({"prepend_scheme": "always"}, True, "only before one"),
        ({"prepend_scheme": "first"}, True, "not behind a control token"),
        ({"prepend_scheme": "never"}, False, None),
        ({"add_prefix_space": False}, False, None),
        ({"add_prefix_space": True}, True, "only before one"),
    ],
)
def test_where_a_space_is_put_before_a_text(
    tmp_path: Path, step: dict[str, Any], prefix: bool, said: str | None
) -> None:
    folder = folder_of(tmp_path / "m", write_spm_json)
    metaspace = {"type": "Metaspace", "replacement": "▁", **step}
    change_json(folder / "tokenizer.json", normalizer=None, pre_tokenizer=metaspace)
    assert pairs(folder)["add_space_prefix"] is prefix
    notes = read(folder).notes
    assert (said in notes[0]) if said else not notes


# -- byte-level BPE -------------------------------------------------------------------------------


def test_byte_level_tokens_types_and_merges(tmp_path: Path) -> None:
    found = pairs(folder_of(tmp_path / "m", write_bpe))
    assert (found["model"], found["pre"]) == ("gpt2", "qwen2")
    tokens = dict(zip(found["tokens"], found["token_type"], strict=True))
    assert len(tokens) == 320
    assert tokens[b"hello"] == tokens["Ġthe".encode()] == tokens[b"!"] == 1
    assert tokens[b"<|im_end|>"] == tokens[b"<|endoftext|>"] == 3
    assert tokens[b"<tool_call>"] == 4 and tokens[b"[PAD319]"] == 5
    assert found["merges"] == ["h e", "l l", "he ll", "hell o", "Ġ t", "Ġt he"]
    assert found["tokens"][found["eos_token_id"]] == b"<|im_end|>"
    assert found["tokens"][found["padding_token_id"]] == b"<|endoftext|>"
    assert found["eot_token_id"] == found["eos_token_id"]
    assert found["add_bos_token"] is False
    assert "scores" not in found and "add_space_prefix" not in found
    assert "NFC" in read(tmp_path / "m").notes[0]


@pytest.mark.parametrize(
    ("steps", "ignore_merges", "name"),
    [
        (llama3_steps(), True, "llama-bpe"),
        (llama3_steps(), False, "dbrx"),
        (qwen2_steps(), False, "qwen2"),
        (qwen2_steps(), True, None),
        (split_steps("\\p{L}+"), False, None),
        (
            split_steps(
                "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}"
                "\\p{M}]+|[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]+[\\p{Ll}"
                "\\p{Lm}\\p{Lo}\\p{M}]*|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|"
                "\\s+(?!\\S)|\\s+"
            ),
            True,
            "tekken",
        ),
        ({"type": "ByteLevel", "add_prefix_space": False}, False, "gpt-2"),
        ({"type": "ByteLevel", "add_prefix_space": True}, False, None),
        (
            {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Digits", "individual_digits": True},
                    {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
                ],
            },
            False,
            "smollm",
        ),
        ({"type": "Sequence", "pretokenizers": 3}, False, None),
        ({"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}]}, False, None),
        (3, False, None),
    ],
)
def test_names_of_pretokenizers(steps: Any, ignore_merges: bool, name: str | None) -> None:
    tree = {"pre_tokenizer": steps, "model": {"ignore_merges": ignore_merges}}
    assert pretokenizer_name(tree) == name


def test_an_unknown_pretokenizer_needs_a_name(tmp_path: Path) -> None:
    folder = folder_of(
        tmp_path / "m", lambda path: write_bpe(path, pre_tokenizer=split_steps("\\p{L}+"))
    )
    with pytest.raises(FormatError, match=r"split by Split\(\\p\{L\}\+, Isolated\)") as info:
        read(folder)
    assert "--pre" in info.value.hint
    assert read(folder, pre="gpt-4o").pairs["tokenizer.ggml.pre"] == "gpt-4o"
    with pytest.raises(FormatError, match="which has no pre-tokenizer"):
        read(folder_of(tmp_path / "s", write_spm), pre="qwen2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"type": "Unigram"}}, "of the type 'Unigram', not BPE"),
        ({"model": 3}, "'model' is 3, not an object"),
        ({"model": None}, "'model' is missing"),
        ({"model": {"vocab": {"a": 0, "b": 0}}}, "the tokens 'a' and 'b' have the id 0"),
        ({"model": {"vocab": {"a": -1}}}, r"vocab\['a'\].* is -1"),
        ({"model": {"vocab": {"a": 0}, "merges": ["a b"]}}, "makes 'ab', which is no token"),
        ({"model": {"vocab": {"a": 0}, "merges": ["ab"]}}, "not a pair of tokens"),
        ({"model": {"vocab": {"a": 0}, "merges": [["a", " b"]]}}, "free of spaces"),
        ({"model": {"vocab": {"a": 0}, "merges": 3}}, "'model.merges' is 3, not an array"),
        ({"model": {"vocab": {"a": 0}, "merges": []}}, "'model.merges' is empty"),
        ({"model": {"vocab": {}, "end_of_word_suffix": "</w>"}}, "end_of_word_suffix"),
        ({"normalizer": {"type": "Lowercase"}}, "the normalizer 'Lowercase'"),
        ({"added_tokens": [{"id": 3}]}, r"'added_tokens\[0\].content' is missing"),
        ({"added_tokens": [{"id": -3, "content": "a"}]}, r"'added_tokens\[0\].id' is -3"),
        ({"added_tokens": {}}, "'added_tokens' is a dict, not an array"),
        ({"added_tokens": [3]}, r"'added_tokens\[0\]' is 3, not an object"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "neither byte-level nor has it bytes"),
    ],
)
def test_files_that_are_no_tokenizer_for_llama_cpp(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = folder_of(tmp_path / "m", write_bpe)
    change_json(folder / "tokenizer.json", **change)
    with pytest.raises(FormatError, match=message) as info:
        read(folder)
    assert "tokenizer.json" in str(info.value)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", lambda path: None)
    with pytest.raises(FormatError, match=r"has neither tokenizer\.json nor tokenizer\.model"):
        read(folder)


# -- special tokens and templates -----------------------------------------------------------------


def test_what_ends_a_text(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", write_bpe)
    ids = {t: i for i, t in enumerate(pairs(folder)["tokens"])}
    end, turn, start = ids[b"<|endoftext|>"], ids[b"<|im_end|>"], ids[b"<|im_start|>"]
    write_json(folder / "generation_config.json", {"eos_token_id": [end, turn, start, 9999]})
    found = pairs(folder)
    assert (found["eos_token_id"], found["eot_token_id"]) == (turn, turn)
    assert found["eom_token_id"] == end
    assert f"[{start}]" in read(folder).notes[-1]
    change_json(folder / "tokenizer_config.json", eos_token=None)
    assert pairs(folder)["eos_token_id"] == end


def test_where_the_first_token_comes_from(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", write_bpe)
    change_json(folder / "tokenizer_config.json", add_bos_token=None, bos_token="<|im_start|>")
    assert pairs(folder)["add_bos_token"] is False
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|im_start|>"}}, {"Sequence": {"id": "A"}}],
    }
    sequence = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, template]}
    for post_processor in (template, sequence):
        change_json(folder / "tokenizer.json", post_processor=post_processor)
        assert pairs(folder)["add_bos_token"] is True
    change_json(folder / "tokenizer_config.json", add_bos_token=False)
    assert pairs(folder)["add_bos_token"] is False
    change_json(folder / "tokenizer_config.json", add_bos_token=True, bos_token=None)
    write_json(folder / "config.json", {"bos_token_id": None})
    assert "bos_token_id" not in pairs(folder)
    assert pairs(folder)["add_bos_token"] is False  # llama.cpp would abort


def test_special_tokens_beside_the_settings(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", write_spm)
    write_json(folder / "special_tokens_map.json", {"bos_token": {"content": "hello"}})
    found = pairs(folder)
    assert found["tokens"][found["bos_token_id"]] == b"hello"


def test_chat_templates(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "m", write_spm)
    assert not any("chat_template" in key for key in pairs(folder))
    write_json(folder / "chat_template.json", {"chat_template": "oldest"})
    assert pairs(folder)["chat_template"] == "oldest"
    change_json(folder / "tokenizer_config.json", chat_template="in the settings")
    assert pairs(folder)["chat_template"] == "in the settings"
    several = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    change_json(folder / "tokenizer_config.json", chat_template=several)
    found = pairs(folder)
    assert (found["chat_template"], found["chat_template.tool_use"]) == ("a", "b")
    (folder / "chat_template.jinja").write_text("{{ messages }}ü", encoding="utf-8")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("c")
    found = pairs(folder)
    assert found["chat_template"] == "{{ messages }}ü"
    assert found["chat_templates"] == ["rag", "tool_use"] and found["chat_template.rag"] == "c"
    change_json(folder / "tokenizer_config.json", chat_template=3)
    with pytest.raises(FormatError, match="'chat_template' is 3"):
        read(folder)
    change_json(folder / "tokenizer_config.json", chat_template=[{"name": "x"}])
    with pytest.raises(FormatError, match=r"'chat_template\[0\].template' is missing"):
        read(folder)


@pytest.mark.parametrize("decoder", [{"x": {}}, {"1": 3}, {"99999999999": {"content": "a"}}])
def test_added_tokens_that_make_no_sense(tmp_path: Path, decoder: dict[str, Any]) -> None:
    folder = folder_of(tmp_path / "m", write_spm)
    write_json(folder / "tokenizer_config.json", {"added_tokens_decoder": decoder})
    with pytest.raises(FormatError, match="added_tokens_decoder"):
        read(folder)
