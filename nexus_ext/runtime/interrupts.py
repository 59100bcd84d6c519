"""Ctrl-C while llama.cpp runs: nothing that is raised in one of its callbacks may be lost."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interrupts_kept() -> Iterator[None]:
    """Raise a KeyboardInterrupt that a callback within the block has swallowed, at its end.

    The log callback of llama-cpp-python is Python: an interrupt that is raised inside of it goes
    nowhere, and is reported as "Exception ignored". Only the main thread is interrupted, so that
    in others this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    lost: list[object] = []
    report = sys.unraisablehook

    def hook(args: sys.UnraisableHookArgs) -> None:
        if isinstance(args.exc_value, KeyboardInterrupt):
            lost.append(args.exc_value)
        else:
            report(args)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = report
    if lost:
        raise KeyboardInterrupt
