"""Which of llama.cpp's pre-tokenizers splits texts as a tokenizer.json says.

llama.cpp knows pre-tokenizers by name and has their expressions built in. The names are found here
by the expressions in tokenizer.json themselves, not by a hash of what they do to a sample text.
"""

from __future__ import annotations

from typing import Any

# Expressions as they stand in tokenizer.json.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{{0}}|"
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{{0}}|"
)
_CASED_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_QWEN2 = _WORDS + r"\p{N}" + _REST
_LLAMA3 = _WORDS + r"\p{N}{1,3}" + _REST
_TEKKEN = _CASED.replace("{0}", "") + r"\p{N}" + _CASED_REST
_GPT4O = _CASED.replace("{0}", _CONTRACTION) + r"\p{N}{1,3}" + _CASED_REST

Step = tuple[str, ...]
_BYTES: Step = ("ByteLevel", "plain")
_BYTES_GPT2: Step = ("ByteLevel", "gpt2")


def _split(pattern: str, behavior: str = "Isolated") -> Step:
    return ("Split", pattern, behavior)


# (steps, whether a word that is a token as a whole is taken without merging) -> name
_NAMES: dict[tuple[tuple[Step, ...], bool], str] = {
    ((_split(_LLAMA3), _BYTES), True): "llama-bpe",
    ((_split(_LLAMA3), _BYTES), False): "dbrx",
    ((_split(_QWEN2), _BYTES), False): "qwen2",
    ((_split(_TEKKEN), _BYTES), True): "tekken",
    ((_split(_GPT4O), _BYTES), False): "gpt-4o",
    ((("Digits", "each"), _BYTES_GPT2), False): "smollm",
    ((_BYTES_GPT2,), False): "gpt-2",
}
# What llama.cpp 0c1e570 accepts and this table can answer, or a user can ask for.
KNOWN_NAMES = tuple(sorted({*_NAMES.values(), "default"}))


def pretokenizer_name(tokenizer: Any) -> str | None:
    """Return the name for the tree of a tokenizer.json, None if llama.cpp has none that is known.

    Texts must be split by the same expressions in the same order, into the bytes that GPT-2
    writes as letters.
    """
    steps = _steps(tokenizer.get("pre_tokenizer"))
    model = tokenizer.get("model")
    ignore_merges = bool(isinstance(model, dict) and model.get("ignore_merges"))
    return None if steps is None else _NAMES.get((steps, ignore_merges))


def is_byte_level(tokenizer: Any) -> bool:
    """Whether tokens are written in GPT-2's letters for bytes."""
    steps = tokenizer.get("pre_tokenizer")
    listed = steps.get("pretokenizers") if isinstance(steps, dict) else None
    every = listed if isinstance(listed, list) else [steps]
    return any(isinstance(step, dict) and step.get("type") == "ByteLevel" for step in every)


def describe(tokenizer: Any) -> str:
    """Return the steps of a tokenizer.json in short, for a message."""
    steps = _steps(tokenizer.get("pre_tokenizer"))
    if steps is None:
        return "steps of an unknown kind"
    texts = [f"{step[0]}({', '.join(step[1:])})" for step in steps]
    text = ", ".join(texts) or "none"
    return text if len(text) <= 200 else text[:197] + "..."


def _steps(value: Any) -> tuple[Step, ...] | None:
    """Return the steps in a form that can be looked up, None for what llama.cpp has not."""
    if value is None:
        return ()
    if not isinstance(value, dict):
        return None
    kind = value.get("type")
    if kind == "Sequence":
        listed = value.get("pretokenizers")
        if not isinstance(listed, list):
            return None
        inner = [_steps(item) for item in listed if not isinstance(item, list)]
        if len(inner) != len(listed) or None in inner:
            return None
        return tuple(step for steps in inner if steps is not None for step in steps)
    if kind == "ByteLevel":
        if value.get("add_prefix_space", True):
            return None
        return (_BYTES_GPT2 if value.get("use_regex", True) else _BYTES,)
    if kind == "Digits" and value.get("individual_digits") is True:
        return (("Digits", "each"),)
    if kind == "Split" and not value.get("invert"):
        pattern, behavior = value.get("pattern"), value.get("behavior")
        if isinstance(pattern, dict) and isinstance(behavior, str):
            text = pattern.get("Regex", pattern.get("String"))
            if isinstance(text, str):
                # Some files have the characters themselves, some their escapes.
                text = text.replace("\r", r"\r").replace("\n", r"\n")
                return (_split(text, behavior),)
    return None
