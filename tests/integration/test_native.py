"""The tests of the native core (tests/native/*.c), plainly and under the sanitizers.

`tests/native/run.sh` builds and runs them; this says which build failed, and where. It knows
nothing of what the tests promise.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from subprocess import Popen

import pytest

_SANITIZERS = {
    "plain": "",
    "address": "-fsanitize=address,undefined",
    "thread": "-fsanitize=thread",
}


def _missing(flags: str, directory: Path) -> str:
    """Return why programs cannot be built with `flags` and run here, or nothing."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if shutil.which(compiler[0]) is None:
        return f"there is no C compiler {compiler[0]!r}"
    source, program = directory / "probe.c", directory / "probe"
    source.write_text("int main(void) { return 0; }\n")
    build = [*compiler, *flags.split(), "-pthread", str(source), "-o", str(program)]
    if subprocess.run(build, capture_output=True).returncode != 0:
        return f"{compiler[0]} cannot build with {flags or 'no flags'}"
    if subprocess.run([str(program)], capture_output=True).returncode != 0:
        return f"programs built with {flags} do not run here"
    return ""


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {build: tmp_path_factory.mktemp(build) for build in _SANITIZERS}


@pytest.fixture(scope="module")
def runs(repository: Path, directories: dict[str, Path]) -> Iterator[dict[str, Popen[bytes] | str]]:
    """Every build, side by side: one alone keeps one processor busy. Or why there is none."""
    found: dict[str, Popen[bytes] | str] = {}
    for build, directory in directories.items():
        found[build] = _missing(_SANITIZERS[build], directory)
        if found[build]:
            continue
        with open(directory / "output", "wb") as output:
            found[build] = Popen(
                ["sh", str(repository / "tests" / "native" / "run.sh")],
                env={**os.environ, "NX_TEST_BUILDS": build, "TMPDIR": str(directory)},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    yield found
    for run in found.values():
        if isinstance(run, Popen) and run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()


@pytest.mark.timeout(900)
@pytest.mark.parametrize("build", _SANITIZERS)
def test_native_core_keeps_its_promises(
    build: str, directories: dict[str, Path], runs: dict[str, Popen[bytes] | str]
) -> None:
    run = runs[build]
    if isinstance(run, str):
        pytest.skip(run)
    status = run.wait()
    text = (directories[build] / "output").read_text(encoding="utf-8", errors="replace")
    assert status == 0, text[-6000:]
