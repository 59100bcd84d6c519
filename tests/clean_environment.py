"""An environment as a stranger has it: nexus_ext from its wheel, and what that depends on.

The wheel is the one that NEXUS_TEST_WHEEL names (continuous integration installs the same), or is
built from the checkout, incrementally. Packages of third parties are those of the environment that
runs the tests, by links: only what the requirements ask for, so that nothing of the development
environment leaks in, and nothing is compiled or downloaded again.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
# What a pyproject.toml of a plugin may need to be built, and its tests to run.
TOOLS = ("pip", "pytest", "hatchling", "editables", "httpx")


def wheel(directory: Path) -> Path:
    """Return nexus_ext's wheel, building it in `directory` if nobody has yet."""
    if named := os.environ.get("NEXUS_TEST_WHEEL"):
        return Path(named)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    command += [f"--config-settings=build-dir={ROOT}/build/wheel", "--wheel-dir", str(directory)]
    subprocess.run([*command, str(ROOT)], check=True)
    [built] = directory.glob("nexus_ext-*.whl")
    return built


def requirements(names: Iterable[str]) -> Iterator[Distribution]:
    """Yield the distributions of these names and all that they need, nexus_ext left out.

    Raises RuntimeError when one of these names is not installed.
    """
    seen: set[str] = set()
    named = list(names)
    left = list(named)
    while left:
        name = left.pop()
        if name.lower().replace("_", "-") in seen:
            continue
        seen.add(name.lower().replace("_", "-"))
        try:
            found = distribution(name)
        except PackageNotFoundError:
            if name in named:  # or pip would fail later, in the middle of a build
                hint = 'pip install -e ".[test]"'
                raise RuntimeError(f"{name} is not installed here: {hint}") from None
            continue  # a marker that pip decides otherwise, or an optional backport
        for text in found.requires or ():
            requirement = Requirement(text)
            extra = "server" if name == "nexus_ext" else ""
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                left.append(requirement.name)
        if name != "nexus_ext":
            yield found


def link_packages(target: Path, names: Iterable[str]) -> None:
    """Fill `target` with links to these distributions and to what they need."""
    target.mkdir()
    for found in requirements(names):
        site = Path(str(found.locate_file("")))
        for top in {file.parts[0] for file in found.files or ()}:
            if top != ".." and not (target / top).exists() and (site / top).exists():
                (target / top).symlink_to(site / top)


@functools.cache
def _shared() -> tuple[tempfile.TemporaryDirectory[str], Path, Path]:
    """Return (a directory for as long as the process lives, the wheel, the packages)."""
    directory = tempfile.TemporaryDirectory()
    wheels, packages = Path(directory.name) / "wheels", Path(directory.name) / "third-parties"
    wheels.mkdir()
    link_packages(packages, ("nexus_ext", *TOOLS))
    return directory, wheel(wheels), packages


class CleanEnvironment:
    """A directory outside of the checkout, and what programs that run there see."""

    def __init__(self, home: Path) -> None:
        self.home = home / "home"
        self.home.mkdir()
        _, self.wheel, self.packages = _shared()
        self.environ: Mapping[str, str] = {
            "HOME": str(self.home),
            "LANG": "C.UTF-8",
            "PATH": os.environ["PATH"],
            "XDG_CACHE_HOME": str(self.home / ".cache"),
            # `pip install NAME` finds our wheel, and needs no network for the rest.
            "PIP_FIND_LINKS": str(self.wheel.parent),
            "PIP_NO_INDEX": "1",
            "PIP_NO_BUILD_ISOLATION": "0",  # pip reads it as a value of the option: do not isolate
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_ROOT_USER_ACTION": "ignore",
        }

    def add_packages(self, venv: Path) -> None:
        """Let a virtual environment see the packages of third parties."""
        (site,) = venv.glob("lib/python3*/site-packages")
        (site / "third_parties.pth").write_text(f"{self.packages}\n", encoding="utf-8")

    def virtual(self, name: str) -> Path:
        """Make a virtual environment with nexus_ext in it; return its `bin`."""
        venv = self.home / name
        self.run(sys.executable, "-m", "venv", "--without-pip", venv)
        self.add_packages(venv)
        self.run(venv / "bin" / "python", "-m", "pip", "install", "--quiet", self.wheel)
        return venv / "bin"

    def run(self, *command: str | Path, cwd: Path | None = None, **environ: str) -> str:
        """Run a command and return its stdout; fail with all that it said."""
        done = subprocess.run(
            [str(part) for part in command],
            cwd=cwd or self.home,
            env={**self.environ, **environ},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done.stdout
