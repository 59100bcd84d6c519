"""The hooks are documented and typed, and the built-ins answer them."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexus_ext import hookspecs
from nexus_ext.plugins import Plugins
from nexus_ext.policies import CacheInfo, IoInfo, IoPolicy, PlacementSolver
from nexus_ext.policies.io import USABLE_SHARE, FitsPageCache

HOOKS = [name for name in vars(hookspecs) if name.startswith("nexus_")]
GIB = 1 << 30


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_has_a_docstring_and_a_typed_signature(name: str) -> None:
    hook = getattr(hookspecs, name)
    signature = inspect.signature(hook)
    assert hook.__doc__ and hook.__doc__.strip().endswith(".")
    assert signature.return_annotation is not inspect.Signature.empty
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty, parameter.name


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_is_documented_with_its_exact_signature(name: str, repository: Path) -> None:
    hook = getattr(hookspecs, name)
    text = (repository / "plugins" / "README.md").read_text(encoding="utf-8")
    arguments = ", ".join(f"{p.name}: {p.annotation}" for p in signature_of(hook).values())
    returned = str(inspect.signature(hook).return_annotation)
    line = f"| `{name}({arguments}) -> {returned}` | {hook.__doc__.strip()} |"
    assert line in text.replace(" \\| ", " | ")


def signature_of(hook: object) -> dict[str, inspect.Parameter]:
    assert callable(hook)
    return dict(inspect.signature(hook).parameters)


def test_hookspecs_contain_nothing_but_documentation() -> None:
    tree = ast.parse(inspect.getsource(hookspecs))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            assert len(node.body) == 1 and ast.get_docstring(node), node.name


def test_the_builtins_come_through_the_hooks() -> None:
    plugins = Plugins(found=(), environ={})
    records = plugins.list_plugins()
    assert {r.state for r in records} == {"built-in"}
    assert [h for r in records for h in r.decides] == [
        "nexus_cache_policy",
        "nexus_io_policy",
        "nexus_placement_solver",
        "nexus_expert_predictor",
    ]
    assert isinstance(plugins.io_policy(), IoPolicy)
    assert isinstance(plugins.placement_solver(), PlacementSolver)
    info = CacheInfo(n_layers=2, n_experts=8, n_experts_used=2, slots=4)
    assert plugins.choose_cache(info) == "lfru"
    assert plugins.choose_predictor(info) == "auto"


def test_weights_that_fit_beside_the_process_go_through_the_page_cache() -> None:
    info = IoInfo(
        streamed_bytes=2 * GIB, resident_bytes=GIB, available_bytes=8 * GIB, limit_bytes=None
    )
    assert FitsPageCache().choose(info) == "buffered"


def test_weights_that_exceed_free_memory_are_read_directly() -> None:
    info = IoInfo(
        streamed_bytes=8 * GIB, resident_bytes=GIB, available_bytes=8 * GIB, limit_bytes=None
    )
    assert FitsPageCache().choose(info) == "direct"


def test_the_page_cache_counts_against_a_memory_limit() -> None:
    info = IoInfo(
        streamed_bytes=2 * GIB, resident_bytes=GIB, available_bytes=64 * GIB, limit_bytes=2 * GIB
    )
    assert FitsPageCache().choose(info) == "direct"


sizes = st.integers(0, 1 << 45)


@given(sizes, sizes, sizes, st.none() | sizes)
def test_the_page_cache_is_never_asked_to_hold_more_than_there_is(
    streamed: int, resident: int, available: int, limit: int | None
) -> None:
    info = IoInfo(streamed, resident, available, limit)
    mode = FitsPageCache().choose(info)
    room = min(available, available if limit is None else limit) - resident
    assert mode in ("direct", "buffered")
    assert mode == "direct" or streamed <= max(0, room)
    assert mode == "buffered" or streamed > room * USABLE_SHARE
