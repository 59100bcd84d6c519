"""Signals: Ctrl-C is not lost in callbacks, and what ends this process takes along what it made."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

_ENDING: Final = (signal.SIGTERM, signal.SIGHUP)


class _Ended(BaseException):
    """A signal that ends this process, on its way through the blocks that clean up."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def cleaned_up_when_ended() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block as an exception does, and then the process.

    By default they end a process at once: the processes that it has started go on without it, and
    its temporary files stay. Handlers that somebody has set are left alone, and threads other than
    the main one, which gets no signals. Can decorate a function.
    """

    def end(number: int, _: FrameType | None) -> None:
        raise _Ended(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = [number for number in _ENDING if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, end)
    try:
        yield
    except _Ended as ended:
        signal.signal(ended.number, signal.SIG_DFL)
        signal.raise_signal(ended.number)
        raise
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def interrupts_kept() -> Iterator[None]:
    """Raise what a signal's handler has raised in a callback within the block, at its end.

    The log callback of llama-cpp-python is Python: a KeyboardInterrupt that is raised inside of it
    goes nowhere, and is reported as "Exception ignored". Only the main thread is interrupted, so
    that in others this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    lost: list[BaseException] = []
    report = sys.unraisablehook

    def hook(args: sys.UnraisableHookArgs) -> None:
        if isinstance(args.exc_value, (KeyboardInterrupt, _Ended)):
            lost.append(args.exc_value)
        else:
            report(args)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = report
    if lost:
        raise lost[0]
