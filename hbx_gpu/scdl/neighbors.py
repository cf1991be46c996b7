"""Neighbours of cells: their three files, and how one is drawn."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from hbx_gpu.errors import CorruptDataError

NEIGHBOR_FILES = ("neighbor_indptr.npy", "neighbor_indices.npy", "neighbor_values.npy")
NEIGHBOR_DTYPES: tuple[np.dtype[Any], ...] = (np.dtype("u8"), np.dtype("u4"), np.dtype("f4"))


class NeighborsUnusableError(CorruptDataError):
    """Stored neighbours that are damaged, or were made for other rows."""


class NeighborSamplingStrategy(StrEnum):
    """How a neighbour is chosen.

    ``random``: every neighbour with the same probability. ``first``: the first stored one. ``weighted``:
    in proportion to the stored weights, which must not be negative (ours; the real package has the others).
    """

    RANDOM = "random"
    FIRST = "first"
    WEIGHTED = "weighted"

    @classmethod
    def parse(cls, value: Any) -> NeighborSamplingStrategy:
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
    """Neighbours of every row, as CSR.

    Attributes
    ----------
    indptr
        uint64, (n_rows + 1,).
    indices
        uint32, (n_links,). Row numbers in the archive.
    weights
        float32, (n_links,). As stored: similarities or distances. Zeros count as neighbours.
    """

    indptr: np.ndarray
    indices: np.ndarray
    weights: np.ndarray

    def __len__(self) -> int:
        return len(self.indptr) - 1

    def of(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Neighbours and weights of one row, which must be in range.

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

    def counts(self) -> np.ndarray:
        """uint64, (n_rows,). How many neighbours each row has."""
        return np.diff(self.indptr)

    def draw(
        self,
        rows: np.ndarray,
        generator: np.random.Generator,
        strategy: NeighborSamplingStrategy = NeighborSamplingStrategy.RANDOM,
        n: int | None = None,
    ) -> np.ndarray:
        """Draw neighbours of many rows, with replacement; a row without any is its own neighbour.

        Parameters
        ----------
        rows
            Integers in range.
        generator
            Source of randomness; ``first`` takes none from it.
        strategy
            As :class:`NeighborSamplingStrategy`.
        n
            Neighbours per row; None for one.

        Returns
        -------
        np.ndarray
            int64, (n_rows,) or (n_rows, n).

        Raises
        ------
        ValueError
            ``weighted``: negative or missing weights.
        """
        rows = np.asarray(rows, np.int64)
        starts = self.indptr[rows].astype(np.int64)[:, None]
        counts = self.indptr[rows + 1].astype(np.int64)[:, None] - starts
        if (bad := (counts < 0) | (starts + counts > len(self.indices))).any():
            raise _damaged(int(rows[np.flatnonzero(bad)[0]]))
        shape = (len(rows), n or 1)
        if strategy is NeighborSamplingStrategy.FIRST:
            places = np.zeros(shape, np.int64)
        elif strategy is NeighborSamplingStrategy.RANDOM:
            places = (generator.random(shape) * counts).astype(np.int64)
        else:
            places = self._weighted(rows, generator.random(shape))
        known = np.broadcast_to(counts > 0, shape)
        drawn = np.broadcast_to(rows[:, None], shape).copy()
        drawn[known] = self.indices[(starts + np.minimum(places, np.maximum(counts - 1, 0)))[known]]
        if (bad := drawn >= len(self)).any():
            raise _damaged(int(rows[np.argwhere(bad)[0][0]]))
        return drawn if n is not None else drawn[:, 0]

    def _weighted(self, rows: np.ndarray, uniform: np.ndarray) -> np.ndarray:
        places = np.zeros(uniform.shape, np.int64)
        for at, row in enumerate(rows.tolist()):
            weights = self.of(row)[1].astype(np.float64)
            if not (weights >= 0).all():
                raise ValueError(
                    f"row {row} has negative or missing neighbour weights, which cannot be probabilities; "
                    "use neighbor_sampling_strategy='random'"
                )
            total = np.cumsum(weights)
            if len(total):
                # All weights zero: none is preferred.
                total = total if total[-1] > 0 else np.arange(1.0, len(total) + 1)
                places[at] = np.searchsorted(total, uniform[at] * total[-1], side="right")
        return places


def _damaged(row: int) -> NeighborsUnusableError:
    return NeighborsUnusableError(
        f"the neighbours of row {row} lie outside of the archive: {', '.join(NEIGHBOR_FILES)} are damaged. "
        "Convert the source again with load_neighbors=True"
    )


def open_neighbors(path: Path, n_rows: int) -> NeighborTable | None:
    """Map the neighbour files of an archive; None if one is missing.

    Raises
    ------
    NeighborsUnusableError
        They are those of another number of rows (the real package leaves them behind when it appends rows),
        or damaged.
    """
    files = [path / name for name in NEIGHBOR_FILES]
    if not all(file.exists() for file in files):
        return None
    size = files[0].stat().st_size
    if size != (n_rows + 1) * NEIGHBOR_DTYPES[0].itemsize:
        raise NeighborsUnusableError(
            f"{files[0]}: neighbours of {size / NEIGHBOR_DTYPES[0].itemsize - 1:.12g} rows, but the archive "
            f"has {n_rows} (rows were appended, or the file is damaged): they cannot be used. Convert the "
            "source again with load_neighbors=True, or remove the three neighbour files"
        )
    indptr = np.memmap(files[0], NEIGHBOR_DTYPES[0], mode="r")
    n_links = int(indptr[-1])
    if indptr[0] != 0:
        raise NeighborsUnusableError(
            f"{files[0]}: expected pointers from 0, found {indptr[0]}; the file is damaged"
        )
    arrays = []
    for file, dtype in zip(files[1:], NEIGHBOR_DTYPES[1:], strict=True):
        # Without links there is padding; more than the pointers span is never read.
        if file.stat().st_size < n_links * dtype.itemsize:
            raise NeighborsUnusableError(
                f"{file}: expected {n_links} elements of {dtype} (the last entry of {files[0].name}), found "
                f"{file.stat().st_size} bytes; the file is damaged"
            )
        arrays.append(np.memmap(file, dtype, mode="r", shape=(n_links,)) if n_links else np.empty(0, dtype))
    return NeighborTable(indptr, *arrays)
