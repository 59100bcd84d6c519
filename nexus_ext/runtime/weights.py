"""Rows of a model's weights as arrays, read as they are asked for."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from nexus_ext.errors import ReadFailed
from nexus_ext.formats.ggml_types import GgmlType, ggml_types
from nexus_ext.runtime import tensor_codec
from nexus_ext.types import Catalog, TensorInfo


def kind_of(tensor: TensorInfo) -> GgmlType:
    """Return the ggml type of a tensor."""
    return next(k for k in ggml_types().values() if k.name == tensor.type_name)


class Weights:
    """The tensors of a model. A row is one output channel; experts follow one another."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self.tensors = {t.name: t for t in catalog.tensors}
        try:
            self._files = [np.memmap(f.path, np.uint8, mode="r") for f in catalog.files]
        except OSError as error:
            raise ReadFailed(
                f"the weights cannot be read: {error}", hint="check that the files exist"
            ) from error

    def encoded(self, tensor: TensorInfo) -> npt.NDArray[np.uint8]:
        """Return the bytes of a tensor, shape (n_rows, row_nbytes)."""
        file = self._files[tensor.file]
        data = file[tensor.offset : tensor.offset + tensor.nbytes]
        return data.reshape(tensor.n_rows, tensor.row_nbytes)

    def rows(
        self, tensor: TensorInfo, which: slice | npt.NDArray[np.int64]
    ) -> npt.NDArray[np.float32]:
        """Return some rows in float32, shape (n, n_in)."""
        data = np.ascontiguousarray(self.encoded(tensor)[which])
        return tensor_codec.decode(kind_of(tensor), data.data.cast("B"), tensor.shape[0])
