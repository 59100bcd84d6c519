"""Tokenizers trained by the libraries that models come with, for folders of `tests.synth.hf`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.synth.hf import llama3_steps, qwen2_steps, write_json

N_VOCAB = 416
SAMPLES = (
    "Hello world, 12345 foo\n\n  bar",
    "the model <tool_call> says <|eot_id|>yes <|im_end|>",
    "ünïcode 你好, 🦙🦙 e\u0301",
    "   leading and trailing   ",
    "a  b   c\t\td\r\n\r\ne",
    "I'll've been 'RE it's we'd DON'T",
    'x = [1, 2.5, -3]; print(f"{x!r}")  # 100%',
    "",
    " ",
    "<s>[INST] hi [/INST]</s>",
)
SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|im_end|>")


def corpus() -> list[str]:
    """Text to train on: the documents of this repository."""
    texts = [(ROOT / "README.md").read_text(encoding="utf-8")]
    texts.append((ROOT / "plugins" / "README.md").read_text(encoding="utf-8"))
    return [paragraph for text in texts for paragraph in text.split("\n\n")]


def train_bpe(folder: Path, kind: str) -> Any:
    """Write a byte-level tokenizer.json that splits as `kind` ("llama-bpe" or "qwen2") does."""
    tokenizers = pytest.importorskip("tokenizers", reason="the extra test-hf is not installed")
    model = tokenizers.models.BPE(ignore_merges=kind == "llama-bpe")
    tokenizer = tokenizers.Tokenizer(model)
    steps = {"llama-bpe": llama3_steps, "qwen2": qwen2_steps}[kind]()
    pattern = tokenizers.Regex(steps["pretokenizers"][0]["pattern"]["Regex"])
    pre = tokenizers.pre_tokenizers
    tokenizer.pre_tokenizer = pre.Sequence(
        [pre.Split(pattern, "isolated"), pre.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.add_tokens(["<tool_call>"])
    if kind == "llama-bpe":
        first = SPECIAL[0]
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{first} $A", special_tokens=[(first, tokenizer.token_to_id(first))]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1]}
    write_json(folder / "tokenizer_config.json", settings)
    return tokenizer


def train_sentencepiece(folder: Path) -> Any:
    """Write a tokenizer.model with bytes as a fallback, as Llama has it."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="test-hf is not installed")
    (folder / "corpus.txt").write_text("\n".join(corpus()), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (folder / "corpus.txt").unlink()
    (folder / "tokenizer.vocab").unlink()
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
