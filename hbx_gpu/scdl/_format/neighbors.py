"""Neighbors of cells: their three files, and how one is drawn."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np

from hbx_gpu.errors import CorruptDataError, InvalidDataError
from hbx_gpu.scdl._format.layout import NEIGHBOR_FILES

NEIGHBOR_DTYPES: tuple[np.dtype, ...] = (np.dtype("u8"), np.dtype("u4"), np.dtype("f4"))


# Rows or links that are checked at once.
_PIECE = 1 << 20


class NeighborsUnusableError(CorruptDataError):
    """Stored neighbors that are damaged, or were made for other rows."""


class NeighborSamplingStrategy(StrEnum):
    """How a neighbor is chosen.

    ``random``: every neighbor with the same probability. ``first``: the first stored one. ``weighted``:
    in proportion to the stored weights, which must not be negative (ours; the real package has the others).
    """

    RANDOM = "random"
    FIRST = "first"
    WEIGHTED = "weighted"

    @classmethod
    def parse(cls, value: str) -> NeighborSamplingStrategy:
        """A strategy by name.

        Raises
        ------
        ValueError
            No such strategy.
        """
        try:
            return cls(value)
        except ValueError:
            raise ValueError(
                f"Unsupported neighbor_sampling_strategy: {value}. There are {[s.value for s in cls]}"
            ) from None


@dataclass(frozen=True)
class NeighborTable:
    """Neighbors of every row, as CSR.

    Attributes
    ----------
    indptr
        uint64, (n_rows + 1,). Start of each row in `indices` and `weights`.
    indices
        uint32, (n_links,). Row numbers in the archive.
    weights
        float32, (n_links,). Stored weights: similarities or distances. A weight of zero is still a neighbor.
    """

    indptr: np.ndarray
    indices: np.ndarray
    weights: np.ndarray

    def __len__(self) -> int:
        return len(self.indptr) - 1

    def of(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Neighbors and weights of one row, which must be in range.

        Raises
        ------
        NeighborsUnusableError
            The files are damaged around this row.
        """
        start, stop = int(self.indptr[row]), int(self.indptr[row + 1])
        if not start <= stop <= len(self.indices):
            raise _damaged(row)
        found = self.indices[start:stop]
        if stop > start and int(found.max()) >= len(self):
            raise _damaged(row)
        return found, self.weights[start:stop]

    def check(self) -> None:
        """Check all rows, which reading does only for those it reads.

        Raises
        ------
        NeighborsUnusableError
            The files are damaged.
        """
        for first in range(0, len(self), _PIECE):
            pointers = self.indptr[first : first + _PIECE + 1]
            if (decreases := pointers[1:] < pointers[:-1]).any() or pointers[-1] > len(self.indices):
                raise _damaged(first + int(decreases.argmax()))
        for at in range(0, len(self.indices), _PIECE):
            if (outside := self.indices[at : at + _PIECE] >= len(self)).any():
                raise _damaged(int(np.searchsorted(self.indptr, at + outside.argmax(), "right")) - 1)

    def counts(self) -> np.ndarray:
        """uint64, (n_rows,). How many neighbors each row has."""
        return np.diff(self.indptr)

    def draw(
        self,
        rows: np.ndarray,
        generator: np.random.Generator,
        strategy: NeighborSamplingStrategy = NeighborSamplingStrategy.RANDOM,
        n: int | None = None,
    ) -> np.ndarray:
        """Draw neighbors of many rows, with replacement; a row without any is its own neighbor.

        Parameters
        ----------
        rows
            Integers in range.
        generator
            Source of randomness; ``first`` takes none from it.
        strategy
            As :class:`NeighborSamplingStrategy`.
        n
            Neighbors per row; None for one.

        Returns
        -------
        np.ndarray
            int64, (n_rows,) or (n_rows, n).

        Raises
        ------
        NeighborsUnusableError, InvalidDataError
            As :meth:`links`.
        """
        rows = np.asarray(rows, np.int64)
        shape = (len(rows), n or 1)
        first = strategy is NeighborSamplingStrategy.FIRST
        links = self.links(rows, np.zeros(shape) if first else generator.random(shape), strategy)
        drawn = np.broadcast_to(rows[:, None], shape).copy()
        drawn[links >= 0] = self.indices[links[links >= 0]]
        return drawn if n is not None else drawn[:, 0]

    def links(self, rows: np.ndarray, uniform: np.ndarray, strategy: NeighborSamplingStrategy) -> np.ndarray:
        """Choose links of many rows.

        Parameters
        ----------
        rows
            int64, (n,), in range.
        uniform
            (n,) or (n, k), in [0, 1): what decides.
        strategy
            As :class:`NeighborSamplingStrategy`.

        Returns
        -------
        np.ndarray
            int64, like `uniform`. Places in `indices` and `weights`; -1 for rows without links.

        Raises
        ------
        NeighborsUnusableError
            The files are damaged around one of the rows.
        InvalidDataError
            ``weighted``: negative or missing weights.
        """
        start = self.indptr[rows].astype(np.int64)
        count = self.indptr[rows + 1].astype(np.int64) - start
        if (bad := (start < 0) | (count < 0) | (start + count > len(self.indices))).any():
            raise _damaged(int(rows[bad][0]))
        like = (len(rows), *[1] * (uniform.ndim - 1))
        if strategy is NeighborSamplingStrategy.FIRST:
            place = np.zeros(uniform.shape, np.int64)
        elif strategy is NeighborSamplingStrategy.RANDOM:
            place = (uniform * count.reshape(like)).astype(np.int64)
        else:
            place = self._weighted(rows, start, count, uniform)
        start, count = start.reshape(like), count.reshape(like)
        links = np.where(count > 0, start + np.clip(place, 0, np.maximum(count - 1, 0)), -1)
        some = links >= 0
        if (self.indices[links[some]] >= len(self)).any():
            some[some] = self.indices[links[some]] >= len(self)
            raise _damaged(int(rows[np.argwhere(some)[0][0]]))
        return links

    def _weighted(
        self, rows: np.ndarray, start: np.ndarray, count: np.ndarray, uniform: np.ndarray
    ) -> np.ndarray:
        """Place within each row's links, in proportion to their weights; evenly where all weights are 0."""
        stop = np.cumsum(count)
        row = np.repeat(np.arange(len(count)), count)
        weights = self.weights[np.arange(len(row)) + (start - (stop - count))[row]].astype(np.float64)
        if not (fine := weights >= 0).all():
            raise InvalidDataError(
                f"row {rows[row[~fine][0]]} has negative or missing neighbor weights, which cannot be "
                "probabilities; use neighbor_sampling_strategy='random'"
            )
        totals = np.bincount(row, weights, len(count))
        weights[(totals == 0)[row]] = 1.0
        totals = np.bincount(row, weights, len(count))
        # Shares of a row reach from row to row + 1 on one rising line, so that one search serves all rows.
        line = np.cumsum(weights / np.maximum(totals, np.finfo(float).tiny)[row])
        before = np.concatenate([[0.0], line])[np.minimum(stop - count, len(line))]
        like = (len(rows), *[1] * (uniform.ndim - 1))
        found = np.searchsorted(line, before.reshape(like) + uniform, "right")
        result: np.ndarray = found - (stop - count).reshape(like)
        return result


def _damaged(row: int) -> NeighborsUnusableError:
    return NeighborsUnusableError(
        f"the neighbors of row {row} lie outside of the archive: {', '.join(NEIGHBOR_FILES)} are damaged. "
        "Convert the source again with load_neighbors=True"
    )


def open_neighbors(path: Path, n_rows: int) -> NeighborTable | None:
    """Map the neighbor files of an archive; None if one is missing.

    Raises
    ------
    NeighborsUnusableError
        The files are damaged, or were made for another number of rows (the real package does not update them
        when it appends rows).
    """
    files = [path / name for name in NEIGHBOR_FILES]
    if not all(file.exists() for file in files):
        return None
    size = files[0].stat().st_size
    if size != (n_rows + 1) * NEIGHBOR_DTYPES[0].itemsize:
        raise NeighborsUnusableError(
            f"{files[0]}: neighbors of {size / NEIGHBOR_DTYPES[0].itemsize - 1:.12g} rows, but the archive "
            f"has {n_rows} (rows were appended, or the file is damaged): they cannot be used. Convert the "
            "source again with load_neighbors=True, or remove the three neighbor files"
        )
    indptr = np.memmap(files[0], NEIGHBOR_DTYPES[0], mode="r")
    n_links = int(indptr[-1])
    if indptr[0] != 0:
        raise NeighborsUnusableError(
            f"{files[0]}: expected pointers from 0, found {indptr[0]}; the file is damaged"
        )
    arrays = []
    for file, dtype in zip(files[1:], NEIGHBOR_DTYPES[1:], strict=True):
        size, expected = file.stat().st_size, n_links * dtype.itemsize
        # Without links there is padding.
        if size != expected and (n_links or size > dtype.itemsize):
            raise NeighborsUnusableError(
                f"{file}: expected {n_links} elements of {dtype} (the last entry of {files[0].name}), found "
                f"{size} bytes; the file is damaged"
            )
        arrays.append(np.memmap(file, dtype, mode="r", shape=(n_links,)) if n_links else np.empty(0, dtype))
    return NeighborTable(indptr, *arrays)
