"""Read the BPE of a tokenizer.json: tokens, merges, and whether llama.cpp can compute the same.

Two kinds exist. Byte-level BPE writes bytes as GPT-2's letters; llama.cpp runs its merges by rank
behind a pre-tokenizer. BPE over characters with bytes as a fallback is what SentencePiece models
become in this format; llama.cpp merges those by the score of the result.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from nexus_ext.errors import FormatError
from nexus_ext.formats.hf.folder import JsonObject
from nexus_ext.formats.hf.pretokenizers import describe, is_byte_level, pretokenizer_name

_MAX_TOKENS = 1 << 21
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "▁"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that is found in texts before anything is split."""

    text: str
    special: bool


@dataclass(frozen=True, slots=True)
class Bpe:
    """The tokenizer of a tokenizer.json."""

    byte_level: bool
    vocabulary: dict[int, str]
    merges: tuple[tuple[str, str], ...]
    unknown: str | None
    added: dict[int, AddedToken]
    first: str | None  # the special token that a text starts with
    last: str | None
    templated: bool  # whether first and last are known at all
    space_prefix: bool
    pre: str  # name of llama.cpp's pre-tokenizer
    notes: tuple[str, ...]


def read_bpe(tokenizer: JsonObject, pre: str | None = None) -> Bpe:
    """Read a tokenizer.json; `pre` names the pre-tokenizer instead of what the file says.

    FormatError for other kinds of tokenizers, and when llama.cpp would tokenize differently.
    """
    path = tokenizer.path
    model = tokenizer.object("model")
    kind = model.text("type", "BPE")
    if kind != "BPE":
        raise FormatError(
            f"{path}: the tokenizer is of the type {kind!r}, not BPE",
            hint="Put the tokenizer.model of the model into the folder, if it has one.",
        )
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.value.get(key):
            raise model.error(key, model.value[key], "empty, which llama.cpp assumes")
    vocabulary = _vocabulary(model)
    merges = _merges(model, set(vocabulary.values()))
    unknown = model.value.get("unk_token")
    byte_level = is_byte_level(tokenizer.value)
    notes: list[str] = []
    if byte_level and not merges:
        raise FormatError(f"{path}: 'model.merges' is empty, which llama.cpp refuses")
    if byte_level:
        name = pre or _known_pretokenizer(tokenizer)
        _note_normalizer(tokenizer, notes)
    else:
        if not model.flag("byte_fallback", False):
            raise FormatError(
                f"{path}: the BPE is neither byte-level nor has it bytes as a fallback, which "
                "llama.cpp cannot compute"
            )
        name = "default"
        _check_scores_can_do(path, merges, set(vocabulary.values()))
    space_prefix = not byte_level and _space_prefix(tokenizer, notes)
    first, last, templated = _template(tokenizer)
    return Bpe(
        byte_level=byte_level,
        vocabulary=vocabulary,
        merges=merges,
        unknown=unknown if isinstance(unknown, str) else None,
        added=_added(tokenizer),
        first=first,
        last=last,
        templated=templated,
        space_prefix=space_prefix,
        pre=name,
        notes=tuple(notes),
    )


def scores_of_merges(bpe: Bpe) -> dict[str, float]:
    """Return what SentencePiece would call the scores: the earlier the merge, the higher."""
    scores: dict[str, float] = {}
    for rank, (left, right) in enumerate(bpe.merges):
        scores.setdefault(left + right, -float(rank + 1))
    return scores


def token_type(bpe: Bpe, text: str) -> int:
    """Return ggml's type of a token of the vocabulary that is not an added one."""
    if not bpe.byte_level and _BYTE_TOKEN.fullmatch(text):
        return BYTE
    return UNKNOWN if text == bpe.unknown and not bpe.byte_level else NORMAL


def _vocabulary(model: JsonObject) -> dict[int, str]:
    entries = model.object("vocab").value
    vocabulary: dict[int, str] = {}
    for text, index in entries.items():
        if type(index) is not int or not 0 <= index < _MAX_TOKENS:
            raise model.error(f"vocab[{text!r}]", index, f"an integer below {_MAX_TOKENS}")
        if index in vocabulary:
            raise FormatError(
                f"{model.path}: the tokens {vocabulary[index]!r} and {text!r} have the id {index}"
            )
        vocabulary[index] = text
    return vocabulary


def _merges(model: JsonObject, tokens: set[str]) -> tuple[tuple[str, str], ...]:
    merges = []
    for index, entry in enumerate(model.array("merges")):
        pair = entry.split(" ") if isinstance(entry, str) else entry
        if not (
            isinstance(pair, list)
            and len(pair) == 2
            and all(isinstance(part, str) and part for part in pair)
        ):
            raise model.error(f"merges[{index}]", entry, "a pair of tokens")
        left, right = pair
        if " " in left or " " in right:
            raise model.error(f"merges[{index}]", entry, "free of spaces, which GGUF cannot hold")
        if left + right not in tokens:
            raise FormatError(
                f"{model.path}: merges[{index}] makes {left + right!r}, which is no token"
            )
        merges.append((left, right))
    return tuple(merges)


def _added(tokenizer: JsonObject) -> dict[int, AddedToken]:
    added: dict[int, AddedToken] = {}
    for index, entry in enumerate(tokenizer.array("added_tokens")):
        token = JsonObject(tokenizer.path, entry, f"added_tokens[{index}]")
        number = token.integer("id", 0, _MAX_TOKENS)
        added[number] = AddedToken(token.text("content"), token.flag("special", False))
    return added


def _known_pretokenizer(tokenizer: JsonObject) -> str:
    name = pretokenizer_name(tokenizer.value)
    if name is None:
        raise FormatError(
            f"{tokenizer.path}: texts are split by {describe(tokenizer.value)}, for which "
            "llama.cpp has no pre-tokenizer that is known here",
            hint="If you know its name in llama.cpp, pass it with --pre.",
        )
    return name


def _note_normalizer(tokenizer: JsonObject, notes: list[str]) -> None:
    normalizer = tokenizer.object_or_empty("normalizer").value
    kind = normalizer.get("type")
    if kind in (None, "Sequence") and not normalizer.get("normalizers"):
        return
    if kind == "NFC":
        notes.append(
            "the tokenizer composes characters (NFC) before it splits texts; llama.cpp does not, "
            "so text that is not composed gets other tokens"
        )
        return
    raise FormatError(
        f"{tokenizer.path}: the normalizer {kind!r} changes texts in a way that llama.cpp does not"
    )


def _check_scores_can_do(path: str, merges: tuple[tuple[str, str], ...], tokens: set[str]) -> None:
    """Refuse merges that are not those of a SentencePiece model.

    llama.cpp joins any two neighbours that make a token, the best score first. That is the same
    as merging by rank if every split of a token into two tokens is a merge, and the merges that
    make one token follow each other.
    """
    made: set[str] = set()
    current = ""
    for left, right in merges:
        if left + right != current:
            current = left + right
            if current in made:
                break
            made.add(current)
    else:
        known = set(merges)
        if all(
            (text[:cut], text[cut:]) in known
            for text in made
            for cut in range(1, len(text))
            if text[:cut] in tokens and text[cut:] in tokens
        ):
            return
    raise FormatError(
        f"{path}: the merges are not those of a SentencePiece model, so llama.cpp would split "
        "words differently",
        hint="Put the tokenizer.model of the model into the folder, if it has one.",
    )


def _template(tokenizer: JsonObject) -> tuple[str | None, str | None, bool]:
    """Return what stands before and after a single text, and whether that is said."""
    post = tokenizer.object_or_empty("post_processor").value
    steps = post.get("processors") if post.get("type") == "Sequence" else [post]
    for step in steps if isinstance(steps, list) else []:
        if not isinstance(step, dict) or step.get("type") != "TemplateProcessing":
            continue
        single = step.get("single")
        names: list[str | None] = []
        for item in single if isinstance(single, list) else []:
            token = item.get("SpecialToken") if isinstance(item, dict) else None
            name = token.get("id") if isinstance(token, dict) else None
            names.append(name if isinstance(name, str) else None)
        if len(names) > 1:
            return names[0], names[-1], True
        return None, None, True
    return None, None, False


def _space_prefix(tokenizer: JsonObject, notes: list[str]) -> bool:
    """Whether a space is put before a text: by a normalizer, or by the Metaspace step."""

    def steps(value: Any, key: str) -> list[Any]:
        listed = value.get(key) if isinstance(value, dict) else None
        return listed if isinstance(listed, list) else [value]

    for step in steps(tokenizer.value.get("normalizer"), "normalizers"):
        if isinstance(step, dict) and step.get("type") == "Prepend":
            return step.get("prepend") == _SPACE
    for step in steps(tokenizer.value.get("pre_tokenizer"), "pretokenizers"):
        if isinstance(step, dict) and step.get("type") == "Metaspace":
            scheme = step.get("prepend_scheme")
            if scheme == "never" or (not scheme and not step.get("add_prefix_space", True)):
                return False
            notes.append(
                "llama.cpp puts a space before every text, this tokenizer only before one that "
                "does not start with a space"
                + (", and not behind a control token" if scheme == "first" else "")
            )
            return True
    return False
