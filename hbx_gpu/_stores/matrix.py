"""A stored matrix of cells by features: its arrays, described and checked, and where each row lies."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from hbx_gpu._codecs.chain import ChunkCodec
from hbx_gpu._source import ArrayLayout
from hbx_gpu._storage import open_reader
from hbx_gpu._storage.chunks import ChunkDirectory
from hbx_gpu.errors import CorruptDataError, InvalidDataError

Form = Literal["csr", "csc", "dense"]


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """Arrays of one matrix, rows are cells.

    Attributes
    ----------
    name
        File and place in it, used in error messages.
    shape
        (number of cells, number of features).
    form
        How it is stored. A CSC matrix can be described and counted, but its rows cannot be read in place.
    values
        Stored values: one axis (CSR, CSC), or cells and features (dense).
    index
        Column numbers (CSR) or row numbers (CSC) beside the values; None for a dense matrix.
    indptr
        Where each row (CSR) or column (CSC) begins; None for a dense matrix.
    begin
        What `indptr` begins with: not 0 where this matrix is a stretch of a longer one.
    """

    name: str
    shape: tuple[int, int]
    form: Form
    values: ArrayLayout
    index: ArrayLayout | None = None
    indptr: ArrayLayout | None = None
    begin: int = 0

    def __post_init__(self) -> None:
        if self.form == "dense":
            if self.values.shape != self.shape:
                raise CorruptDataError(
                    f"{self.name} has shape {self.values.shape}, its cells and features are {self.shape}"
                )
            return
        assert self.index is not None
        assert self.indptr is not None
        lines = self.shape[0] if self.form == "csr" else self.shape[1]
        if self.index.shape != self.values.shape or len(self.values.shape) != 1:
            raise CorruptDataError(
                f"{self.name}: arrays {self.values.name!r} of shape {self.values.shape} and "
                f"{self.index.name!r} of shape {self.index.shape} should be equally long"
            )
        if self.indptr.shape != (lines + 1,):
            raise CorruptDataError(
                f"{self.name}: array {self.indptr.name!r} has shape {self.indptr.shape}; "
                f"{lines} {'rows' if self.form == 'csr' else 'columns'} need {lines + 1} entries"
            )
        if self.index.dtype.kind not in "iu" or self.indptr.dtype.kind not in "iu":
            raise CorruptDataError(
                f"{self.name}: indices are {self.index.dtype} and indptr is {self.indptr.dtype}; "
                "integers are expected"
            )

    @property
    def nnz(self) -> int:
        """Number of stored values."""
        return int(np.prod(self.values.shape, dtype=np.int64))

    def pointers(self) -> np.ndarray:
        """int64, (n + 1,). Where each row (CSR) or column (CSC) begins among the values.

        Raises
        ------
        CorruptDataError
            They do not ascend from 0 to the number of values.
        InvalidDataError
            A row holds more than 2**31 - 1 values.
        """
        assert self.indptr is not None
        found = read_whole(self.indptr).astype(np.int64) - self.begin
        lengths = np.diff(found)
        bad = np.flatnonzero(lengths < 0)
        if len(bad):
            raise CorruptDataError(
                f"{self.name}: indptr descends from {found[bad[0]]} to {found[bad[0] + 1]} at entry {bad[0]}"
            )
        if found[0] != 0 or found[-1] != self.nnz:
            raise CorruptDataError(
                f"{self.name}: indptr runs from {found[0]} to {found[-1]}; {self.nnz} values are stored, so "
                f"it must run from 0 to {self.nnz}"
            )
        if len(lengths) and lengths.max() > np.iinfo(np.int32).max:
            raise InvalidDataError(f"{self.name}: row {int(lengths.argmax())} holds {lengths.max()} values")
        return found

    def columns(self, pointers: np.ndarray) -> ArrayLayout | None:
        """The column numbers of a CSR matrix; a missing chunk is an error where it cannot be all fill value.

        A writer may leave out a chunk whose elements all have the fill value. Of column numbers, whose fill
        value is 0, this can happen only where every element of the chunk is the first of its row: a row holds
        a column once, and columns ascend.

        Parameters
        ----------
        pointers
            From :meth:`pointers`.

        Returns
        -------
        ArrayLayout or None
            None for a dense matrix.
        """
        if self.index is None or not self.index.absent_is_fill:
            return self.index
        begin = np.arange(0, self.nnz, self.index.chunk_shape[0])
        end = np.minimum(begin + self.index.chunk_shape[0], self.nnz)
        starts = pointers[:-1][np.diff(pointers) > 0]
        first = np.searchsorted(starts, end, "left") - np.searchsorted(starts, begin, "left")
        return self.index if (first == end - begin).any() else replace(self.index, absent_is_fill=False)


def read_whole(layout: ArrayLayout) -> np.ndarray:
    """All elements of an array of one axis.

    Raises
    ------
    CorruptChunkError
        A chunk is missing or does not decode.
    """
    directory, codec = ChunkDirectory([layout]), ChunkCodec(layout)
    out = np.empty(layout.shape, layout.dtype)
    size = layout.chunk_shape[0]
    slab = open_reader("preadv", directory).read(directory.extents(np.arange(directory.base[-1])))
    for chunk in range(int(directory.base[-1])):
        begin = chunk * size
        target = out[begin : begin + size]
        if slab.address[chunk] == 0:
            target[:] = layout.fill_value
            continue
        try:
            values = codec.decode(slab.view(chunk), directory.skipped_filters(chunk))
        except ValueError as error:
            raise directory.error(chunk, error) from error
        target[:] = values[: len(target)]
    return out
