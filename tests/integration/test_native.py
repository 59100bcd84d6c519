"""The tests of the native core (tests/native/*.c), plainly and under the sanitizers.

`tests/native/run.sh` builds and runs them; this says which build failed, and where. It knows
nothing of what the tests promise.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

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


@pytest.mark.timeout(900)
@pytest.mark.parametrize("build", _SANITIZERS)
def test_native_core_keeps_its_promises(build: str, repository: Path, tmp_path: Path) -> None:
    reason = _missing(_SANITIZERS[build], tmp_path)
    if reason:
        pytest.skip(reason)
    run = subprocess.run(
        ["sh", str(repository / "tests" / "native" / "run.sh")],
        env={**os.environ, "NX_TEST_BUILDS": build, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, f"{run.stdout[-2000:]}\n{run.stderr[-6000:]}"
