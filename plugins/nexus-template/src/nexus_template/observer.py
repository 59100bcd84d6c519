"""What happens to models and requests, in the log and in a count.

Observers are called once for each model and each request, never for a token. What they raise is
logged, and changes nothing. With `nexus_ext.Llama` the caller waits for them: be short.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nexus_ext.hooks import ModelInfo, RequestInfo

# Libraries do not print. `logging.getLogger("nexus_template").setLevel("INFO")` shows this.
_log = logging.getLogger(__name__)

tokens: Counter[str] = Counter()  # generated in this process, by how the request ended


def loaded(info: ModelInfo) -> None:
    _log.info("%s loaded, %d bytes resident", info.path, info.resident_bytes)


def done(info: RequestInfo) -> None:
    tokens[info.outcome] += info.n_tokens
    seconds = info.decode_ns / 1e9
    rate = info.n_tokens / seconds if seconds else 0.0
    _log.info("%d tokens, %.1f a second, %d bytes read", info.n_tokens, rate, info.read_bytes)


def closed(info: ModelInfo) -> None:
    _log.info("%s closed", info.path)
