"""Who gives up memory for whom: pure functions of a state. No I/O, no clock.

Memory is counted in bytes, never in models. A model holds a fixed part (small tensors, KV cache,
buffers) for as long as it is loaded, and units (layers, slots for experts) of which any prefix may
be resident. The rules, in this order:

- The budget is never exceeded, and what is in use, or pinned, is never taken away.
- Units go before whole models: an evicted layer is read back, a model must be loaded again.
- What a model has on a GPU goes with the model only; each GPU has a budget of its own.
- Among models the lowest priority goes first, then the one that was used longest ago.
- A model with a share keeps that many bytes against everybody.
- Nothing goes that need not go.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Holder:
    """What a model holds, and what it would like to hold."""

    name: str
    fixed_bytes: int  # while it is loaded
    units: tuple[int, ...]  # bytes of each; the first is the most worth having
    loaded: bool = False
    resident: int = 0  # units in memory: the first so many
    in_use: bool = False
    pinned: bool = False
    priority: int = 0  # the lowest is evicted first
    share_bytes: int = 0  # never evicted below this
    last_used_ns: int = 0
    gpu_bytes: tuple[int, ...] = ()  # of each GPU while it is loaded; missing ones are 0

    @property
    def units_bytes(self) -> int:
        return sum(self.units[: self.resident])

    @property
    def held_bytes(self) -> int:
        return self.fixed_bytes + self.units_bytes if self.loaded else 0

    def on_gpu(self, number: int) -> int:
        """Bytes that it takes of GPU `number` while it is loaded."""
        return self.gpu_bytes[number] if number < len(self.gpu_bytes) else 0


@dataclass(frozen=True, slots=True)
class Memory:
    """The budget and who holds it."""

    budget_bytes: int
    holders: tuple[Holder, ...]
    other_bytes: int = 0  # held by nobody who could give it up
    gpu_budgets: tuple[int, ...] = ()  # bytes of each GPU

    @property
    def used_bytes(self) -> int:
        return self.other_bytes + sum(holder.held_bytes for holder in self.holders)

    @property
    def free_bytes(self) -> int:
        return self.budget_bytes - self.used_bytes

    @property
    def gpu_used(self) -> tuple[int, ...]:
        """Bytes in use on each GPU."""
        loaded = [holder for holder in self.holders if holder.loaded]
        return tuple(sum(h.on_gpu(i) for h in loaded) for i in range(len(self.gpu_budgets)))

    @property
    def gpu_free(self) -> tuple[int, ...]:
        return tuple(b - used for b, used in zip(self.gpu_budgets, self.gpu_used, strict=True))

    def holder(self, name: str) -> Holder:
        return next(holder for holder in self.holders if holder.name == name)

    def with_holder(self, changed: Holder) -> Memory:
        holders = tuple(changed if h.name == changed.name else h for h in self.holders)
        return replace(self, holders=holders)


@dataclass(frozen=True, slots=True)
class Step:
    """One model gives up memory: it keeps `resident` units, or (None) is unloaded."""

    name: str
    resident: int | None
    freed_bytes: int


@dataclass(frozen=True, slots=True)
class Activation:
    """How a model comes to memory: what others give up first, and how many units it gets."""

    steps: tuple[Step, ...]
    resident: int


def activate(memory: Memory, name: str) -> Activation | None:
    """Return how `name` gets its fixed part and as many units as can be had; None: not now.

    For its fixed part idle models may be unloaded. For units only units of others go.
    """
    target = memory.holder(name)
    steps: list[Step] = []
    if not target.loaded:
        made = _gpu_room(memory, target)
        if made is None:
            return None
        steps += made
        memory = apply(memory, made)
        made = make_room(memory, target.fixed_bytes, name)
        if made is None:
            return None
        steps += made
        memory = apply(memory, made)
        target = replace(target, loaded=True, resident=0)
        memory = memory.with_holder(target)
    possible = memory.free_bytes + sum(step.freed_bytes for step in _units(memory, name))
    n, wanted = target.resident, 0
    while n < len(target.units) and wanted + target.units[n] <= possible:
        wanted += target.units[n]
        n += 1
    more = make_room(memory, wanted, name, unload=False)
    return Activation(_joined([*steps, *(more or ())]), n)


def _gpu_room(memory: Memory, target: Holder) -> tuple[Step, ...] | None:
    """Return which models go so that a target's parts fit on their GPUs; None: impossible."""
    if any(target.gpu_bytes[len(memory.gpu_budgets) :]):
        return None  # there is no such GPU
    state, steps = memory, []
    for number in range(len(memory.gpu_budgets)):
        wanted = target.on_gpu(number)
        while wanted and state.gpu_free[number] < wanted:
            models = _models(state, target.name)
            step = next((s for s in models if state.holder(s.name).on_gpu(number)), None)
            if step is None:
                return None
            steps.append(step)
            state = apply(state, (step,))
    # One that went early need not go when later ones gave up more than was missing.
    for step in reversed(steps):
        stays = apply(memory, tuple(s for s in steps if s is not step))
        if all(free >= target.on_gpu(i) for i, free in enumerate(stays.gpu_free)):
            steps = [s for s in steps if s is not step]
    return tuple(steps)


def make_room(
    memory: Memory, wanted_bytes: int, name: str, *, unload: bool = True
) -> tuple[Step, ...] | None:
    """Return who gives up what so that `wanted_bytes` are free for `name`; None: impossible."""
    steps: list[Step] = []
    state = memory
    for find in (_units, _models) if unload else (_units,):
        while state.free_bytes < wanted_bytes:
            step = next(find(state, name), None)
            if step is None:
                break
            steps.append(step)
            state = apply(state, (step,))
    spare = state.free_bytes - wanted_bytes
    return _without_spare(memory, _joined(steps), spare) if spare >= 0 else None


def apply(memory: Memory, steps: tuple[Step, ...]) -> Memory:
    """Return the state after `steps`."""
    for step in steps:
        holder = memory.holder(step.name)
        if step.resident is None:
            holder = replace(holder, loaded=False, resident=0)
        else:
            holder = replace(holder, resident=step.resident)
        memory = memory.with_holder(holder)
    return memory


def _candidates(memory: Memory, name: str) -> list[Holder]:
    able = [h for h in memory.holders if h.name != name and h.loaded and not (h.in_use or h.pinned)]
    return sorted(able, key=lambda h: (h.priority, h.last_used_ns, h.name))


def _units(memory: Memory, name: str) -> Iterator[Step]:
    """Single units that may go, in the order in which they go."""
    for holder in _candidates(memory, name):
        held = holder.held_bytes
        for n in range(holder.resident - 1, -1, -1):
            freed = holder.units[n]
            held -= freed
            if held < holder.share_bytes:
                break
            yield Step(holder.name, n, freed)


def _models(memory: Memory, name: str) -> Iterator[Step]:
    for holder in _candidates(memory, name):
        if not holder.share_bytes and holder.held_bytes:
            yield Step(holder.name, None, holder.held_bytes)


def _without_spare(memory: Memory, steps: tuple[Step, ...], spare_bytes: int) -> tuple[Step, ...]:
    """Take back what need not go after all, since a whole model went: the last in order first."""
    kept: list[Step] = []
    for step in reversed(steps):
        holder, n, freed = memory.holder(step.name), step.resident, step.freed_bytes
        if n is None and freed <= spare_bytes:
            spare_bytes -= freed
            continue
        while n is not None and n < holder.resident and holder.units[n] <= spare_bytes:
            spare_bytes -= holder.units[n]
            freed -= holder.units[n]
            n += 1
        if n != holder.resident:
            kept.append(Step(step.name, n, freed))
    return tuple(reversed(kept))


def _joined(steps: list[Step]) -> tuple[Step, ...]:
    """One step a model: the last state it is brought to, with all that it gives up."""
    joined: dict[str, Step] = {}
    for step in steps:
        before = joined.get(step.name)
        freed = step.freed_bytes + (before.freed_bytes if before else 0)
        joined[step.name] = Step(step.name, step.resident, freed)
    return tuple(joined.values())


def faults_of_steps(
    memory: Memory, steps: object, wanted_bytes: int, name: str, *, unload: bool = True
) -> str:
    """Return what is wrong with somebody else's answer to `make_room`; "" if nothing is.

    The rules that nobody may break are checked, not how well the choice was made.
    """
    if not isinstance(steps, tuple):
        return f"returned a {type(steps).__name__} instead of a tuple of steps"
    seen: set[str] = set()
    for step in steps:
        fault = _fault_of_step(memory, step, name, unload=unload)
        if fault or step.name in seen:
            return fault or f"takes from {step.name} twice"
        seen.add(step.name)
    free = apply(memory, steps).free_bytes
    if free < wanted_bytes:
        return f"frees {free} bytes, {wanted_bytes} are wanted"
    return ""


def faults_of_activation(memory: Memory, activation: object, name: str) -> str:
    """Return what is wrong with somebody else's answer to `activate`; "" if nothing is."""
    if not isinstance(activation, Activation):
        return f"returned a {type(activation).__name__} instead of an Activation"
    target, n = memory.holder(name), activation.resident
    if type(n) is not int or not target.resident <= n <= len(target.units):
        return f"gives {name} {n!r} of {len(target.units)} units; it has {target.resident}"
    more = sum(target.units[target.resident : n])
    if not target.loaded:
        more += target.fixed_bytes
    elif not more:  # nothing is wanted: what is over the budget already may stay so
        more = min(0, memory.free_bytes)
    fault = faults_of_steps(memory, activation.steps, more, name, unload=not target.loaded)
    if fault or target.loaded:
        return fault
    if any(target.gpu_bytes[len(memory.gpu_budgets) :]):
        return f"puts {name} on a GPU that there is not"
    for number, free in enumerate(apply(memory, activation.steps).gpu_free):
        if free < target.on_gpu(number):
            return f"leaves {free} bytes of GPU {number}, {target.on_gpu(number)} are wanted"
    return ""


def _fault_of_step(memory: Memory, step: object, name: str, *, unload: bool) -> str:
    if not isinstance(step, Step):
        return f"returned a {type(step).__name__} among the steps"
    holder = next((h for h in memory.holders if h.name == step.name), None)
    if holder is None or not holder.loaded:
        return f"takes from {step.name!r}, which holds nothing"
    if holder.name == name:
        return f"takes from {name} what is for {name}"
    if holder.in_use or holder.pinned:
        return f"takes from {holder.name}, which is {'in use' if holder.in_use else 'pinned'}"
    if step.resident is None:
        freed = holder.held_bytes
        if not unload or holder.share_bytes:
            return f"unloads {holder.name}, which must stay loaded"
    elif type(step.resident) is not int or not 0 <= step.resident < holder.resident:
        return f"leaves {holder.name} {step.resident!r} units; it has {holder.resident}"
    else:
        freed = sum(holder.units[step.resident : holder.resident])
        if holder.held_bytes - freed < holder.share_bytes:
            return f"takes from {holder.name} a part of its share"
    if step.freed_bytes != freed:
        return f"counts {step.freed_bytes!r} bytes of {holder.name}, which are {freed}"
    return ""
