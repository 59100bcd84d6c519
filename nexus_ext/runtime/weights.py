"""Rows of a model's weights as arrays, read as they are asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from nexus_ext.errors import ReadFailed
from nexus_ext.formats.ggml_types import GgmlType, ggml_types
from nexus_ext.runtime import tensor_codec
from nexus_ext.types import Catalog, TensorInfo

if TYPE_CHECKING:
    from nexus_ext.formats.nxf_reader import NxfReader


def kind_of(tensor: TensorInfo) -> GgmlType:
    """Return the ggml type of a tensor."""
    return next(k for k in ggml_types().values() if k.name == tensor.type_name)


class Weights:
    """The tensors of a model. A row is one output channel; experts follow one another."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self.tensors = {t.name: t for t in catalog.tensors}
        self._reader: NxfReader | None = None
        if catalog.chunks is not None:
            from nexus_ext.formats.nxf_reader import NxfReader

            self._reader = NxfReader(catalog.files[0].path)
            return
        try:
            self._files = [np.memmap(f.path, np.uint8, mode="r") for f in catalog.files]
        except OSError as error:
            raise ReadFailed(
                f"the weights cannot be read: {error}", hint="check that the files exist"
            ) from error

    def encoded(self, tensor: TensorInfo) -> npt.NDArray[np.uint8]:
        """Return the bytes of a tensor, shape (n_rows, row_nbytes)."""
        if self._reader is not None:
            data = np.frombuffer(self._reader.tensor(tensor.name), np.uint8)
        else:
            file = self._files[tensor.file]
            data = file[tensor.offset : tensor.offset + tensor.nbytes]
        return data.reshape(tensor.n_rows, tensor.row_nbytes)

    def first_row(self, tensor: TensorInfo) -> bytes:
        """Return the bytes of the first row of a tensor, reading little more than that."""
        if self._reader is None:
            return bytes(self.encoded(tensor)[0])
        return self._reader.part(tensor.name, 0, tensor.row_nbytes)

    def rows(
        self, tensor: TensorInfo, which: slice | npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        """Return some rows in float32, shape (n, n_in)."""
        data = np.ascontiguousarray(self.encoded(tensor)[which])
        return tensor_codec.decode(kind_of(tensor), data.data.cast("B"), tensor.shape[0])
