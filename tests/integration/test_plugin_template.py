"""The template as a wheel beside nexus_ext's: installed, used, given another name, removed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from nexus_ext.testing.synthetic import write_llama
from tests.clean_environment import CleanEnvironment


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> CleanEnvironment:
    return CleanEnvironment(tmp_path_factory.mktemp("clean"))


@pytest.fixture(scope="module")
def bin_(environment: CleanEnvironment) -> Path:
    """The programs of an environment with nexus_ext and no plugin."""
    return environment.virtual("venv")


@pytest.fixture
def project(environment: CleanEnvironment, repository: Path, tmp_path: Path) -> Path:
    """A copy of the template, as the README tells to make one."""
    copy = tmp_path / "project"
    shutil.copytree(
        repository / "plugins" / "nexus-template",
        copy,
        ignore=shutil.ignore_patterns("__pycache__", ".*", "dist"),
    )
    return copy


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    write_llama(path, n_layers=2, n_embd=64, n_ff=128, n_heads=2, n_heads_kv=2, n_vocab=300)
    return path


def plugins(environment: CleanEnvironment, bin_: Path) -> dict[str, dict[str, Any]]:
    """What `nexus plugins` says of those that are not built in."""
    listed = json.loads(environment.run(bin_ / "nexus", "plugins", "--json"))["plugins"]
    return {p["name"]: p for p in listed if p["distribution"] != "nexus_ext"}


def pip(environment: CleanEnvironment, bin_: Path, *arguments: str | Path) -> None:
    environment.run(bin_ / "python", "-m", "pip", *arguments)


def build(environment: CleanEnvironment, bin_: Path, project: Path) -> Path:
    pip(
        environment, bin_, "wheel", "--quiet", "--no-deps", "--wheel-dir", project / "dist", project
    )
    [built] = (project / "dist").glob("*.whl")
    return built


def files(bin_: Path) -> set[Path]:
    """Everything in the environment but what Python compiled."""
    return {p for p in bin_.parent.rglob("*") if "__pycache__" not in p.parts}


def test_a_wheel_of_the_template_comes_works_and_goes(
    environment: CleanEnvironment, bin_: Path, project: Path, model: Path
) -> None:
    where = environment.run(bin_ / "python", "-c", "import nexus_ext; print(nexus_ext.__file__)")
    assert Path(where.strip()).is_relative_to(bin_.parent), "nexus_ext is that of the wheel"
    assert plugins(environment, bin_) == {}
    before = files(bin_)
    pip(environment, bin_, "install", "--quiet", build(environment, bin_, project))
    listed = plugins(environment, bin_)
    assert list(listed) == ["template"]
    assert listed["template"]["error"] == ""
    assert "nexus_placement_solver" in listed["template"]["decides"]
    assert (listed["template"]["distribution"], listed["template"]["version"]) == (
        "nexus-template",
        "0.1.0",
    )
    sizes = json.loads(environment.run(bin_ / "nexus", "template", model, "--json"))
    assert sizes["output"] == 300 * 64 // 32 * 18  # Q4_0
    # A model in less memory than its weights, compared with stock llama.cpp bit by bit.
    shown = json.loads(environment.run(bin_ / "nexus", "demo", "--json", "-n", "8"))
    assert shown["identical"] is True
    # Its own tests, against the wheels.
    environment.run(bin_ / "python", "-m", "pytest", "--quiet", cwd=project)

    pip(environment, bin_, "uninstall", "--quiet", "--yes", "nexus-template")
    assert plugins(environment, bin_) == {}
    assert files(bin_) == before


def test_a_copy_takes_another_name(
    environment: CleanEnvironment, bin_: Path, project: Path, model: Path
) -> None:
    environment.run(bin_ / "python", "rename.py", "two-words", cwd=project)
    texts = {p: p.read_text(encoding="utf-8") for p in project.rglob("*") if p.is_file()}
    assert not [p for p, text in texts.items() if "template" in f"{p.name} {text}".lower()]
    assert not (project / "rename.py").exists()
    pip(environment, bin_, "install", "--quiet", build(environment, bin_, project))
    try:
        listed = plugins(environment, bin_)
        assert list(listed) == ["two-words"]
        assert listed["two-words"]["distribution"] == "nexus-two-words"
        assert "output" in environment.run(bin_ / "nexus", "two-words", model)
        tests = ("-m", "pytest", "--quiet", "-k", "not computes_the_same")
        assert "10 passed" in environment.run(bin_ / "python", *tests, cwd=project)
    finally:
        pip(environment, bin_, "uninstall", "--quiet", "--yes", "nexus-two-words")
    assert plugins(environment, bin_) == {}


@pytest.mark.parametrize("arguments", [(), ("Capital",), ("template",), ("a", "b"), ("../up",)])
def test_a_name_that_cannot_be_is_refused(
    arguments: tuple[str, ...], environment: CleanEnvironment, bin_: Path, project: Path
) -> None:
    with pytest.raises(AssertionError, match=r"usage: python rename\.py NAME"):
        environment.run(bin_ / "python", "rename.py", *arguments, cwd=project)
    assert (project / "src" / "nexus_template").is_dir()
