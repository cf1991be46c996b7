"""Which datasets have given cells: 64-bit hashes of names in sorted runs, so that lookups stay cheap."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_ODD = np.uint64(0x9E3779B97F4A7C15)  # spreads small numbers over 64 bits


def hashes(names: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """uint64, (n,). A hash per text; equal texts have equal ones."""
    import pandas as pd

    texts = names.cast(pa.string()).to_numpy(zero_copy_only=False)
    found: np.ndarray = pd.util.hash_array(texts.astype(object), categorize=False)
    return found


def cell_hashes(names: pa.Array | pa.ChunkedArray, pointers: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """uint64, (n,). A hash of the name of each cell and of the number of values that are stored of it.

    Cells of files that number them from 0 have the same names, and are told apart by these numbers without
    reading a value. Where all cells have as many values, as in a dense matrix, only names count.

    Parameters
    ----------
    names
        Names of the cells.
    pointers
        Structs, (n,). Where their values are.
    """
    found = hashes(names)
    if pointers.type.get_field_index("start") >= 0:
        length = pc.subtract(pc.struct_field(pointers, "end"), pc.struct_field(pointers, "start"))
        found += pc.fill_null(length, 0).to_numpy().astype(np.uint64) * _ODD
    return found


class NamesIndex:
    """Hashes of the names of cells, with the number of the dataset that has them.

    They lie in sorted runs whose lengths at least halve from one to the next, so that n names are sorted
    O(log n) times in all, and a lookup asks O(log n) runs.
    """

    def __init__(self) -> None:
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []
        self._sizes: list[int] = []

    def add(self, found: np.ndarray, owners: np.ndarray) -> None:
        """Add names.

        Parameters
        ----------
        found
            uint64, (n,). From :func:`hashes`.
        owners
            int32, (n,). Number of the dataset that has each.
        """
        counts = np.bincount(owners)
        self._sizes.extend([0] * (len(counts) - len(self._sizes)))
        for owner in np.flatnonzero(counts):
            self._sizes[owner] += int(counts[owner])
        order = np.argsort(found)
        run = (found[order], owners[order].astype(np.int32))
        while self._runs and len(self._runs[-1][0]) < 2 * len(run[0]):
            older = self._runs.pop()
            values = np.concatenate([older[0], run[0]])
            order = np.argsort(values, kind="stable")  # which merges sorted runs
            run = (values[order], np.concatenate([older[1], run[1]])[order])
        self._runs.append(run)

    def owners(self, wanted: np.ndarray, share: float) -> dict[int, int]:
        """Datasets that have most of some names, of the smaller one of the two -> how many.

        Parameters
        ----------
        wanted
            uint64, (n,). Hashes of the names of a new dataset.
        share
            Least share of the names of the smaller dataset.
        """
        unique = np.unique(wanted)
        total = np.zeros(len(self._sizes), np.int64)
        for values, owners in self._runs:
            first, last = np.searchsorted(values, unique), np.searchsorted(values, unique, "right")
            lengths = last - first
            if not lengths.any():
                continue
            starts = np.repeat(first - np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths)
            total += np.bincount(owners[starts + np.arange(lengths.sum())], minlength=len(total))
        return {
            int(owner): int(total[owner])
            for owner in np.flatnonzero(total)
            if total[owner] >= share * min(self._sizes[owner], len(wanted))
        }

    def contains(self, wanted: np.ndarray) -> np.ndarray:
        """bool, (n,). Whether some dataset has each name, but for equal hashes of other names."""
        found = np.zeros(len(wanted), bool)
        for values, _ in self._runs:
            at = np.minimum(np.searchsorted(values, wanted), max(0, len(values) - 1))
            if len(values):
                found |= values[at] == wanted
        return found


def of_table(names: pa.ChunkedArray, datasets: pa.ChunkedArray) -> tuple[NamesIndex, list[str]]:
    """The index of the cells of an obs table, and the uids of its datasets by their numbers.

    Parameters
    ----------
    names
        Names of the cells.
    datasets
        Uid of the dataset of each cell.
    """
    index, uids = NamesIndex(), _encoded(datasets)
    if len(names):
        index.add(hashes(names), uids.indices.to_numpy(zero_copy_only=False).astype(np.int32))
    listed: Sequence[str] = uids.dictionary.to_pylist()
    return index, list(listed)


def _encoded(texts: pa.ChunkedArray) -> pa.DictionaryArray:
    whole = texts.combine_chunks()
    whole = whole if isinstance(whole, pa.Array) else pa.concat_arrays(whole.chunks)
    return whole.cast(pa.string()).fill_null("").dictionary_encode()
