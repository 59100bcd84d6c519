"""What is installed: names, binaries, metadata, and what importing costs."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from importlib.metadata import distribution, entry_points
from pathlib import Path
from types import ModuleType

import pytest

import nexus_ext
from nexus_ext import _native

HEAVY = ("numpy", "llama_cpp", "gguf", "highspy", "rich", "cffi", "_cffi_backend")


def loaded_by(code: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter has loaded after running `code`."""
    program = f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return {name.split(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


def build_script(repository: Path) -> ModuleType:
    path = repository / "nexus_ext" / "native" / "cffi" / "build.py"
    spec = importlib.util.spec_from_file_location("nexus_cffi_build", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_formats_and_integrations_are_installed_inside_the_package() -> None:
    import nexus_ext.formats
    import nexus_ext.integrations

    assert nexus_ext.formats.__name__ == "nexus_ext.formats"
    assert nexus_ext.integrations.__name__ == "nexus_ext.integrations"
    names = {str(p).split("/")[0] for p in distribution("nexus_ext").files or ()}
    assert not names & {"formats", "integrations", "plugins", "tests"}


def test_the_three_binaries_lie_side_by_side() -> None:
    assert _native.__file__ is not None
    directory = Path(_native.__file__).parent
    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    for name in ("libnexus_core" + suffix, "libggml-nexus" + suffix, "_native.abi3.so"):
        assert (directory / name).is_file(), name


def test_python_and_the_native_core_are_of_one_version() -> None:
    native = _native.ffi.string(_native.lib.nx_version()).decode()
    assert native == nexus_ext.__version__ == distribution("nexus_ext").version


def test_the_native_core_describes_every_status() -> None:
    lib = _native.lib
    names = [name for name in dir(lib) if name == "NX_OK" or name.startswith("NX_E_")]
    texts = {_native.ffi.string(lib.nx_status_text(getattr(lib, name))) for name in names}
    assert len(texts) == len(names) > 1


def test_the_binaries_need_no_ggml_and_no_libpython() -> None:
    if sys.platform != "linux":
        pytest.skip("reads the dynamic section of ELF files")
    assert _native.__file__ is not None
    for path in Path(_native.__file__).parent.glob("*.so"):
        needed = needed_libraries(path)
        assert not [n for n in needed if "ggml" in n or "llama" in n or "python" in n], path.name
        if path.name != "libnexus_core.so":
            assert "libnexus_core.so" in needed


def needed_libraries(path: Path) -> list[str]:
    """Return DT_NEEDED of a little-endian ELF64 file."""
    import struct

    data = path.read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01"
    (section_offset,) = struct.unpack_from("<Q", data, 0x28)
    section_size, n_sections = struct.unpack_from("<HH", data, 0x3A)
    sections = [
        struct.unpack_from("<IIQQQQII", data, section_offset + i * section_size)
        for i in range(n_sections)
    ]
    dynamic = next(s for s in sections if s[1] == 6)  # SHT_DYNAMIC
    strings = sections[dynamic[6]][4]  # sh_link: its string table
    found = []
    for at in range(dynamic[4], dynamic[4] + dynamic[5], 16):
        tag, value = struct.unpack_from("<qQ", data, at)
        if tag == 1:  # DT_NEEDED
            found.append(data[strings + value : data.index(b"\0", strings + value)].decode())
    return found


def test_the_generated_module_is_what_the_declarations_give(repository: Path) -> None:
    import cffi

    script = build_script(repository)
    committed = (repository / "nexus_ext/native/cffi/_native.c").read_text(encoding="utf-8")
    first_line = committed.splitlines()[0]
    fix = "run python nexus_ext/native/cffi/build.py"
    assert script.digest() in first_line, fix
    # Another cffi may write other boilerplate around the same declarations.
    if f"cffi {cffi.__version__} " in first_line:
        assert script.generate() == committed, fix


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert not loaded_by("import nexus_ext") & {*HEAVY, "click", "pluggy"}


def test_help_loads_nothing_heavy() -> None:
    code = """
from nexus_ext.cli import main
import sys
sys.argv = ["nexus", "--help"]
try:
    main()
except SystemExit:
    pass
"""
    assert not loaded_by(code) & {*HEAVY}


def test_listing_plugins_loads_nothing_heavy() -> None:
    assert not loaded_by("import nexus_ext; nexus_ext.list_plugins()") & {*HEAVY, "click"}


@pytest.mark.parametrize("name", nexus_ext.__all__)
def test_every_public_name_can_be_had(name: str) -> None:
    assert getattr(nexus_ext, name) is not None
    assert name in dir(nexus_ext)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        nexus_ext.no_such_name  # noqa: B018


def test_the_command_is_an_entry_point() -> None:
    (command,) = (e for e in entry_points(group="console_scripts") if e.name == "nexus")
    assert command.value == "nexus_ext.cli:main"
    assert callable(command.load())
    assert importlib.import_module("nexus_ext.cli").main is command.load()
