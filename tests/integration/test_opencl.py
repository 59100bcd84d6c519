"""OpenCL, with a library of our own that runs the very kernels on the CPU and fails when it is told
to; and with a real one, where there is one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nexus_ext import kernels
from nexus_ext.errors import UsageError
from nexus_ext.runtime.own_kernels import same_bits
from tests.models_folder import find_model
from tests.same_bits import needs_same_bits

ABSENT = "/nowhere/libOpenCL.so.1"
ROOT = Path(__file__).resolve().parents[2]
SETUP = """
import numpy as np
from nexus_ext import kernels
from nexus_ext.errors import NexusError
rng = np.random.default_rng(1)
"""
PRODUCT = """
types = (("tq1_0", 54, 256), ("tq2_0", 66, 256), ("q2_0", 18, 64), ("q1_0", 18, 128))
for name, nbytes, block in types:
    for n_out, n_blocks, n_columns in ((1, 1, 1), (63, 2, 2), (65, 5, 3), (130, 3, 9)):
        rows = rng.integers(0, 256, (n_out, n_blocks, nbytes), dtype=np.uint8)
        at = -2 if name.startswith("tq") else 0
        scales = rng.normal(size=(n_out, n_blocks)).astype(np.float16).view(np.uint8)
        rows[:, :, at : at + 2 or None] = scales.reshape(n_out, n_blocks, 2)
        rows = rows.reshape(n_out, -1)
        x = rng.normal(size=(n_columns, n_blocks * block)).astype(np.float32)
        wanted = kernels.PackedMatrix(name, rows, n_blocks * block).multiply(x)
        seen = kernels.DeviceMatrix(name, rows, n_blocks * block).multiply(x)
        assert np.array_equal(seen.view(np.uint32), wanted.view(np.uint32)), name
"""
ONE = """
usable, why = kernels.open_opencl()
print(why)
try:
    matrix = kernels.DeviceMatrix("tq2_0", np.zeros((8, 66), np.uint8), 256)
    for _ in range(2):
        try:
            matrix.multiply(np.ones((1, 256), np.float32))
            print("fine")
        except NexusError as error:
            print(error)
except NexusError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def fake(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = os.environ.get("CC", "cc")
    if shutil.which(compiler) is None:
        pytest.skip("there is no C compiler to build the library with")
    library = tmp_path_factory.mktemp("opencl") / "libfake.so"
    source = repository / "tests" / "native" / "fake_opencl.c"
    flags = "-std=gnu11 -Wall -Wextra -Werror -O1 -fPIC -shared".split()
    command = [compiler, *flags, str(source), "-o", str(library), "-ldl"]
    subprocess.run(command, check=True)
    return library


def python(code: str, library: str | Path, **environment: str) -> str:
    """Run `code` in a process of its own, since a device is looked for once; return its output."""
    done = subprocess.run(
        # Appended: the checkout's nexus_ext must not hide the installed one.
        [sys.executable, "-c", f"import sys\nsys.path.append({str(ROOT)!r})\n{SETUP}{code}"],
        env={**os.environ, "NEXUS_OPENCL_LIBRARY": str(library), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_kernels_give_the_bits_of_the_cpu(fake: Path) -> None:
    python(PRODUCT, fake)


def test_a_real_device_gives_the_bits_of_the_cpu() -> None:
    usable, why = kernels.open_opencl()
    if not usable:
        pytest.skip(why)
    scope = {"np": np, "kernels": kernels, "rng": np.random.default_rng(1)}
    exec(PRODUCT, scope)


def test_without_a_library_it_says_so() -> None:
    out = python(ONE, ABSENT).splitlines()
    assert out[0].startswith("there is no OpenCL: ") and ABSENT in out[0]
    assert out[1].startswith(out[0])  # of the error


def test_a_library_that_is_no_opencl_is_named(tmp_path: Path) -> None:
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        pytest.skip("there is no C compiler to build the library with")
    library = tmp_path / "libempty.so"
    empty = tmp_path / "empty.c"
    empty.write_text("int nothing;\n")
    subprocess.run([compiler, "-shared", "-fPIC", empty, "-o", library], check=True)
    assert "has no clGetPlatformIDs" in python(ONE, library)


@pytest.mark.parametrize(
    ("devices", "wanted"),
    [
        ("cpu,gpu", "opencl: fake gpu"),
        ("coarse,cpu", "opencl: fake cpu"),
        ("coarse", "none of OpenCL's 1 devices rounds to the nearest"),
        (",", "OpenCL has no device (1 platforms, status 0)"),
    ],
)
def test_which_device_is_taken(fake: Path, devices: str, wanted: str) -> None:
    out = python("print(kernels.open_opencl()[1])", fake, FAKE_OPENCL_DEVICES=devices)
    assert out.startswith(wanted)


def test_a_device_can_be_asked_for(fake: Path) -> None:
    code = "print(kernels.open_opencl()[1])"
    devices = {"FAKE_OPENCL_DEVICES": "gpu,cpu"}
    assert python(code, fake, NEXUS_OPENCL_DEVICE="cpu", **devices) == "opencl: fake cpu\n"
    out = python(code, fake, NEXUS_OPENCL_DEVICE="H100", **devices)
    assert out == "none of OpenCL's 2 devices rounds to the nearest and is called H100\n"


@pytest.mark.parametrize(
    ("fails", "wanted"),
    [
        ("GetPlatformIDs:1", "OpenCL has no device (0 platforms, status -5)"),
        ("GetDeviceIDs:1", "OpenCL has no device (1 platforms, status 0)"),
        ("CreateContext:1", "OpenCL's clCreateContext failed with -4"),
        ("CreateCommandQueue:1", "OpenCL's clCreateCommandQueue failed with -4"),
        ("CreateProgramWithSource:1", "OpenCL's clCreateProgramWithSource failed with -4"),
        ("BuildProgram:1", "cannot compile our kernels (-5): the fake compiler is tired"),
        ("CreateKernel:3", "OpenCL's clCreateKernel failed with -4"),
    ],
)
def test_a_device_that_cannot_be_opened_is_no_device(fake: Path, fails: str, wanted: str) -> None:
    first, second = python(ONE, fake, FAKE_OPENCL_FAIL=fails).splitlines()
    assert wanted in first
    assert wanted in second


@pytest.mark.parametrize("call", ["CreateBuffer", "EnqueueWriteBuffer"])
def test_a_matrix_that_has_no_room(fake: Path, call: str) -> None:
    for number in (1, 2):
        out = python(ONE, fake, FAKE_OPENCL_FAIL=f"{call}:{number}").splitlines()
        assert len(out) == 2
        assert f"cl{call} failed with -" in out[1]


@pytest.mark.parametrize(
    "fails",
    [
        "CreateBuffer:3",
        "EnqueueWriteBuffer:3",
        "SetKernelArg:8",
        "EnqueueNDRangeKernel:1",
        "EnqueueReadBuffer:1",
    ],
)
def test_a_product_that_fails_is_an_error_and_the_next_one_works(fake: Path, fails: str) -> None:
    _, first, second = python(ONE, fake, FAKE_OPENCL_FAIL=fails).splitlines()
    assert f"cl{fails.partition(':')[0]} failed with -" in first
    assert second == "fine"


MODEL = """
from contextlib import closing
from nexus_ext import Llama
from tests.integration.streaming import SMALL, logits, prompt, stock
arguments = {**SMALL, "n_ctx": 256, "logits_all": True}
tokens = prompt(9, 300)
with stock(path, n_ctx=256) as llm:
    wanted = logits(llm, tokens, n_decode=2)
with closing(Llama(path, ram="2G", kernels="opencl", **arguments)) as llm:
    try:
        assert np.array_equal(logits(llm, tokens, n_decode=2), wanted)
    except NexusError as error:
        print(error)
        assert np.array_equal(logits(llm, tokens, n_decode=2), wanted)
    print(llm.nexus.model.own_products()["opencl"] > 0)
"""


def run_model(library: str | Path, **environment: str) -> list[str]:
    path = find_model("bitllama-3M-tq2_0.gguf")
    needs_same_bits(same_bits("tq2_0"), "tq2_0")
    return python(f"path = {str(path)!r}\n{MODEL}", library, **environment).splitlines()


def test_a_model_on_the_device_gives_the_bits_of_stock(fake: Path) -> None:
    assert run_model(fake) == ["True"]


def test_a_device_that_fails_in_a_token_is_named_and_the_next_one_works(fake: Path) -> None:
    named, on_device = run_model(fake, FAKE_OPENCL_FAIL="EnqueueNDRangeKernel:5")
    assert "the product with blk." in named and "clEnqueueNDRangeKernel failed with -5" in named
    assert on_device == "True"


def test_a_model_without_a_device_is_computed_by_the_cpu() -> None:
    assert run_model(ABSENT) == ["False"]


def test_without_a_device_a_matrix_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "open_opencl", lambda: (False, "there is no OpenCL: of course"))
    with pytest.raises(UsageError, match="of course"):
        kernels.DeviceMatrix("tq2_0", np.zeros((8, 66), np.uint8), 256)
