"""The tokenizer of a model folder as GGUF metadata.

Joins what tokenizer.json or tokenizer.model say with the added tokens, the special ones and the
chat template, which lie in files of their own. Pads the vocabulary to the rows of the embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nexus_ext.errors import FormatError
from nexus_ext.formats.gguf_encode import Value
from nexus_ext.formats.hf.bpe import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    AddedToken,
    Bpe,
    read_bpe,
    scores_of_merges,
    token_type,
)
from nexus_ext.formats.hf.folder import MAX_TOKENIZER_NBYTES, HfFolder, JsonObject
from nexus_ext.formats.hf.sentencepiece import SentencePieceModel, parse_sentencepiece

_JSON, _PIECES = "tokenizer.json", "tokenizer.model"
_PADDING_SCORE = -10000.0
# Tokens that end a turn; the names are those that llama.cpp itself looks for.
_END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>")
_END_OF_MESSAGE = ("<|eom_id|>",)
_TEMPLATE_FILE, _TEMPLATES_FOLDER = "chat_template.jinja", "additional_chat_templates"
_MAX_ADDED = 1 << 21


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """GGUF metadata of a tokenizer, and what should be said of it."""

    pairs: dict[str, Value]
    kind: str  # "SentencePiece" or "byte-level BPE", with the file that it is from
    notes: tuple[str, ...]


@dataclass(slots=True)
class _Table:
    """The vocabulary while it is put together."""

    texts: dict[int, bytes]
    types: dict[int, int]
    scores: dict[int, float]


def read_tokenizer(
    folder: HfFolder, n_vocab: int, config: JsonObject, pre: str | None = None
) -> Tokenizer:
    """Read the tokenizer of `folder` for an embedding of `n_vocab` rows.

    `pre` names llama.cpp's pre-tokenizer where the files do not tell. FormatError for tokenizers
    that llama.cpp cannot compute.
    """
    settings = folder.read_json_if_there("tokenizer_config.json")
    special_map = folder.read_json_if_there("special_tokens_map.json")
    notes: list[str] = []
    bpe: Bpe | None = None
    pieces: SentencePieceModel | None = None
    if folder.has(_JSON):
        tokenizer = folder.read_json(_JSON, MAX_TOKENIZER_NBYTES)
        # Of a SentencePiece model the original file is the better source.
        if not folder.has(_PIECES) or _is_byte_level(tokenizer):
            bpe = read_bpe(tokenizer, pre)
            notes += bpe.notes
    if bpe is None:
        if not folder.has(_PIECES):
            raise FormatError(
                f"{folder.path}: has neither {_JSON} nor {_PIECES}",
                hint="Load the tokenizer with transformers and save_pretrained() it here.",
            )
        pieces = parse_sentencepiece(
            folder.join(_PIECES), folder.read_bytes(_PIECES, MAX_TOKENIZER_NBYTES)
        )
        if pieces.normalizer not in ("", "identity"):
            notes.append(
                f"the tokenizer normalizes texts by {pieces.normalizer!r}; llama.cpp does not, so "
                "unusual characters get other tokens"
            )
    if pre is not None and (bpe is None or not bpe.byte_level):
        raise FormatError(
            f"{folder.path}: the tokenizer is SentencePiece, which has no pre-tokenizer",
            hint="Leave --pre out.",
        )
    table = _table_of_bpe(bpe) if bpe else _table_of_pieces(pieces)
    added = {**(bpe.added if bpe else {}), **_added_tokens(folder, settings)}
    _put_added(table, added)
    _fit(table, n_vocab, notes)
    spm = bpe is None or not bpe.byte_level
    ids = _ids(folder, table, n_vocab, needs_bytes=spm)
    special = _Special(settings, special_map, folder, config, ids, n_vocab, notes)
    roles = special.find(pieces, bpe)
    pairs: dict[str, Value] = {}
    pairs["tokenizer.ggml.model"] = "llama" if spm else "gpt2"
    pairs["tokenizer.ggml.pre"] = "default" if bpe is None else bpe.pre
    pairs["tokenizer.ggml.tokens"] = [table.texts[i] for i in range(n_vocab)]
    if spm:
        pairs["tokenizer.ggml.scores"] = [table.scores[i] for i in range(n_vocab)]
    pairs["tokenizer.ggml.token_type"] = [table.types[i] for i in range(n_vocab)]
    if bpe and bpe.byte_level:
        pairs["tokenizer.ggml.merges"] = [f"{left} {right}" for left, right in bpe.merges]
    pairs.update({f"tokenizer.ggml.{role}_token_id": index for role, index in roles.items()})
    if spm:
        prefix = bpe.space_prefix if bpe else pieces is None or pieces.add_space_prefix
        given = settings.value.get("add_prefix_space")
        pairs["tokenizer.ggml.add_space_prefix"] = given if isinstance(given, bool) else prefix
    pairs["tokenizer.ggml.add_bos_token"] = special.adds("bos", roles, bpe, default=spm)
    pairs["tokenizer.ggml.add_eos_token"] = special.adds("eos", roles, bpe, default=False)
    pairs.update(_chat_templates(folder, settings))
    kind = "SentencePiece" if spm else f"byte-level BPE ({pairs['tokenizer.ggml.pre']!s})"
    return Tokenizer(pairs, f"{kind} from {_JSON if bpe else _PIECES}", tuple(notes))


def _is_byte_level(tokenizer: JsonObject) -> bool:
    from nexus_ext.formats.hf.pretokenizers import is_byte_level

    return is_byte_level(tokenizer.value)


def _table_of_bpe(bpe: Bpe) -> _Table:
    scores = {} if bpe.byte_level else scores_of_merges(bpe)
    return _Table(
        texts={index: text.encode() for index, text in bpe.vocabulary.items()},
        types={index: token_type(bpe, text) for index, text in bpe.vocabulary.items()},
        scores={index: scores.get(text, 0.0) for index, text in bpe.vocabulary.items()},
    )


def _table_of_pieces(pieces: SentencePieceModel | None) -> _Table:
    assert pieces is not None
    return _Table(
        texts=dict(enumerate(pieces.pieces)),
        types=dict(enumerate(pieces.types)),
        scores=dict(enumerate(pieces.scores)),
    )


def _added_tokens(folder: HfFolder, settings: JsonObject) -> dict[int, AddedToken]:
    """Return the added tokens that lie beside tokenizer.json and tokenizer.model."""
    added: dict[int, AddedToken] = {}
    beside = folder.read_json_if_there("added_tokens.json")
    for text in beside.value:
        added[beside.integer(text, 0, _MAX_ADDED)] = AddedToken(text, False)
    decoder = settings.object_or_empty("added_tokens_decoder")
    for key in decoder.value:
        if not (key.isascii() and key.isdigit()) or int(key) > _MAX_ADDED:
            raise settings.error("added_tokens_decoder", key, "a map from token ids")
        token = decoder.object(key)
        added[int(key)] = AddedToken(token.text("content"), token.flag("special", False))
    return added


def _looks_special(text: str) -> bool:
    """Whether a token that is not marked as special is one by its look."""
    pairs = (("<|", "|>"), ("<｜", "｜>"))
    return text in ("<pad>", "<mask>") or any(
        text.startswith(start) and text.endswith(end) for start, end in pairs
    )


def _put_added(table: _Table, added: Mapping[int, AddedToken]) -> None:
    """Enter added tokens, but for those that have a special type already."""
    for index, token in added.items():
        text = token.text
        known = table.types.get(index, NORMAL)
        if known in (UNKNOWN, CONTROL) and table.texts[index] == text.encode():
            continue
        if token.special or _looks_special(text):
            table.types[index] = CONTROL
        else:
            # llama.cpp looks for these in the text before it writes spaces otherwise.
            text = text.replace("▁", " ")
            table.types[index] = USER_DEFINED
        table.texts[index] = text.encode()
        table.scores[index] = table.scores.get(index, -1000.0)


def _fit(table: _Table, n_vocab: int, notes: list[str]) -> None:
    """Give every row of the embedding a token, and drop tokens without one."""
    beyond = sorted(index for index in table.texts if index >= n_vocab)
    if beyond:
        names = ", ".join(repr(table.texts[i].decode("utf-8", "replace")) for i in beyond[:3])
        notes.append(
            f"{len(beyond)} tokens have no row in the embedding ({n_vocab} rows) and are left out: "
            f"{names}{', ...' if len(beyond) > 3 else ''}"
        )
    for index in range(n_vocab):
        if index not in table.texts:
            table.texts[index] = f"[PAD{index}]".encode()
            table.types[index] = UNUSED
            table.scores[index] = _PADDING_SCORE


def _ids(folder: HfFolder, table: _Table, n_vocab: int, *, needs_bytes: bool) -> dict[bytes, int]:
    """Return the id of every token. FormatError for a table on which llama.cpp would abort."""
    ids: dict[bytes, int] = {}
    for index in range(n_vocab):
        text = table.texts[index]
        if not text:
            raise FormatError(f"{folder.path}: the token {index} is empty")
        before = ids.setdefault(text, index)
        if before != index:
            raise FormatError(
                f"{folder.path}: the tokens {before} and {index} are both "
                f"{text.decode('utf-8', 'replace')!r}"
            )
    if needs_bytes:
        missing = [b for b in range(256) if f"<0x{b:02X}>".encode() not in ids]
        if missing:
            raise FormatError(
                f"{folder.path}: the tokenizer has no token for the byte 0x{missing[0]:02X}; "
                "llama.cpp needs all 256 of them"
            )
    return ids


class _Special:
    """Tokens with a role: where a text starts and ends, what fills, what is unknown."""

    def __init__(
        self,
        settings: JsonObject,
        special_map: JsonObject,
        folder: HfFolder,
        config: JsonObject,
        ids: Mapping[bytes, int],
        n_vocab: int,
        notes: list[str],
    ) -> None:
        self._settings, self._map, self._config = settings, special_map, config
        self._generation = folder.read_json_if_there("generation_config.json")
        self._ids, self._n_vocab, self._notes = ids, n_vocab, notes

    def find(self, pieces: SentencePieceModel | None, bpe: Bpe | None) -> dict[str, int]:
        """Return the ids by the role's name in GGUF."""
        found: dict[str, int] = {}
        for role, ggml in (("bos", "bos"), ("unk", "unknown"), ("pad", "padding")):
            index = self._by_text(role)
            if index is None and role == "bos":
                index = next(iter(self._numbers("bos_token_id")), None)
            if index is None and role == "unk" and bpe and bpe.unknown is not None:
                index = self._ids.get(bpe.unknown.encode())
            if index is None and pieces:
                index = self._in_range(getattr(pieces, f"{role}_id"))
            if index is not None:
                found[ggml] = index
        found.update(self._ends(pieces))
        return found

    def adds(self, role: str, roles: Mapping[str, int], bpe: Bpe | None, *, default: bool) -> bool:
        """Whether texts get the token of `role` ("bos" or "eos") when they are tokenized."""
        if role not in roles:
            return False  # llama.cpp would abort the process
        said = self._settings.value.get(f"add_{role}_token")
        if isinstance(said, bool):
            return said
        if bpe and bpe.templated:
            name = bpe.first if role == "bos" else bpe.last
            return name is not None and self._ids.get(name.encode()) == roles[role]
        return default

    def _ends(self, pieces: SentencePieceModel | None) -> dict[str, int]:
        numbers = self._numbers("eos_token_id")
        eos = self._by_text("eos")
        if eos is None and numbers:
            eos = numbers[0]
        if eos is None and pieces:
            eos = self._in_range(pieces.eos_id)
        if eos is None:
            return {}
        found = {"eos": eos}
        others = [number for number in numbers if number != eos]
        for role, names in (("eot", _END_OF_TURN), ("eom", _END_OF_MESSAGE)):
            known = [self._ids.get(name.encode()) for name in names]
            named = next((n for n in [eos, *others] if n in known), None)
            if named is not None:
                found[role] = named
        left = [number for number in others if number not in found.values()]
        for role in ("eot", "eom"):
            if left and role not in found:
                found[role] = left.pop(0)
        if left:
            self._notes.append(
                f"generation also ends at the tokens {left}; llama.cpp stops there only where it "
                "knows them by name"
            )
        return found

    def _by_text(self, role: str) -> int | None:
        for source in (self._settings, self._map):
            value: Any = source.value.get(f"{role}_token")
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str) and text.encode() in self._ids:
                return self._ids[text.encode()]
        return None

    def _numbers(self, key: str) -> list[int]:
        for source in (self._generation, self._config):
            value: Any = source.value.get(key)
            listed = value if isinstance(value, list) else [value]
            numbers = [n for n in listed if type(n) is int and 0 <= n < self._n_vocab]
            if numbers:
                return numbers
        return []

    def _in_range(self, number: int) -> int | None:
        return number if 0 <= number < self._n_vocab else None


def _chat_templates(folder: HfFolder, settings: JsonObject) -> dict[str, Value]:
    """Return the chat templates, the default one first."""
    templates: dict[str, str] = {}
    given = settings.value.get("chat_template")
    if isinstance(given, str):
        templates["default"] = given
    elif isinstance(given, list):
        for index in range(len(given)):
            entry = JsonObject(settings.path, given[index], f"chat_template[{index}]")
            templates[entry.text("name")] = entry.text("template")
    elif given is not None:
        raise settings.error("chat_template", given, "a text or a list")
    if not templates and folder.has("chat_template.json"):
        templates["default"] = folder.read_json("chat_template.json").text("chat_template")
    if folder.has(_TEMPLATE_FILE):
        templates["default"] = folder.read_text(_TEMPLATE_FILE)
    for name in folder.names(_TEMPLATES_FOLDER, ".jinja"):
        templates[name] = folder.read_text(f"{_TEMPLATES_FOLDER}/{name}.jinja")
    pairs: dict[str, Value] = {}
    default = templates.pop("default", None)
    if default is not None:
        pairs["tokenizer.chat_template"] = default
    if templates:
        pairs["tokenizer.chat_templates"] = sorted(templates)
        pairs.update({f"tokenizer.chat_template.{n}": t for n, t in sorted(templates.items())})
    return pairs
