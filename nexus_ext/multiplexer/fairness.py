"""Whose turn it is: models share the processor by the time they took, not by their requests.

Pure bookkeeping (start-time fair queueing, Goyal, Vin and Cheng, 1997, with one server): each name
has a virtual time that grows with what it used, divided by its weight; the smallest goes next. A
name that comes back from idleness starts where the others are, so nobody saves up turns.
"""

from __future__ import annotations

from collections.abc import Iterable


class FairClock:
    """Virtual times of the names that compete."""

    def __init__(self) -> None:
        self._used: dict[str, float] = {}
        self._now = 0.0  # of the name that was picked last

    def pick(self, names: Iterable[str]) -> str | None:
        """Return whose turn it is among those who have something to do; None: nobody has."""
        waiting = list(names)
        if not waiting:
            return None
        for name in waiting:  # who was idle gets no credit for it
            self._used[name] = max(self._used.get(name, self._now), self._now)
        name = min(waiting, key=lambda n: (self._used[n], n))
        self._now = self._used[name]
        return name

    def charge(self, name: str, ns: int, weight: float = 1.0) -> None:
        """Note that `name` used the processor for `ns`."""
        self._used[name] = self._used.get(name, self._now) + ns / weight

    def forget(self, name: str) -> None:
        self._used.pop(name, None)
