"""Who gives up memory for whom, as the policy in use decides: a plugin's, or the built-in one.

A plugin's answer is checked against the rules of `eviction`. One that breaks them disables the
plugin, and the built-in decides from then on.
"""

from __future__ import annotations

from nexus_ext.multiplexer import eviction
from nexus_ext.multiplexer.eviction import Activation, Memory, Step
from nexus_ext.plugins import Rubbish, plugins
from nexus_ext.plugins.decisions import CHOOSING, EVICTION
from nexus_ext.policies import EvictionPolicy


def activate(memory: Memory, name: str) -> Activation | None:
    """Return how `name` comes to memory; None: not now. See `eviction.activate`."""

    def call(policy: EvictionPolicy) -> object:
        return policy.activate(memory, name)

    def accept(answer: object) -> Activation | None:
        if answer is None:
            if eviction.activate(memory, name) is not None:
                raise Rubbish(f"has {name} wait, though memory can be had")
            return None
        fault = eviction.faults_of_activation(memory, answer, name)
        if fault:
            raise Rubbish(fault)
        assert isinstance(answer, Activation)
        return answer

    return plugins().decide(EVICTION, CHOOSING[EVICTION], call, accept)


def make_room(
    memory: Memory, wanted_bytes: int, name: str, *, unload: bool = True
) -> tuple[Step, ...] | None:
    """Return who gives up what for `name`; None: impossible. See `eviction.make_room`."""

    def call(policy: EvictionPolicy) -> object:
        return policy.make_room(memory, wanted_bytes, name, unload=unload)

    def accept(answer: object) -> tuple[Step, ...] | None:
        if answer is None:
            if eviction.make_room(memory, wanted_bytes, name, unload=unload) is not None:
                raise Rubbish(f"finds no room for {name}, though there is")
            return None
        fault = eviction.faults_of_steps(memory, answer, wanted_bytes, name, unload=unload)
        if fault:
            raise Rubbish(fault)
        assert isinstance(answer, tuple)
        return answer

    return plugins().decide(EVICTION, CHOOSING[EVICTION], call, accept)
