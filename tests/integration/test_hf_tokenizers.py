"""llama.cpp tokenizes with a converted tokenizer as the library does that the tokenizer is from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nexus_ext.formats.hf import HfConversion
from tests.hf_tokenizers import N_VOCAB, SAMPLES, train_bpe, train_sentencepiece
from tests.synth.hf import HfDims, write_hf

DIMS = HfDims(n_layers=1, n_vocab=N_VOCAB)


def vocabulary(folder: Path, **options: Any) -> Any:
    import llama_cpp

    out = folder.with_suffix(".gguf")
    HfConversion(folder, **options).write(out)
    return llama_cpp.Llama(str(out), vocab_only=True, verbose=False)


def folder_without_tokenizer(path: Path) -> Path:
    write_hf(path, "qwen2", dims=DIMS)
    (path / "tokenizer.model").unlink()
    return path


@pytest.mark.parametrize("kind", ["llama-bpe", "qwen2"])
def test_byte_level_bpe(tmp_path: Path, kind: str) -> None:
    folder = folder_without_tokenizer(tmp_path / "m")
    theirs = train_bpe(folder, kind)
    ours = vocabulary(folder)
    for text in SAMPLES:
        wanted = theirs.encode(text).ids
        assert ours.tokenize(text.encode(), add_bos=True, special=True) == wanted, text
    ours.close()


def test_sentencepiece(tmp_path: Path) -> None:
    folder = folder_without_tokenizer(tmp_path / "m")
    theirs = train_sentencepiece(folder)
    ours = vocabulary(folder)
    for text in SAMPLES:
        if "<s>" in text:
            continue  # SentencePiece itself knows no control tokens in texts
        wanted = theirs.encode(text, add_bos=True)
        assert ours.tokenize(text.encode(), add_bos=True, special=True) == wanted, text
    ours.close()


def test_sentencepiece_as_transformers_saves_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="test-hf is not installed")
    first = folder_without_tokenizer(tmp_path / "first")
    train_sentencepiece(first)
    folder = folder_without_tokenizer(tmp_path / "m")
    theirs = transformers.LlamaTokenizer.from_pretrained(str(first), legacy=True)
    theirs.save_pretrained(str(folder))
    assert (folder / "tokenizer.json").exists() and not (folder / "tokenizer.model").exists()
    # Here transformers 5 is not SentencePiece, which puts a space before these texts, too.
    (note,) = HfConversion(folder).report.notes
    assert "does not start with a space" in note
    ours = vocabulary(folder)
    for text in SAMPLES:
        if not text.startswith(" "):
            wanted = theirs.encode(text)
            assert ours.tokenize(text.encode(), add_bos=True, special=True) == wanted, text
    ours.close()
