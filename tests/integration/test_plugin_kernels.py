"""Kernels of plugins: used where a trial finds ggml's bits, or where they are asked for."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from nexus_ext import Llama, hookimpl
from nexus_ext.plugin_registry import PluginRecord
from nexus_ext.plugins import Plugins
from nexus_ext.policies import KernelInfo
from nexus_ext.testing import load_plugins, use_plugins
from nexus_ext.testing.synthetic import write_llama
from tests.integration.streaming import SMALL, Bits, logits, prompt, stock
from tests.native_plugin import compiled, native

TOKENS = prompt(40, 400)
ARGUMENTS: dict[str, Any] = {**SMALL, "n_ctx": 128, "n_batch": 128, "logits_all": True}
N_LAYERS = 2

# Columns rounded by ggml's own function, rows multiplied by ggml's own function: its very bits.
KERNEL = """
void (*round_column)(const float *, void *, int64_t) = 0;
void (*dot)(int, float *, size_t, const void *, size_t, const void *, size_t, int) = 0;
float off = 0;
uint32_t activated = 0, multiplied = 0, least_row = 1u << 30;
static int accepts(void *user, const nxp_matrix *m) { (void)user; return !m->rows && m->n_out >= least_row; }
static uint64_t column_bytes(void *user, uint64_t n_in) { (void)user; return n_in / 32 * 36 / 64 * 64 + 64; }
static void activate(void *user, const float *x, uint64_t n_in, void *out) {
    (void)user;
    __atomic_fetch_add(&activated, 1, __ATOMIC_RELAXED);
    round_column(x, out, (int64_t)n_in);
}
static void multiply(void *user, const nxp_matrix *m, const void *columns, uint64_t stride, uint32_t n_columns,
                     uint64_t begin, uint64_t end, float *y, uint64_t y_stride) {
    (void)user;
    __atomic_fetch_add(&multiplied, 1, __ATOMIC_RELAXED);
    for (uint32_t c = 0; c < n_columns; c++)
        for (uint64_t o = begin; o < end; o++) {
            float *at = &y[c * y_stride + o];
            dot((int)m->n_in, at, 0, (const char *)m->rows + o * m->row_bytes, 0, (const char *)columns + c * stride, 0, 1);
            *at += off;
        }
}
nxp_kernel kernel = {
    .head = NXP_HEAD(nxp_kernel, NXP_KERNEL, "borrowed"), .type = "q5_1", .accepts = accepts,
    .column_bytes = column_bytes, .activate = activate, .multiply = multiply,
};
nxp_kernel half = {
    .head = NXP_HEAD(nxp_kernel, NXP_KERNEL, "half"), .type = "q5_1", .activate = activate, .multiply = multiply,
};
nxp_kernel other = {.head = NXP_HEAD(nxp_kernel, NXP_KERNEL, "other"), .type = "q8_0", .multiply = multiply};
nxp_kernel newer = {.head = {sizeof(nxp_kernel), 2, NXP_KERNEL, 0, "newer"}, .type = "q5_1", .multiply = multiply};
"""  # noqa: E501


class _Traits(ctypes.Structure):
    _fields_ = (
        ("from_float", ctypes.c_void_p),
        ("vec_dot", ctypes.c_void_p),
        ("vec_dot_type", ctypes.c_int),
        ("nrows", ctypes.c_int64),
    )


def cpu_traits(number: int) -> _Traits:
    """What ggml's CPU backend computes a type with."""
    # Of the copy that is loaded: another one would not have its tables.
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").split("\n")
    [path] = {line.split()[-1] for line in maps if "libggml-cpu" in line}
    function = ctypes.CDLL(path).ggml_get_type_traits_cpu
    function.restype = ctypes.POINTER(_Traits)
    traits: _Traits = function(number).contents
    return traits


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    found = compiled(tmp_path_factory.mktemp("kernel"), KERNEL)
    weights = cpu_traits(7)  # GGML_TYPE_Q5_1
    columns = cpu_traits(weights.vec_dot_type)
    ctypes.c_void_p.in_dll(found, "round_column").value = columns.from_float
    ctypes.c_void_p.in_dll(found, "dot").value = weights.vec_dot
    return found


@pytest.fixture(autouse=True)
def _as_it_was(library: ctypes.CDLL) -> None:
    ctypes.c_float.in_dll(library, "off").value = 0
    ctypes.c_uint32.in_dll(library, "least_row").value = 0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Bits]:
    path = tmp_path_factory.mktemp("kernels") / "model.gguf"
    write_llama(
        path, n_layers=N_LAYERS, n_embd=256, n_ff=512, n_heads=4, n_heads_kv=2, n_vocab=400,
        quant="Q5_1",
    )  # fmt: skip
    with stock(path, n_ctx=128, n_batch=128) as llm:
        return path, logits(llm, TOKENS)


class Provider:
    name = "borrowed"

    def __init__(self, function: Any, claims: Callable[[KernelInfo], bool] | None = None) -> None:
        self.function = function
        self.asked: list[KernelInfo] = []
        self._claims = claims or (lambda info: info.type_name == "Q5_1")

    def claims(self, info: KernelInfo) -> bool:
        self.asked.append(info)
        return self._claims(info)


def plugins_with(provider: Provider) -> Plugins:
    return load_plugins(SimpleNamespace(nexus_kernel_provider=hookimpl(lambda: provider)))


def run(
    path: Path, provider: Provider, mode: str, n_decode: int = 6
) -> tuple[Bits, dict[str, int], PluginRecord]:
    """The bits, who computed products, and what is said of the plugin."""
    plugins = plugins_with(provider)
    with use_plugins(plugins), closing(Llama(path, ram="2G", kernels=mode, **ARGUMENTS)) as llm:
        found = logits(llm, TOKENS, n_decode)
        products = {} if llm.nexus.model is None else llm.nexus.model.own_products()
        [record] = [r for r in plugins.list_plugins() if not r.builtin]
        return found, products, record


@pytest.mark.parametrize("mode", ["auto", "nexus"])
def test_a_kernel_with_ggml_s_bits_computes_what_it_claims(
    mode: str, model: tuple[Path, Bits], library: ctypes.CDLL
) -> None:
    path, bits = model
    provider = Provider(native(library, "kernel").address)
    multiplied = ctypes.c_uint32.in_dll(library, "multiplied")
    before = multiplied.value
    found, products, record = run(path, provider, mode)
    assert np.array_equal(found, bits)
    passes = 1 + 6
    assert products["plugin"] >= passes * N_LAYERS * 5  # what is Q5_1 of q, k, v, o, gate, up, down
    assert multiplied.value > before
    assert record.error == "" and record.disabled == ()
    assert {info.op for info in provider.asked} == {"MUL_MAT"}
    assert {info.n_in for info in provider.asked} >= {256, 512}


def test_columns_are_made_ready_once_for_the_weights_that_share_them(
    model: tuple[Path, Bits], library: ctypes.CDLL
) -> None:
    activated = ctypes.c_uint32.in_dll(library, "activated")
    plugins = plugins_with(Provider(native(library, "kernel").address))
    with use_plugins(plugins), closing(Llama(model[0], ram="2G", **ARGUMENTS)) as llm:
        llm.eval([1, 2, 3])
        before = activated.value
        llm.eval([4])
        products = 7 * N_LAYERS + 1
        assert 0 < activated.value - before < products


def test_a_kernel_takes_what_it_accepts(model: tuple[Path, Bits], library: ctypes.CDLL) -> None:
    path, bits = model
    _, all_of_them, _ = run(path, Provider(native(library, "kernel").address), "auto")
    ctypes.c_uint32.in_dll(library, "least_row").value = 512  # gate and up
    found, products, _ = run(path, Provider(native(library, "kernel").address), "auto")
    assert np.array_equal(found, bits)
    assert 0 < products["plugin"] < all_of_them["plugin"]


def test_other_bits_are_used_only_where_they_are_asked_for(
    model: tuple[Path, Bits], library: ctypes.CDLL
) -> None:
    path, bits = model
    ctypes.c_float.in_dll(library, "off").value = 1e-3
    provider = Provider(native(library, "kernel").address)
    found, products, record = run(path, provider, "auto")
    assert np.array_equal(found, bits) and products["plugin"] == 0
    assert "other bits than ggml's" in record.error
    found, products, _ = run(path, provider, "nexus", 0)
    assert products["plugin"] > 0 and not np.array_equal(found, bits[: len(found)])


def test_without_kernels_nobody_is_asked(model: tuple[Path, Bits], library: ctypes.CDLL) -> None:
    provider = Provider(native(library, "kernel").address)
    found, products, _ = run(model[0], provider, "ggml")
    assert np.array_equal(found, model[1]) and products == {} and provider.asked == []


def raises(info: KernelInfo) -> bool:
    raise LookupError("lost")


@pytest.mark.parametrize(
    ("symbol", "claims", "words"),
    [
        ("kernel", raises, "LookupError"),
        ("other", None, "weights of type Q5_1, but its kernel is for q8_0"),
        ("newer", None, "version 2 .* install a newer nexus_ext"),
        ("half", None, "half has no pair of `column_bytes`"),
        ("", None, "address 0"),
        ("text", None, "no address"),
    ],
)
def test_a_provider_that_cannot_be_used_is_disabled_by_name_and_ggml_computes(
    symbol: str,
    claims: Callable[[KernelInfo], bool] | None,
    words: str,
    model: tuple[Path, Bits],
    library: ctypes.CDLL,
) -> None:
    path, bits = model
    addresses: dict[str, Any] = {"": 0, "text": "0x0"}
    address = addresses[symbol] if symbol in addresses else native(library, symbol).address
    found, products, record = run(path, Provider(address, claims), "auto")
    assert np.array_equal(found, bits) and products.get("plugin", 0) == 0
    assert record.disabled == ("nexus_kernel_provider",)
    assert re.search(words, record.error)
