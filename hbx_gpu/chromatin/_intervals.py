"""Fragments as they are stored: intervals per cell, one object of flat arrays, or one table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from hbx_gpu.batch import SparseBatch
from hbx_gpu.chromatin._counting import fragment_layers
from hbx_gpu.errors import InvalidDataError

if TYPE_CHECKING:
    import pandas as pd

FRAGMENT = np.dtype([("chromosome", np.int32), ("start", np.int64), ("end", np.int64)])
"""One fragment: chromosome number, and half-open interval."""

_ROWS_AT_ONCE = 4096


@dataclass(slots=True)
class Fragments:
    """The fragments of a query's cells in flat arrays, as Homeobox hands them out.

    Attributes
    ----------
    chromosomes
        int32, (n_fragments,). Positions in `chrom_names`.
    starts, lengths
        (n_fragments,), as stored.
    offsets
        int64, (n_cells + 1,). Cell ``i`` has the fragments ``[offsets[i], offsets[i + 1])``.
    chrom_names
        Name of every chromosome number; None for one that was deleted.
    obs
        Metadata of the cells, uid as index.
    """

    chromosomes: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    offsets: np.ndarray
    chrom_names: list[str | None]
    obs: pd.DataFrame

    def __len__(self) -> int:
        return len(self.starts)

    def to_frame(self) -> pd.DataFrame:
        """One row per fragment: ``uid``, ``chrom`` (categorical), ``start``, ``end`` (int64, half-open)."""
        import pandas as pd

        start = self.starts.astype(np.int64)
        known = list(dict.fromkeys(name for name in self.chrom_names if name is not None))
        place = {name: i for i, name in enumerate(known)}
        code = np.array([-1 if name is None else place[name] for name in self.chrom_names], np.int32)
        uid = np.asarray(self.obs.index.to_numpy(), dtype=object)
        return pd.DataFrame(
            {
                "uid": np.repeat(uid, np.diff(self.offsets)),
                "chrom": pd.Categorical.from_codes(code[self.chromosomes], categories=known),
                "start": start,
                "end": start + self.lengths,
            }
        )


def fragments_of(batch: SparseBatch) -> list[np.ndarray]:
    """The fragments of every row, in stored order.

    Parameters
    ----------
    batch
        Rows of fragments with both layers.

    Returns
    -------
    list of np.ndarray
        One array of dtype `FRAGMENT` per row; views of one allocation.

    Raises
    ------
    InvalidDataError
        The batch lacks a layer.
    """
    starts, lengths = fragment_layers(batch)
    flat = np.empty(len(starts), FRAGMENT)
    flat["chromosome"] = batch.indices
    flat["start"] = starts
    flat["end"] = flat["start"] + lengths
    return np.split(flat, batch.offsets[1:-1]) if len(batch) else []


class FragmentRows(Protocol):
    """A dataset of fragments: batches by row number."""

    @property
    def n_features(self) -> int:
        """Number of chromosomes."""

    def __len__(self) -> int: ...

    def __getitems__(self, rows: np.ndarray, /) -> SparseBatch: ...


def read_fragments(
    dataset: FragmentRows, obs: pd.DataFrame, chromosome_names: Sequence[str | None] | np.ndarray
) -> Fragments:
    """Read the fragments of all rows of a dataset.

    Parameters
    ----------
    dataset
        Fragments with both layers.
    obs
        One row per row of the dataset, uid as index.
    chromosome_names
        Name of every column of the dataset.

    Raises
    ------
    InvalidDataError
        `obs` or the names do not fit the dataset, or it lacks a layer.
    """
    _check_length("obs", len(obs), "rows", len(dataset))
    _check_length("chromosome_names", len(chromosome_names), "columns", dataset.n_features)
    chromosomes, starts, lengths = [np.empty(0, np.int32)], [], []
    counts = [np.zeros(1, np.int64)]
    for batch in batches_of(dataset):
        start, length = fragment_layers(batch)
        chromosomes.append(batch.indices)
        starts.append(start)
        lengths.append(length)
        counts.append(np.diff(batch.offsets))
    return Fragments(
        chromosomes=np.concatenate(chromosomes),
        starts=np.concatenate(starts) if starts else np.empty(0, np.uint32),
        lengths=np.concatenate(lengths) if lengths else np.empty(0, np.uint16),
        offsets=np.cumsum(np.concatenate(counts)),
        chrom_names=[None if name is None else str(name) for name in chromosome_names],
        obs=obs,
    )


def fragments_frame(
    dataset: FragmentRows,
    uids: Sequence[str] | np.ndarray,
    chromosome_names: Sequence[str | None] | np.ndarray,
) -> pd.DataFrame:
    """All fragments of a dataset as one table, see :meth:`Fragments.to_frame`.

    Parameters
    ----------
    dataset
        Fragments with both layers.
    uids
        uid of every row of the dataset.
    chromosome_names
        Name of every column of the dataset.

    Raises
    ------
    InvalidDataError
        See :func:`read_fragments`.
    """
    import pandas as pd

    return read_fragments(dataset, pd.DataFrame(index=pd.Index(uids)), chromosome_names).to_frame()


def observed_sizes(
    dataset: FragmentRows, chromosome_names: Sequence[str | None] | np.ndarray
) -> dict[str, int]:
    """Furthest end of any fragment by chromosome, in the order of the names; none without fragments.

    Reads every fragment of the dataset.
    """
    _check_length("chromosome_names", len(chromosome_names), "columns", dataset.n_features)
    furthest = np.zeros(dataset.n_features, np.int64)
    for batch in batches_of(dataset):
        start, length = fragment_layers(batch)
        np.maximum.at(furthest, batch.indices, start.astype(np.int64) + length)
    found = zip(chromosome_names, furthest.tolist(), strict=True)
    return {str(name): end for name, end in found if name is not None and end}


def batches_of(dataset: FragmentRows) -> Iterator[SparseBatch]:
    """All rows of a dataset, some thousands at a time."""
    for first in range(0, len(dataset), _ROWS_AT_ONCE):
        yield dataset.__getitems__(np.arange(first, min(first + _ROWS_AT_ONCE, len(dataset))))


def _check_length(name: str, found: int, what: str, expected: int) -> None:
    if found != expected:
        raise InvalidDataError(f"{name} has {found} entries, but the dataset has {expected} {what}")
