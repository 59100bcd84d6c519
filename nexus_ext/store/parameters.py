"""Parameters that a model may bring along, under the names that Ollama gave them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from nexus_ext.errors import UsageError

# name -> the type that its value has; a list of texts for `stop`.
KNOWN: Final[Mapping[str, type]] = {
    "num_ctx": int,
    "num_predict": int,
    "num_keep": int,
    "seed": int,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "typical_p": float,
    "repeat_penalty": float,
    "repeat_last_n": int,
    "presence_penalty": float,
    "frequency_penalty": float,
    "mirostat": int,
    "mirostat_tau": float,
    "mirostat_eta": float,
    "stop": list,
}


def checked(parameters: Mapping[str, object]) -> dict[str, object]:
    """Return the parameters that are known, converted. UsageError for a value that is none.

    Unknown names are left out: stores hold settings of other programs (threads, GPUs).
    """
    result: dict[str, object] = {}
    for name, value in parameters.items():
        kind = KNOWN.get(name)
        if kind is None:
            continue
        if kind is list:
            texts = [value] if isinstance(value, str) else value
            if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
                raise _wrong(name, value, "a text or a list of texts")
            result[name] = list(texts)
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise _wrong(name, value, "a number")
        try:
            number = float(value)
        except ValueError as error:
            raise _wrong(name, value, "a number") from error
        if kind is int and number != int(number):
            raise _wrong(name, value, "a whole number")
        result[name] = int(number) if kind is int else number
    return result


def _wrong(name: str, value: object, wanted: str) -> UsageError:
    return UsageError(f"the parameter {name} is {value!r}, which is not {wanted}", hint="")
