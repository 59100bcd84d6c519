"""Imports go down only, pure layers stay pure, modules stay small."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import nexus_ext

ROOT = Path(__file__).resolve().parents[2]

# Lower numbers know nothing of higher ones. A module may import from its own package.
LAYERS = {
    name: number
    for number, names in enumerate(
        (
            ("nexus_ext._version",),
            ("nexus_ext", "nexus_ext.core_values", "nexus_ext.errors", "nexus_ext.types"),
            ("nexus_ext.include",),
            ("nexus_ext.units",),
            ("nexus_ext.codecs",),
            ("nexus_ext.formats",),
            ("nexus_ext.hardware",),
            ("nexus_ext.placement",),
            ("nexus_ext.routing",),
            ("nexus_ext.quality",),
            ("nexus_ext.hookspecs", "nexus_ext.hooks"),
            ("nexus_ext.policies",),
            ("nexus_ext.plugin_registry",),
            ("nexus_ext.plugins",),
            ("nexus_ext.core_errors",),
            ("nexus_ext.native_codecs", "nexus_ext.native_kernels", "nexus_ext.native_plugins"),
            ("nexus_ext.native_predictions",),
            ("nexus_ext.core",),
            ("nexus_ext.kernels",),
            ("nexus_ext.runtime",),
            ("nexus_ext.store",),
            ("nexus_ext.multiplexer",),
            ("nexus_ext.server",),
            ("nexus_ext.integrations",),
            ("nexus_ext.cli",),
            ("nexus_ext.testing",),
        )
    )
    for name in names
}
PURE = ("nexus_ext.placement", "nexus_ext.policies", "nexus_ext.quality", "nexus_ext.routing")
IMPURE_IMPORTS = {
    *("asyncio", "datetime", "io", "logging", "multiprocessing", "os", "pathlib", "random"),
    *("secrets", "shutil", "socket", "subprocess", "sys", "tempfile", "threading", "time"),
}
IMPURE_CALLS = {"open", "input", "print"}
MAY_PRINT = ("nexus_ext.cli",)
MAY_IMPORT = {
    "llama_cpp": ("nexus_ext.runtime", "nexus_ext.integrations"),
    "nexus_ext._native": (
        *("nexus_ext.codecs", "nexus_ext.core", "nexus_ext.core_errors"),
        *("nexus_ext.native_codecs", "nexus_ext.native_kernels"),
        *("nexus_ext.native_plugins", "nexus_ext.native_predictions"),
    ),
}
MAX_LINES = 500
GENERATED = ("nexus_ext/native/cffi/_native.c",)


def sources() -> dict[str, Path]:
    """Every module that is installed, by its import name."""
    modules: dict[str, Path] = {}
    places = (("nexus_ext", "nexus_ext"), ("formats", "nexus_ext.formats"))
    for directory, package in (*places, ("integrations", "nexus_ext.integrations")):
        for path in sorted((ROOT / directory).rglob("*.py")):
            parts = path.relative_to(ROOT / directory).with_suffix("").parts
            if parts[0] != "native":
                name = ".".join((package, *parts))
                modules[name.removesuffix(".__init__")] = path
    return modules


SOURCES = sources()


def within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == p or module.startswith(p + ".") for p in packages)


def layer_of(module: str) -> str:
    """Return the entry of LAYERS that a module belongs to."""
    parts = module.split(".")
    return ".".join(parts[:2])


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those that only a type checker sees."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield other
                yield from runtime_nodes(other)
            continue
        yield node
        yield from runtime_nodes(node)


def imports(module: str, tree: ast.AST) -> Iterator[str]:
    """Full names of the modules that a module imports, wherever in it."""
    is_package = SOURCES[module].name == "__init__.py"
    for node in runtime_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, base] if base else parts)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                if base == "nexus_ext" and alias.name in nexus_ext._HOME:
                    yield nexus_ext._HOME[alias.name]  # the package fetches it from there
                else:
                    yield inner if inner in SOURCES or inner in MAY_IMPORT else base


def trees(*, only: tuple[str, ...] = ("nexus_ext",)) -> Iterator[tuple[str, ast.Module]]:
    for module, path in SOURCES.items():
        if within(module, only):
            yield module, ast.parse(path.read_text(encoding="utf-8"), str(path))


def calls(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node.func.id, node.lineno


def test_every_module_has_a_layer() -> None:
    assert {layer_of(module) for module in SOURCES} <= LAYERS.keys()


def test_imports_go_down() -> None:
    wrong = []
    for module, tree in trees():
        home = layer_of(module)
        for target in imports(module, tree):
            if not within(target, ("nexus_ext",)) or target == "nexus_ext._native":
                continue
            there = layer_of(target)
            if there != home and LAYERS[there] >= LAYERS[home]:
                wrong.append(f"{module} imports {target}")
    assert not wrong


@pytest.mark.parametrize("guarded", MAY_IMPORT)
def test_guarded_modules_are_imported_in_one_place(guarded: str) -> None:
    wrong = [
        module
        for module, tree in trees()
        for target in imports(module, tree)
        if within(target, (guarded,)) and not within(module, MAY_IMPORT[guarded])
    ]
    assert not wrong


def test_placement_and_policies_do_no_io_and_read_no_clock() -> None:
    wrong = []
    for module, tree in trees(only=PURE):
        wrong += [
            f"{module} imports {target}"
            for target in imports(module, tree)
            if target.split(".")[0] in IMPURE_IMPORTS
        ]
        wrong += [f"{module}:{line} {name}()" for name, line in calls(tree) if name in IMPURE_CALLS]
    assert not wrong


def test_libraries_do_not_print() -> None:
    wrong = [
        f"{module}:{line}"
        for module, tree in trees()
        if not within(module, MAY_PRINT)
        for name, line in calls(tree)
        if name == "print"
    ]
    assert not wrong


def test_every_module_says_what_it_is() -> None:
    assert not [module for module, tree in trees() if not ast.get_docstring(tree)]


def test_no_file_is_longer_than_one_sitting() -> None:
    long = []
    for directory in ("nexus_ext", "formats", "integrations", "plugins", "tests"):
        for path in sorted((ROOT / directory).rglob("*")):
            name = path.relative_to(ROOT).as_posix()
            if path.suffix in (".py", ".c", ".h") and name not in GENERATED:
                n_lines = len(path.read_text(encoding="utf-8").splitlines())
                if n_lines > MAX_LINES:
                    long.append(f"{name}: {n_lines} lines")
    assert not long


def test_the_rules_see_every_form_of_import_but_those_for_type_checkers() -> None:
    tree = ast.parse(
        "import os.path\n"
        "if TYPE_CHECKING:\n"
        "    import numpy\n"
        "def late():\n"
        "    from nexus_ext import errors\n"
        "    from ..types import Role\n"
        "    from .. import hookspecs\n"
        "    from nexus_ext import Llama\n"
        "    print(1)\n"
    )
    assert list(imports("nexus_ext.policies.io", tree)) == [
        "os.path",
        "nexus_ext.errors",
        "nexus_ext.types",
        "nexus_ext.hookspecs",
        "nexus_ext.runtime",
    ]
    assert list(calls(tree)) == [("print", 9)]
