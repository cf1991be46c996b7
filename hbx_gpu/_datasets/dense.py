"""`DenseCellDataset`: cells whose data are matrix rows, image tiles, boxes of an image, or encoded bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import numpy.typing as npt

from hbx_gpu._buffers import POOL
from hbx_gpu._datasets.cells import CellDataset
from hbx_gpu._datasets.stored import Kind, Recipe, StoredDataset, common_dtype
from hbx_gpu._float16 import overflow_said
from hbx_gpu._plan.boxes import BoxPlan, box_table, full_boxes, needed_chunks, plan_boxes
from hbx_gpu._source import BoxIndex, ObsColumns, Source, rows_by_source
from hbx_gpu.batch import DenseBatch, RaggedBatch
from hbx_gpu.errors import CorruptDataError, UnsupportedError
from hbx_gpu.loader_stats import stage

if TYPE_CHECKING:
    from hbx_gpu._storage.readers import Slab


class DenseCellDataset(StoredDataset[BoxIndex, BoxPlan, DenseBatch | RaggedBatch]):
    """Map-style dataset over the cells of a feature space whose data are arrays.

    All batches of a dataset have one of three forms: a matrix where the space has features, an array of tiles
    where all tiles have one shape, and a list of arrays otherwise.

    Parameters
    ----------
    sources, obs, recipe, feature_space, reader
        As for :class:`~hbx_gpu._datasets.cells.CellDataset`.
    rows
        Where each row lies.
    positions
        Whether a row is one position on the first axis, which its array then lacks.
    layer
        Layer, or layers, to read; the layers of a group are cut by the same boxes.
    n_features
        Width of a matrix; 0 for spaces without features.
    feature_uids
        (n_features,) uid of every column.
    dtypes
        Layer name -> dtype of its batches; by default one that holds all stored ones, as NumPy promotes. In
        lists every array then keeps its own.

    Attributes
    ----------
    per_cell_shape
        Shape of every tile, None for matrices and where shapes differ.
    n_features
        Number of columns; for tiles of one shape, the elements of a tile, as in Homeobox; 0 where shapes
        differ.

    Raises
    ------
    CorruptDataError
        A box reaches outside its array, the leading axes of a group's layers differ, or a matrix is not as
        wide as its group has features.
    ValueError
        A dtype cannot hold the stored values without rounding them to integers.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        rows: BoxIndex,
        *,
        positions: bool,
        layer: str | Sequence[str],
        n_features: int,
        feature_uids: np.ndarray,
        obs: ObsColumns | None = None,
        recipe: Recipe | None = None,
        feature_space: str = "",
        reader: str = "mmap",
        dtypes: Mapping[str, npt.DTypeLike] | None = None,
    ) -> None:
        self._positions = positions
        self._matrix = len(feature_uids) > 0 or n_features > 0
        self.kind: Kind = "matrix" if self._matrix else "arrays"
        layers = (layer,) if isinstance(layer, str) else tuple(layer)
        self._asked = {name: np.dtype(dtype) for name, dtype in (dtypes or {}).items()}
        if not self._matrix:
            shape = _one_shape(sources, rows, layers, positions)
            self.per_cell_shape = shape
            n_features = math.prod(shape) if shape is not None else 0
        super().__init__(
            sources,
            rows,
            layer=layers,
            n_features=n_features,
            feature_uids=feature_uids,
            obs=obs,
            recipe=recipe,
            feature_space=feature_space,
            reader=reader,
        )

    def _some_rows(self, chosen: np.ndarray) -> BoxIndex:
        return self._rows.at(chosen)

    @staticmethod
    def _rows_of(arrays: dict[str, np.ndarray]) -> BoxIndex:
        return BoxIndex(**arrays)

    def _open(self) -> None:
        from hbx_gpu._engine.host.boxes import BoxEngine

        self._boxes = box_table(self._sources, self.layers)
        self._open_files(self._boxes.layouts)
        dtypes, keep = list(self.dtypes.values()), self._view.decoded_cache
        self._arrays = BoxEngine(self._boxes, self._directory, dtypes, POOL, keep=keep)
        self._remaps = [source.remap for source in self._sources]

    def _dtype(self, layer: str) -> np.dtype:
        stored = common_dtype(self._sources, layer)
        wanted: np.dtype = np.dtype(self._asked.get(layer, stored))
        if not np.can_cast(stored, wanted, "same_kind"):
            raise ValueError(
                f"layer {layer!r} of {self.feature_space!r} is stored as {stored}, which {wanted} cannot "
                "hold; ask for a dtype of the same kind or a float"
            )
        return wanted

    def _check(self, sources: Sequence[Source], rows: BoxIndex) -> None:
        _check_boxes(sources, rows, self.layers)

    def _shape(self) -> str:
        return super()._shape() if self._matrix else f"arrays of {self.per_cell_shape or 'any'}"

    @property
    def is_matrix(self) -> bool:
        """Whether columns are features."""
        return self._matrix

    @property
    def positions(self) -> bool:
        """Whether a row is one position on the first axis, which its array then lacks."""
        return self._positions

    def plan(self, selection: np.ndarray) -> BoxPlan:
        """See :meth:`StoredDataset.plan`."""
        return plan_boxes(self._boxes, self._rows, selection)

    def needed_chunks(self) -> np.ndarray:
        """See :meth:`StoredDataset.needed_chunks`."""
        return needed_chunks(self._boxes, self._rows)

    def decode(
        self, plan: BoxPlan, slab: Slab, selections: Sequence[np.ndarray]
    ) -> list[DenseBatch | RaggedBatch]:
        """See :meth:`StoredDataset.decode`."""
        regular: Sequence[np.ndarray] = ()
        ragged: Sequence[list[np.ndarray]] = ()
        with stage("decode") as decoding, overflow_said(*self.dtypes.values()):
            if self._matrix:
                regular = self._arrays.matrix(plan, slab, self.n_features, self._remaps)
            elif self.per_cell_shape is not None:
                regular = self._arrays.tiles(plan, slab, self.per_cell_shape)
            else:
                native = [name not in self._asked for name in self.layers]
                ragged = self._arrays.boxes(plan, slab, positions=self._positions, native=native)
            decoding.nbytes = sum(x.nbytes for layer in (regular, *ragged) for x in layer)
        result: list[DenseBatch | RaggedBatch] = []
        start = 0
        for part, metadata in zip(selections, self._metadata(selections), strict=True):
            stop = start + len(part)
            several = len(self.layers) > 1
            if ragged:
                boxes = {name: layer[start:stop] for name, layer in zip(self.layers, ragged, strict=True)}
                result.append(
                    RaggedBatch(boxes[self.layer], metadata=metadata, layers=boxes if several else {})
                )
            else:
                rows = {name: layer[start:stop] for name, layer in zip(self.layers, regular, strict=True)}
                shape, layers = self.per_cell_shape, rows if several else {}
                result.append(DenseBatch(rows[self.layer], self.n_features, shape, metadata, layers))
            start = stop
        return result

    def marked(self, batch: DenseBatch | RaggedBatch) -> DenseBatch | RaggedBatch:
        """See :meth:`Dataset.marked`."""
        return replace(batch, axes=self.axes())

    def rows_nbytes(self, selections: Sequence[np.ndarray]) -> list[int]:
        """See :meth:`Dataset.rows_nbytes`."""
        return [self._nbytes(selection) for selection in selections]

    def _nbytes(self, selection: np.ndarray) -> int:
        if self._matrix or self.per_cell_shape is not None:
            return len(selection) * self.n_features * sum(dtype.itemsize for dtype in self.dtypes.values())
        source, size = self._rows.source[selection], self._rows.size[selection]
        total = 0
        for one in np.unique(source[source >= 0]).tolist():
            for name, dtype in self.dtypes.items():
                mine = size[source == one]
                shape = self._sources[one].layers[name].shape
                count = full_boxes(shape, np.zeros_like(mine), mine)[1]
                total += int(count.prod(axis=1).sum()) * dtype.itemsize
        return total

    def _state(self) -> dict[str, object]:
        own = ("_positions", "_matrix", "_asked", "kind", "per_cell_shape")
        return super()._state() | {name: getattr(self, name) for name in own}


FeatureDataset: TypeAlias = CellDataset | DenseCellDataset
"""The cells of one feature space, whatever their rows are."""


def _one_shape(
    sources: Sequence[Source], rows: BoxIndex, layers: Sequence[str], positions: bool
) -> tuple[int, ...] | None:
    """Return the shape that all boxes have in all layers; None where shapes differ or there are no boxes."""
    shapes: set[tuple[int, ...]] = set()
    for source, mine in zip(sources, rows_by_source(rows.source, len(sources)), strict=True):
        if not len(mine):
            continue
        sizes = np.unique(rows.size[mine], axis=0)
        for name in layers:
            shape = source.layers[name].shape
            count = full_boxes(shape, np.zeros_like(sizes), sizes)[1]
            shapes |= {tuple(one[1:] if positions else one) for one in count.tolist()}
        if len(shapes) > 1:
            return None
    return shapes.pop() if shapes else None


def _check_boxes(sources: Sequence[Source], rows: BoxIndex, layers: Sequence[str]) -> None:
    """Check that every box lies inside the arrays of its Source."""
    for source, mine in zip(sources, rows_by_source(rows.source, len(sources)), strict=True):
        if source.index is not None:
            raise UnsupportedError(f"group {source.name!r} is a sparse matrix; open it as a CellDataset")
        for name in layers:
            layout = source.layers[name]
            lower, count = full_boxes(layout.shape, rows.lower[mine], rows.size[mine])
            upper = lower + count
            bad = ((lower < 0) | (count < 0) | (upper > np.array(layout.shape, np.int64))).any(axis=1)
            if bad.any():
                row = int(np.flatnonzero(bad)[0])
                raise CorruptDataError(
                    f"row {mine[row]} points at elements {lower[row].tolist()} to {upper[row].tolist()} of "
                    f"array {layout.name!r}, whose shape is {list(layout.shape)}"
                )
    if len(rows) and (rows.source.min() < -1 or rows.source.max() >= len(sources)):
        raise ValueError(f"row sources must lie in [-1, {len(sources)})")
