"""The obs rows of one dataset, made of its files alone: no table of the atlas is read here."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from hbx_gpu.atlas._ingest.inputs import OWN_COLUMNS, obs_columns
from hbx_gpu.atlas._ingest.joining import Joined, join_obs
from hbx_gpu.atlas._ingest.obs_edits import ObsEdits
from hbx_gpu.atlas._ingest.parts import Part

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Dataset:
    """What is added in one go.

    Attributes
    ----------
    parts
        Modalities of the dataset.
    joined
        Joined cells of the modalities.
    source
        Name of the source, used in error messages.
    common
        Tables of obs that belong to no modality: name, table, and per cell the row of the table.
    """

    parts: Sequence[Part]
    joined: Joined
    source: str
    common: Sequence[tuple[str, pd.DataFrame, np.ndarray]] = ()


@dataclass(frozen=True)
class ObsNames:
    """What the names of obs columns have to heed.

    Attributes
    ----------
    reserved
        Names that mean something else, see :func:`reserved_names`.
    known
        Name in a file -> name in the obs table, of the columns that it has.
    """

    reserved: Collection[str]
    known: Mapping[str, str]


def reserved_names(pointers: Collection[str], *, has_class: bool) -> frozenset[str]:
    """Names that obs columns of a file cannot have: our own columns and the pointer columns.

    Parameters
    ----------
    pointers
        Pointer columns of the obs table.
    has_class
        Whether a class was declared for the table; uids of cells may then come from the file.
    """
    own = [name for name in OWN_COLUMNS if not (has_class and name == "uid")]
    return frozenset({*own, *pointers})


def cell_rows(
    dataset: Dataset, dataset_uid: str, names: ObsNames, *, winner: str | None, edits: ObsEdits
) -> pa.Table:
    """Rows for an obs table without pointers, one per cell.

    Parameters
    ----------
    dataset
        The dataset.
    dataset_uid
        Its uid.
    names
        What names of columns have to heed.
    winner, edits
        See :func:`join_obs`.

    Raises
    ------
    InvalidDataError
        See :func:`join_obs` and :func:`obs_columns`.
    """
    frames = [(name, f"{dataset.source}, obs", frame, rows) for name, frame, rows in dataset.common] + [
        (part.name, f"{part.source}, obs", part.obs, rows)
        for part, rows in zip(dataset.parts, dataset.joined.rows, strict=True)
        if part.obs is not None
    ]
    found = join_obs(
        dataset.joined, frames, reserved=names.reserved, winner=winner, known=names.known, edits=edits
    )
    return obs_columns(dataset.joined.ids, found, dataset_uid, source=f"{dataset.source}, obs")


def pointer_column(pointers: pa.StructArray, zarr_group: str, rows: np.ndarray) -> pa.Array:
    """Pointers of the cells of a dataset: null where a cell lacks the modality.

    Parameters
    ----------
    pointers
        As :meth:`Part.write` returns them.
    zarr_group
        The group they point into.
    rows
        int64, (n_cells,). Row of the part that belongs to each cell, -1 where it has none.
    """
    names = [pointers.type.field(i).name for i in range(pointers.type.num_fields)]
    group = pa.array(np.full(len(pointers), zarr_group, object), pa.string())
    whole = pa.StructArray.from_arrays([group, *pointers.flatten()], names=["zarr_group", *names])
    return whole.take(pa.array(rows, mask=rows < 0))
