"""Sizes in bytes, as people write and read them.

All units are binary, as memory tools mean them: K, M, G, T are powers of 1024, with or without
"B" or "iB" behind them. "4G", "4GB" and "4GiB" are the same 4,294,967,296 bytes. No rates and no
decimal units here.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Final

from nexus_ext.errors import UsageError

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30
TIB: Final = 1 << 40

MAX_BYTES: Final = (1 << 63) - 1  # what a file offset and the native core can hold

_FACTORS: Final = {"": 1, "K": KIB, "M": MIB, "G": GIB, "T": TIB}
_SIZE = re.compile(r"([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*(?:([KMGT])I?B?|B)?", re.ASCII)
_HINT = 'Write a size such as "4G", "512M", "1.5GiB" or "1048576" (units are binary).'


def parse_bytes(text: str, *, what: str = "size") -> int:
    """Return the bytes that `text` names, fractions of a byte cut off.

    `what` names the argument in the message of the UsageError that anything but a size raises.
    """
    match = _SIZE.fullmatch(text.strip().upper())
    if match is None:
        raise UsageError(f"{what} is {text!r}, which is not a size in bytes", hint=_HINT)
    number, unit = match.groups()
    n_bytes = int(Decimal(number) * _FACTORS[unit or ""])
    if n_bytes > MAX_BYTES:
        raise UsageError(
            f"{what} is {text!r}, which is more than the largest size, {MAX_BYTES} bytes",
            hint=_HINT,
        )
    return n_bytes


def format_bytes(n_bytes: float) -> str:
    """Return `n_bytes` with one decimal in the largest unit that keeps it at 1 or above.

    The result can be given to `parse_bytes` again, at the loss of what the decimal rounds away.
    """
    if n_bytes < 0:
        return "-" + format_bytes(-n_bytes)
    if round(n_bytes) < KIB:
        return f"{round(n_bytes)} B"
    value = float(n_bytes)
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        value /= 1024
        # Rounded first, so that no size prints as 1024.0 of a unit.
        if round(value, 1) < 1024 or unit == "TiB":
            break
    return f"{value:.1f} {unit}"
