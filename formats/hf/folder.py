"""What lies in a model folder of the hub: JSON files, and weights over one file or several.

Everything here comes from others: sizes are limited before anything is read, and each error names
the file. Knows nothing of what configurations and tensors mean.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from typing import Any

from nexus_ext.errors import FormatError, ReadFailed
from nexus_ext.formats.safetensors import StoredTensor, read_safetensors

MAX_CONFIG_NBYTES = 16 << 20
MAX_TOKENIZER_NBYTES = 256 << 20
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_MAX_SHARDS = 10_000
_OTHER_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf", "tf_model.h5")


class HfFolder:
    """A folder on this machine; `read_json` and the like name files in it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        if not os.path.isdir(self.path):
            raise FormatError(f"{self.path}: is not a folder", hint="Name the model's folder.")

    def join(self, name: str) -> str:
        return os.path.join(self.path, name)

    def has(self, name: str) -> bool:
        return os.path.isfile(self.join(name))

    def names(self, subfolder: str, suffix: str) -> list[str]:
        """Return the names in a subfolder that end in `suffix`, without it; none if none."""
        path = self.join(subfolder)
        if not os.path.isdir(path):
            return []
        return sorted(n.removesuffix(suffix) for n in os.listdir(path) if n.endswith(suffix))

    def read_bytes(self, name: str, limit_nbytes: int = MAX_CONFIG_NBYTES) -> bytes:
        """Return a whole file. FormatError if it is missing or too large."""
        path = self.join(name)
        try:
            status = os.stat(path)
            if not stat.S_ISREG(status.st_mode):
                raise FormatError(f"{path}: is not a regular file")
            if status.st_size > limit_nbytes:
                raise FormatError(
                    f"{path}: takes {status.st_size} bytes, the limit is {limit_nbytes}"
                )
            with open(path, "rb") as file:
                return file.read(
                    status.st_size
                )  # not the limit, for which memory would be set aside
        except FileNotFoundError:
            raise FormatError(
                f"{path}: is missing", hint="Download the whole folder of the model."
            ) from None
        except OSError as error:
            raise ReadFailed(
                f"{path}: cannot be read: {error.strerror}", path=path, errno=error.errno or 0
            ) from error

    def read_text(self, name: str) -> str:
        """Return a text in UTF-8."""
        try:
            return self.read_bytes(name).decode("utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(f"{self.join(name)}: is no UTF-8: {error}") from None

    def read_json(self, name: str, limit_nbytes: int = MAX_CONFIG_NBYTES) -> JsonObject:
        """Return the object in a JSON file."""
        data = self.read_bytes(name, limit_nbytes)
        path = self.join(name)
        try:
            value = json.loads(data.decode("utf-8-sig"))
            if b"\\ud" in data or b"\\uD" in data:
                # Escapes can spell half a character, which no file can be written with.
                json.dumps(value, ensure_ascii=False).encode()
        except RecursionError:
            raise FormatError(f"{path}: is nested too deeply") from None
        except ValueError as error:
            raise FormatError(f"{path}: is no valid JSON: {error}") from None
        return JsonObject(path, value)

    def read_json_if_there(self, name: str) -> JsonObject:
        """Return the object in a JSON file, an empty one if there is no such file."""
        return self.read_json(name) if self.has(name) else JsonObject(self.join(name), {})

    def weights(self) -> dict[str, StoredTensor]:
        """Return every tensor by its name. Reads the headers of all shards.

        FormatError when a shard is missing, or when index and shards disagree.
        """
        if self.has(_INDEX):
            return self._sharded(self.read_json(_INDEX, MAX_TOKENIZER_NBYTES))
        if self.has(_SINGLE):
            return dict(read_safetensors(self.join(_SINGLE)).tensors)
        others = [name for name in _OTHER_WEIGHTS if self.has(name)]
        raise FormatError(
            f"{self.path}: has neither {_SINGLE} nor {_INDEX}"
            + (f", only {', '.join(others)}" if others else ""),
            hint="Only weights in safetensors are read: a pickle could run code.",
        )

    def _sharded(self, index: JsonObject) -> dict[str, StoredTensor]:
        placed = index.object("weight_map")
        shards: dict[str, None] = {}
        for name, shard in placed.value.items():
            if not isinstance(shard, str) or os.path.basename(shard) != shard or not shard:
                raise index.error(f"weight_map[{name!r}]", shard, "the name of a file beside it")
            shards[shard] = None
        if not 1 <= len(shards) <= _MAX_SHARDS:
            raise index.error("weight_map", len(shards), f"a map to 1 to {_MAX_SHARDS} files")
        missing = [shard for shard in shards if not self.has(shard)]
        if missing:
            raise FormatError(
                f"{self.path}: {len(missing)} of {len(shards)} shards are missing, the first is "
                f"{missing[0]}",
                hint="Download the missing files into the same folder.",
            )
        found: dict[str, StoredTensor] = {}
        for shard in sorted(shards):
            for name, tensor in read_safetensors(self.join(shard)).tensors.items():
                if name in found:
                    raise FormatError(
                        f"{tensor.path}: the tensor {name!r} is already in {found[name].path}"
                    )
                found[name] = tensor
        for name, shard in placed.value.items():
            if name not in found or os.path.basename(found[name].path) != shard:
                raise FormatError(
                    f"{index.path}: says that {name!r} is in {shard}, which does not have it",
                    hint="Index and shards are of different models: download them again.",
                )
        return found


class JsonObject:
    """An object of an untrusted file: values are asked for with the type that they must have."""

    def __init__(self, path: str, value: object, prefix: str = "") -> None:
        if not isinstance(value, dict):
            what = f"{prefix!r} is" if prefix else "is"
            raise FormatError(f"{path}: {what} {_short(value)}, not an object")
        self.path = path
        self.value: Mapping[str, Any] = value
        self._prefix = prefix

    def error(self, key: str, value: object, wanted: str) -> FormatError:
        """Make the error that names file, key, the value found and what it must be."""
        return FormatError(f"{self.path}: {self._name(key)!r} is {_short(value)}, not {wanted}")

    def object(self, key: str) -> JsonObject:
        """Return an object that must be there."""
        return JsonObject(self.path, self._required(key), self._name(key))

    def object_or_empty(self, key: str) -> JsonObject:
        """Return an object, an empty one for null or nothing."""
        value = self.value.get(key)
        return JsonObject(self.path, {} if value is None else value, self._name(key))

    def integer(self, key: str, least: int, most: int, default: int | None = None) -> int:
        """Return an integer between two bounds, both included."""
        value = self._or(key, default)
        if type(value) is not int or not least <= value <= most:
            raise self.error(key, value, f"an integer from {least} to {most}")
        return value

    def number(self, key: str, least: float, most: float, default: float | None = None) -> float:
        """Return a finite number between two bounds, both included."""
        value = self._or(key, default)
        if type(value) not in (int, float) or not least <= value <= most:
            raise self.error(key, value, f"a number from {least:g} to {most:g}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """Return true or false."""
        value = self._or(key, default)
        if type(value) is not bool:
            raise self.error(key, value, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """Return a string."""
        value = self._or(key, default)
        if not isinstance(value, str):
            raise self.error(key, value, "a text")
        return value

    def array(self, key: str) -> list[Any]:
        """Return an array, an empty one for null or nothing."""
        value = self.value.get(key)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.error(key, value, "an array")
        return value

    def _or(self, key: str, default: Any) -> Any:
        value = self.value.get(key)
        if value is None:
            return self._required(key) if default is None else default
        return value

    def _required(self, key: str) -> Any:
        value = self.value.get(key)
        if value is None:
            raise FormatError(f"{self.path}: {self._name(key)!r} is missing")
        return value

    def _name(self, key: str) -> str:
        return f"{self._prefix}.{key}" if self._prefix else key


def _short(value: object) -> str:
    if isinstance(value, (dict, list)):
        return f"a {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= 64 else text[:61] + "..."
