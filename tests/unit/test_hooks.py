"""The hooks are documented, typed and stable, and the built-ins answer them."""

from __future__ import annotations

import ast
import inspect
from dataclasses import is_dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import nexus_ext
from nexus_ext import hooks, hookspecs, policies
from nexus_ext.plugins import Plugins
from nexus_ext.plugins.decisions import CHOOSING
from nexus_ext.policies import CacheInfo, IoInfo, IoPolicy, PlacementSolver
from nexus_ext.policies.io import USABLE_SHARE, FitsPageCache
from tests.hook_signatures import VERSIONS, signature_of

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


def test_hookspecs_contain_nothing_but_documentation() -> None:
    tree = ast.parse(inspect.getsource(hookspecs))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            assert len(node.body) == 1 and ast.get_docstring(node), node.name


FROZEN = [
    (version, name, facts) for version, known in VERSIONS.items() for name, facts in known.items()
]


@pytest.mark.parametrize(("version", "name", "facts"), FROZEN, ids=[f[1] for f in FROZEN])
def test_signatures_gain_and_never_lose(version: int, name: str, facts: tuple[str, ...]) -> None:
    now = signature_of(name)
    n = len(facts)
    # Arguments keep their order and type, and what is added comes last; fields may come anywhere,
    # but those that were there without a default stay in their order.
    if name.startswith("nexus_"):
        assert now[-1] == facts[-1], "what a hook returns"
        assert now[: n - 1] == facts[: n - 1]
    else:
        assert [fact for fact in now if fact in facts] == list(facts)


def test_what_is_added_has_a_version() -> None:
    assert max(VERSIONS) == nexus_ext.PLUGIN_API == hookspecs.PLUGIN_API
    frozen = {name for known in VERSIONS.values() for name in known}
    assert set(HOOKS) == {name for name in frozen if name.startswith("nexus_")}
    for name in policies.__all__:
        value = getattr(policies, name)
        if is_dataclass(value) or getattr(value, "_is_protocol", False):
            assert name in frozen, f"{name}: add it to tests/hook_signatures.py"


def test_authors_find_all_types_of_the_signatures_in_one_place() -> None:
    tree = ast.parse(inspect.getsource(hookspecs))
    spoken = {
        node.id
        for function in tree.body
        if isinstance(function, ast.FunctionDef)
        for part in (function.returns, *(a.annotation for a in function.args.args))
        if part is not None
        for node in ast.walk(part)
        if isinstance(node, ast.Name)
    }
    assert spoken - {"Sequence", "Route", "click"} <= set(hooks.__all__)
    assert set(policies.__all__) - {"BUILTIN_MODULES"} <= {*hooks.__all__, "Outcome"}


@pytest.mark.parametrize("name", hooks.__all__)
def test_every_name_for_authors_can_be_had(name: str) -> None:
    assert getattr(hooks, name) is not None
    assert name in dir(hooks)


def test_an_unknown_name_for_authors_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        hooks.no_such_name  # noqa: B018


def test_the_builtins_come_through_the_hooks() -> None:
    plugins = Plugins(found=(), environ={})
    records = plugins.list_plugins()
    assert {(r.state, r.builtin) for r in records} == {("active", True)}
    assert {h for r in records for h in r.decides} == set(CHOOSING)
    assert isinstance(plugins.io_policy(), IoPolicy)
    assert isinstance(plugins.placement_solver(), PlacementSolver)
    info = CacheInfo(n_layers=2, n_experts=8, n_experts_used=2, slots=4)
    assert plugins.choose_cache(info) == "adaptive"
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


def test_the_readme_links_to_a_page_for_every_hook(repository: Path) -> None:
    text = (repository / "plugins" / "README.md").read_text(encoding="utf-8")
    for name in HOOKS:
        summary = getattr(hookspecs, name).__doc__.strip()
        assert f"| [`{name}`](docs/hooks/{name}.md) | {summary} |" in text
