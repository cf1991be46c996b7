"""One modality of a dataset on its way into an atlas: what is known beforehand, how its group is written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import scipy.sparse

from hbx_gpu._advice import in_command, option
from hbx_gpu._h5ad.evidence import look_at
from hbx_gpu._h5ad.matrix import CsrBlock, Matrix, aligned, aligned_dense
from hbx_gpu._identity.choice import FeatureChoice
from hbx_gpu.atlas._ingest.inputs import Input, feature_columns
from hbx_gpu.atlas._ingest.joining import Role
from hbx_gpu.atlas._ingest.values import LayerCast
from hbx_gpu.atlas._model.spaces import FeatureSpace
from hbx_gpu.atlas._writing.arrays import DEFAULT_CHUNK, DEFAULT_SHARD, DenseGroupWriter, SparseGroupWriter
from hbx_gpu.errors import InvalidDataError

if TYPE_CHECKING:
    import pandas as pd

Tick = Callable[[int], object]


@dataclass(frozen=True)
class Storage:
    """How the arrays of a group are stored.

    Attributes
    ----------
    codec
        One of `hbx_gpu.atlas._writing.arrays.codec_names`.
    chunk, shard
        Values per inner chunk and per shard.
    """

    codec: str
    chunk: int = DEFAULT_CHUNK
    shard: int = DEFAULT_SHARD


@dataclass(frozen=True)
class Features:
    """Features of a group.

    Attributes
    ----------
    id_column
        Where the ids come from, for the record.
    ids
        Feature ids, in the order of the columns of the group.
    table
        Gives rows for the registry: those with these numbers.
    """

    id_column: str
    ids: Sequence[str]
    table: Callable[[np.ndarray], pa.Table]


class Part(ABC):
    """One modality, checked as far as that is possible without reading its values.

    Attributes
    ----------
    name
        As the user calls it.
    field_name, space
        Pointer column, and the space it points into.
    source
        Name of the source, used in error messages.
    ids
        Id of each cell of the part.
    role
        What the ids say, see `joining`.
    obs
        Columns of obs, a row per id; None where there are none.
    features
        None for spaces without.
    identity
        Columns of the dataset's row by which the same data are recognized: ``source_sha256``,
        ``source_matrix``, ``zarr_layer``, ``feature_id_column``.
    source_name
        As recorded with the dataset.
    """

    name: str
    field_name: str
    space: FeatureSpace
    source: str
    source_name: str
    ids: Sequence[str]
    role: Role
    obs: pd.DataFrame | None
    features: Features | None
    identity: Mapping[str, str]

    def order_features(self, order: Callable[[str, Sequence[str]], np.ndarray]) -> None:  # noqa: B027
        """Store columns in the order of the registry, if the format of the group leaves that open.

        Parameters
        ----------
        order
            Positions of feature ids in the order of the registry of a space, given the space's name and ids.
        """

    @abstractmethod
    def write(self, group: Path, scratch: Path, keep: np.ndarray, storage: Storage, tick: Tick) -> pa.Array:
        """Write the group.

        Parameters
        ----------
        group
            Its folder, to be made.
        scratch
            Existing folder for temporary files.
        keep
            bool, one per id: cells that are to be stored.
        storage
            How.
        tick
            Called with the number of cells done so far.

        Returns
        -------
        pyarrow.StructArray
            The pointers of all cells without ``zarr_group``; those of cells not kept mean nothing.

        Raises
        ------
        InvalidDataError
            A value breaks a rule of the layer.
        """


@dataclass
class MatrixPart(Part):
    """A cells x features matrix with one or several layers, for a sparse or a dense space.

    Parameters
    ----------
    name, field_name, space
        As in :class:`Part`.
    data
        The first layer with its cells and features.
    matrices
        Layer to write -> matrix, all of one shape; the first one is that of `data`.
    matrix_names
        Their names in the source, for the record.
    choice, feature_ids
        Where the ids of the columns come from, and the ids.
    allow_rounding
        Let float layers take values that float32 does not hold exactly.
    one_of_several
        Whether the user named it among several modalities, for messages.
    """

    name: str
    field_name: str
    space: FeatureSpace
    data: Input
    matrices: Mapping[str, Matrix]
    matrix_names: Sequence[str]
    choice: FeatureChoice
    feature_ids: Sequence[str]
    allow_rounding: bool = False
    one_of_several: bool = False
    role: Role = field(default="cells", init=False)
    _column: np.ndarray | None = field(default=None, init=False)  # stored column of each column of the source

    def __post_init__(self) -> None:
        self.source, self.source_name, self.obs = self.data.source, self.data.source_name, self.data.obs
        self.ids = [str(name) for name in self.data.obs.index]
        column = self.choice.column
        self.features = Features(
            column, self.feature_ids, lambda rows: feature_columns(self.data, column, self.feature_ids, rows)
        )
        self.identity = matrix_identity(self.data.sha256, self.matrix_names, list(self.matrices), self.choice)

    def order_features(self, order: Callable[[str, Sequence[str]], np.ndarray]) -> None:
        """See :class:`Part`: columns of sparse groups are renumbered, and rows sorted by them.

        Readers then meet ascending columns whatever the order of genes in the source, and need not sort. A
        source whose genes lie in that order already is stored as it is.
        """
        if self.space.pointer != "sparse" or self.data.keeps_order:
            return
        positions = order(self.space.name, self.feature_ids)
        if (positions == np.arange(len(positions))).all():
            return
        assert self.features is not None
        ids = [self.feature_ids[at] for at in positions]
        table = self.features.table
        self.features = Features(self.choice.column, ids, lambda rows: table(positions[rows]))
        self._column = np.empty(len(positions), np.int64)
        self._column[positions] = np.arange(len(positions))

    def write(self, group: Path, scratch: Path, keep: np.ndarray, storage: Storage, tick: Tick) -> pa.Array:
        """See :class:`Part`."""
        dtypes = self._dtypes()
        casts = {name: self._cast(matrix, dtypes[name]) for name, matrix in self.matrices.items()}
        write = self._write_sparse if self.space.pointer == "sparse" else self._write_dense
        return write(group, scratch, keep, storage, tick, dtypes, casts)

    def _dtypes(self) -> dict[str, str]:
        known = {**self.space.required_layers, **self.space.optional_layers}
        return {name: known[name][0] for name in self.matrices}

    def _cast(self, matrix: Matrix, dtype: str) -> LayerCast:
        first = next(iter(self.matrices))
        choose = option("layers", f"{self.name}:{first}=MATRIX" if in_command() else "...")
        choose = choose if self.one_of_several else option("layer")
        other = ", ".join(sorted(self.space.optional_layers))
        into = option("layers", f"{self.name}:LAYER={self.matrix_names[0]}" if in_command() else "...")
        into = into if self.one_of_several else option("zarr_layer")
        advice = f"The source holds the matrices {list(self.data.available)}: choose another with {choose}"
        advice += f", or store these values in another layer ({other}) with {into}." if other else "."
        cast = LayerCast(
            dtype,
            matrix.name,
            advice,
            lambda row: self.ids[row],
            lambda column: self.feature_ids[column],
            self.allow_rounding,
            lambda: str(look_at(matrix)),
        )
        cast.check_dtype(matrix.dtype)
        return cast

    def _write_sparse(
        self,
        group: Path,
        scratch: Path,
        keep: np.ndarray,
        storage: Storage,
        tick: Tick,
        dtypes: Mapping[str, str],
        casts: Mapping[str, LayerCast],
    ) -> pa.Array:
        lengths = np.zeros(len(keep), np.int64)
        writer = SparseGroupWriter(group, self.space, layers=dtypes, **vars(storage))
        try:
            for blocks in aligned(list(self.matrices.values()), scratch):
                first = blocks[0]
                self._check_structure(blocks)
                values = {
                    name: cast(block) for (name, cast), block in zip(casts.items(), blocks, strict=True)
                }
                indices, values = self._ordered(first, values)
                per_row = np.diff(first.indptr)
                kept = keep[first.first_row : first.last_row]
                if not kept.all():
                    chosen = np.repeat(kept, per_row)
                    indices = indices[chosen]
                    values = {name: array[chosen] for name, array in values.items()}
                lengths[first.first_row : first.last_row] = per_row * kept
                writer.append(indices, values)
                tick(first.last_row)
            writer.close()
        finally:
            writer.abort()
        return sparse_pointers(lengths, np.cumsum(keep) - 1)

    def _ordered(
        self, block: CsrBlock, values: dict[str, np.ndarray]
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Stored columns of a block (uint32), and its layers, each row in ascending order of them."""
        if self._column is None:
            return block.indices.astype(np.uint32, copy=False), values
        columns = self._column[block.indices]
        order = sorted_elements(block.indptr, columns, len(self._column))
        if order is None:
            return columns.astype(np.uint32), values
        return columns[order].astype(np.uint32), {name: array[order] for name, array in values.items()}

    def _check_structure(self, blocks: Sequence[CsrBlock]) -> None:
        """Element k of every layer belongs to element k of the index array: all store the same ones."""
        first, layers = blocks[0], list(self.matrices)
        for layer, block in zip(layers[1:], blocks[1:], strict=True):
            if np.array_equal(block.indptr, first.indptr) and np.array_equal(block.indices, first.indices):
                continue
            at = next(
                row
                for row in range(first.first_row, first.last_row)
                if not np.array_equal(first.rows(row, row + 1).indices, block.rows(row, row + 1).indices)
            )
            n, m = (len(part.rows(at, at + 1).indices) for part in (first, block))
            raise InvalidDataError(
                f"{self.source}: layers {layers[0]!r} and {layer!r} must store the same elements, but cell "
                f"{self.ids[at]!r} (row {at}) has {n} in one and {m} in the other"
                f"{', of other features or in another order' if n == m else ''}; make them alike "
                "(same nonzeros, same order), or ingest one layer"
            )

    def _write_dense(
        self,
        group: Path,
        scratch: Path,
        keep: np.ndarray,
        storage: Storage,
        tick: Tick,
        dtypes: Mapping[str, str],
        casts: Mapping[str, LayerCast],
    ) -> pa.Array:
        width = (len(self.feature_ids),)
        writer = DenseGroupWriter(group, self.space, layers=dtypes, row_shape=width, **vars(storage))
        try:
            for blocks in aligned_dense(list(self.matrices.values()), scratch):
                first = blocks[0]
                kept = keep[first.first_row : first.last_row]
                pairs = zip(casts.items(), blocks, strict=True)
                writer.append({name: cast(block)[kept] for (name, cast), block in pairs})
                tick(first.last_row)
            writer.close()
        finally:
            writer.abort()
        return dense_pointers(np.cumsum(keep) - 1)


def matrix_identity(
    sha256: str, matrices: Sequence[str], layers: Sequence[str], choice: FeatureChoice
) -> dict[str, str]:
    """Columns of a dataset's row by which the same matrices of the same file are recognized.

    Parameters
    ----------
    sha256
        Of the file.
    matrices, layers
        Names of the matrices in the source, and of the layers that they are written to.
    choice
        How the features are identified.
    """
    return {
        "source_sha256": sha256,
        "source_matrix": ",".join(matrices),
        "zarr_layer": ",".join(layers),
        "feature_id_column": choice.column,
        "feature_id_versions": "stripped" if choice.strip_versions else "",
    }


def sorted_elements(indptr: np.ndarray, columns: np.ndarray, width: int) -> np.ndarray | None:
    """int64, (nnz,). Elements of CSR rows by ascending column within each row; None where they lie so."""
    decreases = columns[1:] < columns[:-1]
    decreases[indptr[1:-1][(indptr[1:-1] > 0) & (indptr[1:-1] < len(columns))] - 1] = False  # from row to row
    if not decreases.any():
        return None
    shape = (len(indptr) - 1, width)
    elements = scipy.sparse.csr_matrix((np.arange(len(columns)), columns, indptr), shape=shape, copy=True)
    elements.sort_indices()
    order: np.ndarray = elements.data
    return order


def sparse_pointers(lengths: np.ndarray, zarr_row: np.ndarray) -> pa.Array:
    """Pointers to consecutive stretches of flat arrays, from their lengths."""
    ends = np.cumsum(lengths)
    return struct(start=pa.array(ends - lengths), end=pa.array(ends), zarr_row=pa.array(zarr_row))


def dense_pointers(positions: np.ndarray) -> pa.Array:
    """Pointers to positions on the first axis."""
    return struct(position=pa.array(positions, pa.int64()))


def struct(**members: pa.Array) -> pa.Array:
    """A struct array of these members."""
    return pa.StructArray.from_arrays(list(members.values()), names=list(members))
