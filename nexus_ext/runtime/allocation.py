"""From a model, a calibration text and a size to a type for each tensor.

Puts together what others do: which tensors llama.cpp would quantize (`quantize`), what each type
costs each of them (`sensitivity`), and the choice (`quality.allocation`, or a plugin's).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from nexus_ext.errors import UsageError
from nexus_ext.formats import open_gguf
from nexus_ext.formats.ggml_types import GgmlType
from nexus_ext.plugins import plugins
from nexus_ext.quality.allocation import Allocation, Choice, Item
from nexus_ext.quality.importance import ImportanceMatrix
from nexus_ext.runtime.interrupts import cleaned_up_when_ended
from nexus_ext.runtime.quantize import planned_types, type_named, weights_in
from nexus_ext.runtime.sensitivity import (
    Sensitivity,
    Tick,
    all_errors,
    measure_divergences,
    probe_groups,
    sample_size,
)
from nexus_ext.runtime.sensitivity_cache import load, sensitivity_file, store
from nexus_ext.runtime.tensor_codec import row_nbytes
from nexus_ext.runtime.weights import Weights
from nexus_ext.types import TensorInfo

# Smaller blocks stand in where rows are short.
DEFAULT_TYPES = ("Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q4_0", "Q5_0")
# These lose less than Q2_K and Q3_K of their size, but take more computing and much longer to
# quantize: they are left to who asks for them.
COMPACT_TYPES = (*DEFAULT_TYPES, "IQ3_XXS", "IQ3_S")
TYPE_SETS: Mapping[str, Sequence[str]] = {"default": DEFAULT_TYPES, "compact": COMPACT_TYPES}
_PROBE = "Q3_K"  # large enough an error to be measured, small enough to be added up
Method = Literal["measured", "error"]


def types_named(given: str) -> tuple[str, ...]:
    """Return the types that a user means: the name of a set, or types with commas between them.

    Raises UsageError for a type that ggml does not have.
    """
    if given.lower() in TYPE_SETS:
        return tuple(TYPE_SETS[given.lower()])
    return tuple(type_named(name.strip()).name for name in given.split(","))


@dataclass(frozen=True, slots=True)
class Measured:
    """All that an allocation is chosen from; sizes can then be tried without measuring again."""

    tensors: tuple[TensorInfo, ...]  # that are quantized
    sensitivities: dict[str, Sensitivity]
    n_weights: int  # of the whole model
    fixed_nbytes: int  # of what is not quantized

    def items(self) -> list[Item]:
        """Return the menus."""
        return [
            Item(
                tensor.name,
                tuple(
                    Choice(
                        name,
                        tensor.n_rows * row_nbytes(type_named(name), tensor.shape[0]),
                        found.divergence_per_error * error,
                    )
                    for name, error in found.errors.items()
                ),
            )
            for tensor in self.tensors
            for found in (self.sensitivities[tensor.name],)
        ]

    def allocation(self, bits_per_weight: float) -> Allocation:
        """Return the types for a size in bits per weight of the whole model."""
        return plugins().allocate(self.items(), self.budget_nbytes(bits_per_weight))

    def budget_nbytes(self, bits_per_weight: float) -> int:
        """Return what is left for the quantized tensors. UsageError when that is nothing."""
        budget = int(bits_per_weight * self.n_weights / 8) - self.fixed_nbytes
        if budget <= 0:
            raise UsageError(
                f"{bits_per_weight:g} bits per weight are less than what is not quantized takes "
                f"({8 * self.fixed_nbytes / self.n_weights:.2f})",
                hint="allow more",
            )
        return budget


@cleaned_up_when_ended()
def measure(
    source: str,
    imatrix: ImportanceMatrix,
    text: bytes | None,
    *,
    base: str = "q4_k_m",
    types: Sequence[str] = DEFAULT_TYPES,
    method: Method = "measured",
    n_ctx: int = 512,
    most: int = 8,
    n_threads: int = 0,
    scratch_dir: str | None = None,
    tick: Tick = lambda what, done, total: None,
) -> Measured:
    """Compute the errors of all types and, unless `method` is "error", measure sensitivities.

    What was measured before in the same way is taken from this user's cache.
    `text` is needed for "measured". Raises UsageError, FormatError, and what a run may raise.
    """
    if method == "measured" and text is None:
        raise UsageError(
            "sensitivities are measured on a text",
            hint="give one with --calibrate, or pass --sensitivity error",
        )
    catalog = open_gguf(source)
    weights = Weights(catalog)
    chosen = planned_types(source, base)
    tensors = tuple(t for t in catalog.tensors if t.name in chosen)
    if not tensors:
        raise UsageError(f"{source} has no tensor that could be quantized", hint="see inspect")
    kinds = [type_named(name) for name in types]

    def menu(tensor: TensorInfo) -> list[GgmlType]:
        fitting = [k for k in kinds if tensor.shape[0] % k.block_elements == 0]
        # Where blocks of 256 fit, the older types with blocks of 32 have nothing to add.
        large = [k for k in fitting if k.block_elements > 32 or k.name == "Q8_0"]
        found = large if len(large) > 1 else fitting
        if not found:
            raise UsageError(
                f"{tensor.name} has rows of {tensor.shape[0]} weights, which none of "
                f"{', '.join(types)} can pack",
                hint="leave --allocate out: what cannot be packed stays in F16 then"
                if "Q8_0" in types
                else "add Q8_0 to the types",
            )
        return found

    def sensitivities() -> dict[str, Sensitivity]:
        errors = all_errors(weights, tensors, menu, imatrix, n_threads=n_threads, tick=tick)
        per_error = dict.fromkeys((t.name for t in tensors), 1.0)
        if method == "error" or text is None:
            return {name: Sensitivity(errors[name], 1.0) for name in per_error}

        def probe(tensor: TensorInfo) -> GgmlType:
            fitting = menu(tensor)
            return next((k for k in fitting if k.name == _PROBE), fitting[0])

        groups = probe_groups(tensors)
        divergences = measure_divergences(
            weights,
            groups,
            probe,
            imatrix,
            text,
            n_ctx=n_ctx,
            most=most,
            n_threads=n_threads,
            scratch_dir=scratch_dir,
            tick=tick,
        )
        for group, divergence in zip(groups, divergences, strict=True):
            made = sum(errors[t.name][probe(group[0]).name] for t in group)
            for tensor in group:
                per_error[tensor.name] = divergence / made if made > 0 else 0.0
        return {name: Sensitivity(errors[name], value) for name, value in per_error.items()}

    known: dict[str, Sensitivity] | None = None
    if method == "measured" and text is not None:
        way = (base, tuple(types), n_ctx, most, len(probe_groups(tensors)), sample_size())
        file = sensitivity_file(weights, tensors, imatrix, text, *way)
        known = load(file, chosen)
        if known is None:
            known = sensitivities()
            store(file, known)
    return Measured(
        tensors=tensors,
        sensitivities=sensitivities() if known is None else known,
        n_weights=weights_in(catalog),
        fixed_nbytes=sum(t.nbytes for t in catalog.tensors if t.name not in chosen),
    )
