"""Batches to tensors: what a training loop receives. torch is imported by the calls, not by the module."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hbx_gpu.batch import DenseBatch, MultimodalBatch, SparseBatch
from hbx_gpu.buffers import POOL
from hbx_gpu.transforms import Transform


@dataclass(frozen=True, slots=True)
class DenseCollate:
    """Sparse batches to dense tensors of any float dtype, counts transformed on the way.

    Attributes
    ----------
    dtype
        ``"float32"``, ``"float64"``, ``"float16"`` or ``"bfloat16"``.
    transform
        Steps from :mod:`hbx_gpu.transforms`, done in float32 before rounding to `dtype`.
    """

    dtype: str = "float32"
    transform: Transform | None = None

    def __call__(self, batch: SparseBatch) -> dict[str, Any]:
        """See :func:`sparse_to_dense_collate`."""
        import torch

        from hbx_gpu.engine.host.dense import densify

        x = torch.from_numpy(densify(batch, dtype=self.dtype, transform=self.transform, pool=POOL))
        if self.dtype == "bfloat16":  # NumPy has no such type: the bits came as uint16
            x = x.view(torch.bfloat16)
        return {"X": x, **_metadata_tensors(batch.metadata)}

    def nbytes(self, n_rows: int, n_features: int) -> int:
        """Bytes of `X` for a batch of n_rows."""
        return n_rows * n_features * (2 if self.dtype.endswith("16") else int(self.dtype[-2:]) // 8)


def sparse_to_dense_collate(batch: SparseBatch) -> dict[str, Any]:
    """A sparse batch as a dense tensor.

    Parameters
    ----------
    batch
        Rows of a sparse feature space. Columns that repeat within a row are summed.

    Returns
    -------
    dict
        ``X``: float32 CPU tensor (n_rows, n_features); counts above 2**24 lose precision. Beside it one
        entry per metadata column: a tensor for numeric columns and codes, else the NumPy array.

    Raises
    ------
    ValueError
        A metadata column is called ``X``.
    """
    return DenseCollate()(batch)


def sparse_to_csr_collate(batch: SparseBatch) -> dict[str, Any]:
    """A sparse batch as a ``torch.sparse_csr_tensor``.

    Returns
    -------
    dict
        ``X``: float32 sparse CSR tensor (n_rows, n_features), int64 indices, ascending and unique within
        each row (repeated columns are summed), as torch requires. Metadata as in
        :func:`sparse_to_dense_collate`.

    Raises
    ------
    ValueError
        A metadata column is called ``X``.
    """
    import torch

    from hbx_gpu.engine.host.kernels import to_wide_columns

    columns = POOL.empty(len(batch.indices), np.int64)
    if to_wide_columns(batch.offsets, batch.indices, columns):
        pointers, values = batch.offsets, _float32(batch.values)
    else:
        pointers, columns, values = _canonical(batch)
    with warnings.catch_warnings():
        # torch announces once per process that CSR is in beta; every user of this collate knows.
        warnings.filterwarnings("ignore", message="Sparse", category=UserWarning)
        tensor = torch.sparse_csr_tensor(
            torch.from_numpy(pointers),
            torch.from_numpy(columns),
            torch.from_numpy(values),
            size=(len(batch), batch.n_features),
            check_invariants=False,  # canonical by construction
        )
    return {"X": tensor, **_metadata_tensors(batch.metadata)}


def _float32(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.float32:
        return values
    out = POOL.empty(len(values), np.float32)
    np.copyto(out, values, casting="unsafe")
    return out


def _canonical(batch: SparseBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row pointers, columns and values with columns ascending and unique within rows."""
    from scipy.sparse import csr_matrix

    # A copy: canonical form is made in place, and the batch may share its arrays.
    matrix = csr_matrix(
        (batch.values.astype(np.float32), batch.indices.astype(np.int64), batch.offsets),
        shape=(len(batch), batch.n_features),
    )
    matrix.sum_duplicates()
    return matrix.indptr.astype(np.int64), matrix.indices.astype(np.int64), matrix.data


def dense_to_tensor_collate(batch: DenseBatch) -> dict[str, Any]:
    """A dense batch as a tensor of its own dtype, without a copy.

    Returns
    -------
    dict
        ``X``: tensor (n_rows, n_features) or (n_rows, *per_cell_shape). Metadata as in
        :func:`sparse_to_dense_collate`.

    Raises
    ------
    ValueError
        A metadata column is called ``X``.
    """
    import torch

    return {"X": torch.from_numpy(batch.data), **_metadata_tensors(batch.metadata)}


def multimodal_to_dense_collate(batch: MultimodalBatch) -> dict[str, Any]:
    """A multimodal batch as dense tensors and presence masks.

    Returns
    -------
    dict
        ``batch[space]["X"]``: tensor (n_cells, n_features), float32 for sparse spaces and the stored dtype
        for dense ones; ``batch["present"][space]``: bool tensor (n_cells,); ``batch["metadata"][column]`` if
        metadata was requested.

    Raises
    ------
    ValueError
        A feature space is called ``present`` or ``metadata``.
    """
    import torch

    result: dict[str, Any] = {
        "present": {name: torch.from_numpy(mask) for name, mask in batch.present.items()}
    }
    if batch.metadata is not None:
        result["metadata"] = _metadata_tensors(batch.metadata)
    for name, part in batch.modalities.items():
        if name in ("present", "metadata"):
            raise ValueError(f"a field called {name!r} would overwrite the batch's own entry of that name")
        if isinstance(part, SparseBatch):
            x = sparse_to_dense_collate(part)["X"]
        else:
            x = dense_to_tensor_collate(part)["X"]
        result[name] = {"X": x}
    return result


def check_columns(names: Sequence[str]) -> None:
    """Refuse metadata columns that a batch has another meaning for.

    Raises
    ------
    ValueError
        One is called ``X``, or two have the same name.
    """
    for name in names:
        if name == "X" or names.count(name) > 1:
            raise ValueError(
                f"the metadata column {name!r} would overwrite the batch's own entry of that name; "
                "leave it out of metadata_columns, or write a collate of your own"
            )


def _metadata_tensors(metadata: Mapping[str, np.ndarray] | None) -> dict[str, Any]:
    import torch

    check_columns(list(metadata or {}))
    return {
        name: torch.from_numpy(column) if column.dtype.kind in "iuf" else column
        for name, column in (metadata or {}).items()
    }
