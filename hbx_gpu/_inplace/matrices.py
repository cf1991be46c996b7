"""Where rows of a query lie in the matrices of several stores, and a dataset over them."""

from __future__ import annotations

import shlex
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hbx_gpu._inplace.identity import identities
from hbx_gpu._inplace.join import Axis, Join, joined
from hbx_gpu._inplace.table import CellTable
from hbx_gpu._inplace.value_kinds import warn_of_mixture
from hbx_gpu._remote.places import AnyPath
from hbx_gpu._source import BoxIndex, ObsColumns, RowIndex, Source
from hbx_gpu._stores.store import Part, Store
from hbx_gpu.errors import UnsupportedError

if TYPE_CHECKING:
    import numpy.typing as npt

    from hbx_gpu._datasets.dense import FeatureDataset
    from hbx_gpu._datasets.stored import Recipe


@dataclass(frozen=True, slots=True)
class Places:
    """Where rows of a query lie; made by :meth:`of`.

    Attributes
    ----------
    parts
        The parts that hold the modality.
    part
        int32, (n,). Part of each row, -1 where the cell lacks the modality.
    row
        int64, (n,). Row inside the part.
    rows
        int64, (n,). Row among the cells of all stores.
    """

    parts: list[Part]
    part: np.ndarray
    row: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(cls, table: CellTable, space: str, selected: np.ndarray, *, absent: bool = False) -> Places:
        """Look up rows of a table in one modality; rows without it are left out unless `absent`."""
        parts: list[Part] = []
        part_of, row_of = np.full(table.n_cells, -1, np.int32), np.zeros(table.n_cells, np.int64)
        at = 0
        for store, length in zip(table.stores, table.lengths, strict=True):
            if store.modalities:
                if space in store.modalities:
                    part, rows = store.modalities[space]
                    part_of[at : at + length] = np.where(rows >= 0, len(parts), -1)
                    row_of[at : at + length] = rows
                    parts.append(part)
                at += length
                continue
            for part in store.parts:
                part_of[at : at + part.n_cells] = len(parts)
                row_of[at : at + part.n_cells] = np.arange(part.n_cells)
                parts.append(part)
                at += part.n_cells
        if len(selected) < table.n_cells:
            part_of, row_of = part_of[selected], row_of[selected]
        if not absent and len(part_of) and part_of.min() < 0:
            there = part_of >= 0
            part_of, row_of, selected = part_of[there], row_of[there], selected[there]
        return cls(parts, part_of, row_of, selected)

    def row_index(self, pointers: Sequence[np.ndarray]) -> RowIndex:
        """The rows as extents of elements, given int64 row pointers (n_cells + 1,) of each part."""
        start, length = np.zeros(len(self.row), np.int64), np.zeros(len(self.row), np.int32)
        for number, bounds in enumerate(pointers):
            mine = np.flatnonzero(self.part == number)
            if len(mine) and len(mine) == len(bounds) - 1 == mine[-1] - mine[0] + 1:
                here = slice(int(mine[0]), int(mine[-1]) + 1)
                if (self.row[here] == np.arange(len(mine))).all():  # the usual case, without fancy indexing
                    start[here] = bounds[:-1]
                    np.subtract(bounds[1:], bounds[:-1], out=length[here], casting="same_kind")
                    continue
            rows = self.row[mine]
            start[mine] = bounds[rows]
            length[mine] = bounds[rows + 1] - bounds[rows]
        return RowIndex(self.part, start, length)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a dataset shows of the rows.

    Attributes
    ----------
    space
        Modality.
    layer
        ``"X"``, ``"raw"`` or the name of a layer, which every part must have.
    join
        Which features become columns, see :func:`hbx_gpu._inplace.join.joined`.
    feature_id_column
        Column of var that identifies features; None for what :func:`~.identity.identities` chooses.
    panel
        Exactly these features as columns, in this order; None for those that `join` gives.
    dtype
        Dtype of batches of dense matrices; None for the stored one, promoted where stores differ.
    strip_versions
        Whether versions of Ensembl ids are dropped.
    """

    space: str
    layer: str = "X"
    join: Join = "outer"
    feature_id_column: str | None = None
    panel: tuple[str, ...] | None = None
    dtype: npt.DTypeLike | None = None
    strip_versions: bool = False


def open_dataset(
    places: Places, wanted: Wanted, obs: ObsColumns, stores: Sequence[Store], recipe: Recipe | None
) -> FeatureDataset:
    """Make a dataset over rows that were looked up.

    Parameters
    ----------
    places, wanted
        The rows, and what is shown of them.
    obs
        obs columns that batches carry, of the rows of `places`.
    stores
        The stores that the parts belong to; errors name them.
    recipe
        How a spawned worker makes the dataset again; None if something else sees to that.

    Raises
    ------
    UnknownNameError
        A part lacks the layer, or the panel names a feature that none has.
    UnsupportedError
        A CSC matrix, or sparse and dense matrices together.
    CorruptDataError
        Arrays that contradict each other.
    """
    from hbx_gpu._datasets.cells import CellDataset
    from hbx_gpu._datasets.dense import DenseCellDataset

    layer = wanted.layer
    matrices = [part.matrix(layer) for part in places.parts]
    forms = {matrix.form for matrix in matrices} or {"csr"}
    if "csc" in forms:
        at = [matrix.form for matrix in matrices].index("csc")
        path = shlex.quote(str(_path_of(places.parts[at], stores)))
        raise UnsupportedError(
            f"{matrices[at].name} is stored as CSC, column by column, so that a row would need all of "
            f"it; turn it once with 'hbx-gpu ingest {path} --atlas ATLAS' and train from the atlas"
        )
    if len(forms) > 1:
        raise UnsupportedError(
            f"matrix {layer!r} is sparse in some stores and dense in others; open them apart, or ingest "
            "them into one atlas"
        )
    dtypes = {matrix.name: matrix.values.dtype.name for matrix in matrices}
    if len(set(dtypes.values())) > 1:
        found = ", ".join(f"{kind} in {name}" for name, kind in list(dtypes.items())[:4])
        _warn(f"matrix {layer!r} differs in type between stores ({found}); batches have one for all")
    warn_of_mixture(stores, places.parts, layer)
    axis = _axis(places.parts, wanted)
    pointers = [matrix.pointers() if matrix.form == "csr" else np.zeros(0, np.int64) for matrix in matrices]
    sources = [
        Source(matrix.name, matrix.columns(bounds), {layer: matrix.values}, remap)
        for matrix, bounds, remap in zip(matrices, pointers, axis.remaps, strict=True)
    ]
    common: dict[str, Any] = {
        "layer": layer,
        "n_features": len(axis.uids),
        "feature_uids": axis.uids,
        "obs": obs,
        "recipe": recipe,
        "feature_space": wanted.space,
    }
    if forms == {"csr"}:
        return CellDataset(sources, places.row_index(pointers), **common)
    boxes = BoxIndex(places.part, places.row[:, None], np.ones((len(places.row), 1), np.int64))
    chosen = {} if wanted.dtype is None else {layer: np.dtype(wanted.dtype).name}
    return DenseCellDataset(sources, boxes, positions=True, dtypes=chosen, **common)


def _path_of(part: Part, stores: Sequence[Store]) -> AnyPath:
    """The store that a part belongs to."""
    return next(store.path for store in stores if any(part is one for one in store.every_part))


def _axis(parts: Sequence[Part], wanted: Wanted) -> Axis:
    variables, wheres = [part.var(wanted.layer) for part in parts], [part.name for part in parts]
    names = identities(variables, wheres, wanted.feature_id_column, strip_versions=wanted.strip_versions)
    if len(parts) == 1 and wanted.panel is None and len(set(names[0])) < len(names[0]):
        _warn(
            f"{parts[0].name}: features that share their name with another: "
            f"{len(names[0]) - len(set(names[0]))}; each keeps a column of its own"
        )
    return joined(names, wheres, wanted.join, wanted.panel)


def _warn(what: str) -> None:
    warnings.warn(what, UserWarning, stacklevel=2)
