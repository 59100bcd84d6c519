"""`--rounding compensated`: blocks that stay blocks, less error in products, nearer predictions."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

from nexus_ext.errors import NexusError, UsageError
from nexus_ext.formats import open_gguf
from nexus_ext.formats.block_codes import block_codes
from nexus_ext.placement import PlanRequest
from nexus_ext.quality.importance import ImportanceMatrix
from nexus_ext.quality.rounding import feedback
from nexus_ext.runtime import rounding, tensor_codec
from nexus_ext.runtime.activations import Activations, Inputs, collect_products
from nexus_ext.runtime.imatrix import collect_imatrix
from nexus_ext.runtime.planning import Planned, plan_model
from nexus_ext.runtime.quality import compare_models
from nexus_ext.runtime.quantize import Quantized, quantize, type_named
from nexus_ext.runtime.rounding import Compensated, compensate
from nexus_ext.runtime.weights import Weights
from nexus_ext.testing.synthetic import MoeDims, write_moe
from tests.cli_support import call
from tests.models_folder import find_model
from tests.stories import STORIES
from tests.trained_model import write_trained_f16

N_CTX = 64
HALF = STORIES.index(b"\n", len(STORIES) // 2) + 1
REQUEST = PlanRequest(
    n_ctx=N_CTX, n_batch=N_CTX, n_ubatch=N_CTX, n_threads=2, gpu_bytes=0, logits_all=True
)
GATE, UP, DOWN = (f"blk.1.ffn_{kind}.weight" for kind in ("gate", "up", "down"))


class Model(NamedTuple):
    path: str
    planned: Planned
    imatrix: ImportanceMatrix

    def products(self, wanted: list[Inputs]) -> list[Any]:
        return collect_products(
            self.path, wanted, STORIES, self.planned, REQUEST, n_ctx=N_CTX, most=20
        )

    def rounded(
        self, target: Path, base: str, types: dict[str, str] | None = None, **options: Any
    ) -> tuple[Quantized, Compensated]:
        """Quantize with compensation, calibrated on STORIES."""
        found: list[Compensated] = []

        def finish(path: str) -> None:
            found.append(
                compensate(
                    self.path,
                    path,
                    STORIES,
                    self.imatrix,
                    self.planned,
                    REQUEST,
                    n_ctx=N_CTX,
                    **{"most": 20, **options},
                )
            )

        made = quantize(self.path, target, base, imatrix=self.imatrix, types=types, finish=finish)
        return made, found[0]


def opened(path: str) -> Model:
    planned = plan_model(path, REQUEST)
    imatrix = collect_imatrix(path, STORIES, planned, REQUEST, n_ctx=N_CTX, most=20)
    return Model(path, planned, imatrix)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return opened(write_trained_f16(tmp_path_factory.mktemp("trained") / "f16.gguf"))


@pytest.fixture(scope="module")
def small() -> Model:
    """Rows of 64: Q4_0 and the like."""
    return opened(str(find_model("stories260K-f32.gguf")))


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = tmp_path_factory.mktemp("moe") / "moe.gguf"
    dims = MoeDims(n_layers=1, n_experts=8, n_used=2)
    [written] = write_moe(path, arch="qwen3moe", dims=dims, quant="F16")
    return opened(str(written))


def matrix(path: str, name: str, expert: int = 0) -> npt.NDArray[np.float64]:
    weights = Weights(open_gguf(path))
    tensor = weights.tensors[name]
    n = tensor.n_rows // (tensor.shape[2] if len(tensor.shape) > 2 else 1)
    return weights.rows(tensor, slice(expert * n, (expert + 1) * n)).astype(np.float64)


# -- blocks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", block_codes())
def test_codes_are_those_that_ggml_reads_and_go_back_where_they_were(name: str) -> None:
    kind, codes_of = type_named(name), block_codes()[name]
    rows = np.random.default_rng(1).normal(0, 1, (9, 2 * kind.block_elements)).astype(np.float32)
    data = tensor_codec.encode(kind, rows)
    blocks = np.frombuffer(data, np.uint8).reshape(-1, kind.block_nbytes).copy()
    codes = codes_of.take(blocks)
    assert codes.max() < len(codes_of.levels)
    again = blocks.copy()
    codes_of.put(again, codes)
    assert again.tobytes() == data
    codes_of.put(again, np.zeros_like(codes))
    assert again.tobytes() != data
    # Whatever the codes, ggml reads base + step * levels[code], with base and step of the scales.
    levels = np.array(codes_of.levels, np.float64)
    n = kind.block_elements

    def read(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
        codes_of.put(again, codes)
        return tensor_codec.decode(kind, again.tobytes(), n).astype(np.float64)

    zero = read(np.zeros_like(codes))
    last = read(np.full_like(codes, len(levels) - 1))
    step = (last - zero) / (levels[-1] - levels[0])
    tried = np.random.default_rng(2).integers(0, len(levels), codes.shape).astype(np.uint8)
    for chosen in (codes, tried):
        expected = zero + step * (levels[chosen] - levels[0])
        np.testing.assert_allclose(read(chosen), expected, atol=1e-5)


@pytest.mark.parametrize("name", block_codes())
def test_products_err_less_than_with_nearest_rounding(name: str, trained: Model) -> None:
    kind = type_named(name)
    rows = matrix(trained.path, GATE)[:96].astype(np.float32)
    # These weights are on the grid of Q4_K as they are.
    rows *= np.random.default_rng(1).uniform(0.9, 1.1, rows.shape).astype(np.float32)
    [[gram]] = trained.products([Inputs(GATE, rows.shape[1], 0, 1)])
    plain = tensor_codec.encode(kind, rows, trained.imatrix.entries[GATE].mean_squares[0])
    costs = []
    for data in (plain, rounding.encode(kind, rows, feedback(gram, kind.block_elements))):
        assert len(data) == len(plain)
        e = (rows - tensor_codec.decode(kind, data, rows.shape[1])).astype(np.float64)
        costs.append(float(((e @ gram) * e).sum()))
    assert costs[1] < 0.75 * costs[0]


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q6_K", "Q8_0", "IQ4_XS"])
def test_inputs_that_have_nothing_in_common_change_no_code(name: str) -> None:
    kind = type_named(name)
    rows = np.random.default_rng(3).normal(0, 1, (16, 512)).astype(np.float32)
    known = feedback(np.eye(512, dtype=np.float32), kind.block_elements)
    mine = rounding.encode(kind, rows, known)
    ggml = tensor_codec.encode(kind, rows, known.remaining)
    a, b = (tensor_codec.decode(kind, data, 512) for data in (mine, ggml))
    # Same scales; ggml itself does not always take the nearest code.
    assert np.square(rows - a).sum() <= np.square(rows - b).sum()
    assert (a == b).mean() > 0.9


# -- products of channels -------------------------------------------------------------------------


def test_products_of_channels_agree_with_the_sums_of_squares(trained: Model, moe: Model) -> None:
    [gate, down] = trained.products([Inputs(GATE, 256, 0, 1), Inputs(DOWN, 768, 0, 1)])
    for name, found in ((GATE, gate), (DOWN, down)):
        sums = trained.imatrix.entries[name].sums[0]
        np.testing.assert_allclose(found[0].diagonal(), sums, rtol=1e-4)
        np.testing.assert_allclose(found[0], found[0].T, rtol=1e-4, atol=1e-4 * sums.max())
        assert np.linalg.eigvalsh(found[0].astype(np.float64)).min() > -1e-3 * sums.max()
    name = "blk.0.ffn_down_exps.weight"
    [some] = moe.products([Inputs(name, 64, 2, 5)])
    entry = moe.imatrix.entries[name]
    assert entry.counts[2:5].any()
    np.testing.assert_allclose(np.einsum("mii->mi", some), entry.sums[2:5], rtol=1e-4)


def test_a_model_without_finite_values_is_said_to_have_none(trained: Model, tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    shutil.copyfile(trained.path, path)
    tensor = next(t for t in open_gguf(path).tensors if t.name == "blk.1.ffn_norm.weight")
    with open(path, "r+b") as file:
        file.seek(tensor.offset)
        file.write(np.full(4, np.nan, np.float32).tobytes())
    broken = Model(str(path), plan_model(path, REQUEST), trained.imatrix)
    with pytest.raises(NexusError, match="not finite"):
        broken.products([Inputs(GATE, 256, 0, 1)])


def test_vectors_that_were_not_kept_are_an_error(trained: Model) -> None:
    with Activations([GATE]) as activations:
        assert activations.rows(0)[0].shape == (0, 0)
        with pytest.raises(Exception, match="activations"):
            activations.rows(1)


# -- whole models ---------------------------------------------------------------------------------


def test_a_model_predicts_more_like_its_original(trained: Model, tmp_path: Path) -> None:
    types = {UP: "IQ3_S"}
    plain = quantize(
        trained.path, tmp_path / "a.gguf", "q3_k_m", imatrix=trained.imatrix, types=types
    )
    made, what = trained.rounded(tmp_path / "b.gguf", "q3_k_m", types)
    assert made.nbytes == plain.nbytes and made.tensor_types == plain.tensor_types
    assert open_gguf(made.path).header == open_gguf(plain.path).header
    matrices = {t.name for t in open_gguf(made.path).tensors if len(t.shape) == 2}
    assert sorted([*what.rounded, *what.left]) == sorted(matrices)
    assert what.left == {
        "token_embd.weight": "no input of it was seen",
        UP: "IQ3_S has codes for several weights at once",
    }
    for name in what.left:
        np.testing.assert_array_equal(matrix(made.path, name), matrix(plain.path, name))
    assert what.n_passes == 1
    a, b = (
        compare_models(path, trained.path, STORIES[HALF:], REQUEST).kl_mean.value
        for path in (plain.path, made.path)
    )
    assert b < 0.85 * a


def test_passes_over_the_text_change_nothing_but_memory(
    small: Model, moe: Model, tmp_path: Path
) -> None:
    for model, base, nbytes in ((small, "iq4_nl", 8 * 4 * 64**2), (moe, "q4_0", 3 * 4 * 128**2)):
        at_once, one = model.rounded(tmp_path / f"{base}-1.gguf", base, most=2)
        in_parts, several = model.rounded(
            tmp_path / f"{base}-2.gguf", base, products_nbytes=nbytes, most=2
        )
        assert one.n_passes == 1 < several.n_passes
        assert sorted(one.rounded) == sorted(several.rounded)
        assert Path(at_once.path).read_bytes() == Path(in_parts.path).read_bytes()


def test_each_expert_goes_by_the_tokens_that_reach_it(moe: Model, tmp_path: Path) -> None:
    name = "blk.0.ffn_gate_exps.weight"
    plain = quantize(moe.path, tmp_path / "a.gguf", "q4_0", imatrix=moe.imatrix)
    made, what = moe.rounded(tmp_path / "b.gguf", "q4_0")
    assert name in what.rounded
    [grams] = moe.products([Inputs(name, 128, 0, 8)])
    used = moe.imatrix.entries[name].counts > 0
    assert used.any()
    for expert in np.flatnonzero(used):
        costs = []
        for path in (plain.path, made.path):
            e = matrix(moe.path, name, expert) - matrix(path, name, expert)
            costs.append(float(((e @ grams[expert]) * e).sum()))
        assert costs[1] < costs[0]


def test_a_failure_leaves_no_file(trained: Model, tmp_path: Path) -> None:
    target = tmp_path / "q.gguf"

    def finish(path: str) -> None:
        compensate(
            trained.path,
            path,
            b"Too short.",
            trained.imatrix,
            trained.planned,
            REQUEST,
            n_ctx=N_CTX,
        )

    with pytest.raises(UsageError, match="windows of 64 need"):
        quantize(trained.path, target, "q3_k_m", finish=finish)
    assert list(tmp_path.iterdir()) == []


def test_the_command_rounds_with_compensation(small: Model, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(STORIES)
    target = tmp_path / "q.gguf"
    common = ("quantize", small.path, "-o", target, "--base", "q4_0", "-c", "64", "-t", "2")
    refused = call(*common, "--rounding", "compensated")
    assert refused.status == 2 and "goes by a text" in refused.err
    common += ("--calibrate", text, "--rounding", "compensated", "--windows", "4")
    done = call(*common, "--json")
    assert done.status == 0, done.err
    names = set(done.json["compensated"])
    assert names >= {"blk.0.attn_q.weight", "blk.4.ffn_up.weight"}
    again = call(*common, "--force")
    assert again.status == 0, again.err
    assert f"rounded with compensation: {len(names)} tensors" in again.out
    assert "rounded to nearest, the first: token_embd.weight, because" in again.err
