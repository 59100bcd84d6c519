"""From tokens to text: whole UTF-8 only, and never a part of a text that stops the answer.

Pure: bytes in, text out.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """The text of one answer as its tokens come in."""

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = tuple(text for text in stop if text)
        self._held = ""  # may be the beginning of a stop text
        self.stopped_by: str | None = None

    def add(self, piece: bytes) -> str:
        """Return what can be shown after `piece`; sets `stopped_by` when a stop text is complete.

        The stop that begins first wins, and of those that begin there the one that was named first.
        What comes before it is returned, it and what follows is not.
        """
        if self.stopped_by is not None:
            return ""
        return self._emit(self._decoder.decode(piece))

    def finish(self) -> str:
        """Return what was held back, at the end of the answer."""
        if self.stopped_by is not None:
            return ""
        shown = self._emit(self._decoder.decode(b"", final=True))
        if self.stopped_by is None:
            shown, self._held = shown + self._held, ""
        return shown

    def _emit(self, text: str) -> str:
        text = self._held + text
        found = [(at, i) for i, s in enumerate(self._stop) if (at := text.find(s)) >= 0]
        if found:
            at, which = min(found)
            self.stopped_by, self._held = self._stop[which], ""
            return text[:at]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that `text` ends with."""
    for n in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0
