"""What plugins can add beside what is there: containers, stores, kernels, routes, metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from nexus_ext.formats.sources import Source
    from nexus_ext.store import ModelName, StoredModel
    from nexus_ext.types import Catalog

Progress = Callable[[int, int], None]  # (done, total) bytes


@runtime_checkable
class FormatReader(Protocol):
    """Opens models in a container that nexus_ext does not know."""

    name: str  # [a-z0-9][a-z0-9._-]{0,31}; becomes Catalog.container

    def claims(self, path: str, start: bytes) -> bool:
        """Tell whether this is such a file, by its first bytes (at most 4096)."""
        ...

    def open(self, path: str) -> Catalog:
        """Return the catalog of the model; `nexus_ext.hooks.foreign_catalog` makes it.

        Tensors must lie in the files as ggml wants them: then they are streamed like those of a
        GGUF. Raises FormatError for a broken file.
        """
        ...


@runtime_checkable
class FormatWriter(Protocol):
    """Writes models in a container that nexus_ext does not know."""

    name: str

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Endings of the files that it writes, for instance (".weights",)."""
        ...

    def write(
        self, source: Source, target: str, *, overwrite: bool, progress: Progress
    ) -> Sequence[str]:
        """Write the model `source` to `target` and return the paths that were written.

        Raises WriteFailed, and UsageError where `target` exists and `overwrite` is false.
        """
        ...


@runtime_checkable
class ModelStore(Protocol):
    """A place with models that have names."""

    name: str  # [a-z0-9][a-z0-9._-]{0,31}; becomes StoredModel.origin

    def find(self, name: ModelName) -> StoredModel | None:
        """Return the model of that exact name, or None. Raises FormatError for a broken entry."""
        ...

    def names(self) -> Sequence[ModelName]:
        """Return all names."""
        ...


@dataclass(frozen=True, slots=True)
class StorePlaces:
    """Where the configuration says that models are. None: at the default place; "": nowhere."""

    ollama: str | None = None
    lm_studio: str | None = None


@dataclass(frozen=True, slots=True)
class KernelInfo:
    """A product that a kernel may claim: weights of one type, and an operation."""

    op: str  # "MUL_MAT"
    type_name: str  # of the weights, for instance "TQ2_0"
    n_in: int  # input channels: the length of a row
    n_out: int  # rows


@runtime_checkable
class KernelProvider(Protocol):
    """Computes products of resident weights with a C function of its own."""

    name: str
    function: int  # address of an `nxp_kernel` of nexus_plugin.h; the object keeps it alive

    def claims(self, info: KernelInfo) -> bool:
        """Tell whether the function computes this product. Asked once for each tensor."""
        ...


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """The server that routes are added to."""

    paths: tuple[str, ...]  # that are taken


@runtime_checkable
class MetricsCollector(Protocol):
    """Contributes to /metrics; as `prometheus_client` has it."""

    def collect(self) -> Iterable[Metric]:
        """Return what is to be shown now. Called once for each request of /metrics."""
        ...
