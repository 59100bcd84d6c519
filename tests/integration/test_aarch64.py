"""Kernels and decoder for ARM, cross-compiled and run under emulation, where there are both."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64-static"
KERNELS = (
    *("kernels", "kernels_ref", "kernels_avx2", "kernels_avx512", "kernels_neon"),
    *("kernels_avx2_stored", "kernels_avx512_stored", "kernels_neon_stored"),
    *("residual", "ternary", "ternary_stored"),
)
CODEC = ("codec_ans_decode", "codec_ans_encode", "codec_ans_simd", "codec_ans_neon", "xxh3")
# What ternary.c needs of model.c.
MEMORY = """
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
void *nx_memory_map(uint64_t n);
void nx_memory_unmap(void *p, uint64_t n);
void *nx_memory_map(uint64_t n) {
    void *p = aligned_alloc(64, (n + 63) / 64 * 64);
    if (p) memset(p, 0, n);
    return p;
}
void nx_memory_unmap(void *p, uint64_t n) { (void)n; free(p); }
"""


@pytest.mark.parametrize(
    ("name", "files"), [("residual", KERNELS), ("ternary", KERNELS), ("codec", CODEC)]
)
def test_neon_gives_the_bits_of_the_reference(
    name: str, files: tuple[str, ...], repository: Path, tmp_path: Path
) -> None:
    for program in (COMPILER, EMULATOR):
        if shutil.which(program) is None:
            pytest.skip(f"there is no {program}")
    native, tests = repository / "nexus_ext" / "native", repository / "tests" / "native"
    memory, program = tmp_path / "memory.c", tmp_path / name
    memory.write_text(MEMORY)
    flags = "-static -std=c11 -ffp-contract=off -Wall -Wextra -Werror -O2 -D_GNU_SOURCE".split()
    sources = [str(native / f"{source}.c") for source in files]
    includes = [f"-I{native / 'include'}", f"-I{native}", f"-I{tests}"]
    test = str(tests / f"test_{name}.c")
    subprocess.run(
        [COMPILER, *flags, *includes, test, *sources, str(memory), "-lm", "-o", str(program)],
        check=True,
    )
    run = [EMULATOR, "-cpu", "max", str(program)]  # a CPU with the dot product instructions
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
