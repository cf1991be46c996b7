"""From rows of an obs table to Sources, datasets and AnnData: where the catalogue meets the arrays."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from hbx_gpu._plan.boxes import full_boxes
from hbx_gpu._source import ArrayLayout, BoxIndex, RowIndex, Source, rows_by_source
from hbx_gpu._storage.metadata import read_layout
from hbx_gpu.atlas._model.spaces import FeatureSpace, find_layers, get_space, known_spaces
from hbx_gpu.atlas._query import obs as obs_room
from hbx_gpu.atlas._query.recipe import FeatureJoin, QueryRecipe
from hbx_gpu.batch import DenseBatch
from hbx_gpu.errors import CorruptDataError, UnknownNameError

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

    from hbx_gpu._datasets.cells import CellDataset
    from hbx_gpu.atlas._catalogue.snapshot import Group, PointerField, Snapshot

_BLOCK_ELEMENTS = 1 << 27
"""Matrix entries, zeros counted, read at once when a matrix is put together."""


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns of a dataset.

    Attributes
    ----------
    uids
        object, (n_features,).
    place
        int32, (registry width,). Global index -> column, -1 = left out; None = the global index itself.
    """

    uids: np.ndarray
    place: np.ndarray | None = None


def all_columns(snapshot: Snapshot, feature_space: str) -> Columns:
    """The whole feature space by global index; no columns for spaces without registered features."""
    if feature_space not in snapshot.record.registries:
        return Columns(np.empty(0, dtype=object))
    return Columns(snapshot.registry(feature_space).uids)


def chosen_columns(snapshot: Snapshot, feature_space: str, global_index: np.ndarray) -> Columns:
    """The features `global_index`, in that order."""
    registry = snapshot.registry(feature_space)
    place = np.full(registry.n_features, -1, dtype=np.int32)
    place[global_index] = np.arange(len(global_index), dtype=np.int32)
    return Columns(registry.uids[global_index], place)


# Groups


def group_records(snapshot: Snapshot, names: Sequence[str], feature_space: str) -> list[Group]:
    """Records of groups, their feature layouts loaded."""
    groups = [snapshot.group(name, feature_space) for name in names]
    snapshot.load_remaps(groups)
    return groups


def default_layer(snapshot: Snapshot, feature_space: str, groups: Sequence[str]) -> str:
    """First required layer of a space, or the only layer of a space that is not registered.

    Raises
    ------
    ValueError
        The space is not registered and its groups hold several layers.
    """
    if feature_space in known_spaces():
        return next(iter(get_space(feature_space).required_layers), "")
    if not groups:
        return ""
    group = snapshot.group(groups[0], feature_space)
    layers = sorted(find_layers(snapshot.store_path / group.name, snapshot.space(group)))
    if len(layers) != 1:
        raise ValueError(
            f"choose a layer of feature space {feature_space!r}; group {group.name!r} has {layers}"
        )
    return layers[0]


def build_sources(
    snapshot: Snapshot, groups: Sequence[Group], layers: Sequence[str], columns: Columns
) -> list[Source]:
    """Open layers of several groups.

    Raises
    ------
    UnknownNameError
        A group lacks the layer.
    CorruptDataError
        A dense layer is not as wide as the group's feature layout.
    """
    composed: dict[str, np.ndarray] = {}
    lookup = None if columns.place is None else np.append(columns.place, np.int32(-1))
    sources = []
    for group in groups:
        space = snapshot.space(group)
        layout = group.layout_uid
        if layout not in composed:
            # Sources that share a layout must share the array object; -1 picks the appended -1.
            remap = snapshot.remap(group.name, group.feature_space)
            composed[layout] = remap if lookup is None else lookup[remap]
        sources.append(_source(snapshot, group, space, layers, composed[layout]))
    return sources


def _source(
    snapshot: Snapshot, group: Group, space: FeatureSpace, layers: Sequence[str], remap: np.ndarray
) -> Source:
    folder = snapshot.store_path / group.name
    found = find_layers(folder, space)
    if unknown := [layer for layer in layers if layer not in found]:
        raise UnknownNameError(
            f"group {group.name!r} has no layer {', '.join(map(repr, unknown))}; its layers: {sorted(found)} "
            f"(in {folder})"
        )
    # Our own writer stores every chunk, so there a missing one is damage; others skip empty ones.
    absent_is_fill = not group.software.startswith("hbx_gpu")

    def opened(relative: str) -> ArrayLayout:
        return read_layout(str(folder / relative), f"{group.name}/{relative}", absent_is_fill=absent_is_fill)

    index = None if space.index_array is None else opened(space.index_array)
    values = {layer: opened(found[layer]) for layer in layers}
    for array in values.values():
        if index is None and space.has_features and array.shape[1:] != (len(remap),):
            raise CorruptDataError(
                f"array {array.name!r} has shape {array.shape}, but the layout of group {group.name!r} "
                f"lists {len(remap)} features"
            )
    return Source(group.name, index, values, remap, repeats=space.repeats)


def check_pointers(
    snapshot: Snapshot,
    table: str,
    sources: Sequence[Source],
    rows: RowIndex | BoxIndex,
    rowids: np.ndarray,
) -> None:
    """Every row lies inside the arrays of its Source.

    Raises
    ------
    CorruptDataError
        Names group, array and uid of the first row that does not.
    """
    by_source = rows_by_source(rows.source, len(sources))
    for source, mine in zip(sources, by_source, strict=True):
        boxes = _boxes_of(rows, mine)
        arrays = (
            [*source.layers.values()] if source.index is None else [source.index, *source.layers.values()]
        )
        for array in arrays:
            lower, size = full_boxes(array.shape, boxes.lower, boxes.size)
            upper = lower + size
            if boxes.size.shape[1] > len(array.shape):
                upper[:] = np.iinfo(np.int64).max  # more corners than axes
            bad = np.flatnonzero((upper > np.array(array.shape, np.int64)).any(axis=1))
            if bad.size:
                row = int(bad[0])
                claims = (
                    f"elements [{lower[row, 0]}, {upper[row, 0]})"
                    if isinstance(rows, RowIndex)
                    else f"the box from {boxes.lower[row].tolist()}, {boxes.size[row].tolist()} long,"
                )
                raise CorruptDataError(
                    f"pointer beyond the array: row {obs_room.row_uid(snapshot, table, rowids[mine[row]])!r} "
                    f"claims {claims} of array {array.name!r} in group {source.name!r}, which has "
                    f"{array.shape[0] if len(array.shape) == 1 else list(array.shape)}"
                )


def _boxes_of(rows: RowIndex | BoxIndex, mine: np.ndarray) -> BoxIndex:
    if isinstance(rows, RowIndex):
        return BoxIndex.of_rows(RowIndex(rows.source[mine], rows.start[mine], rows.length[mine]))
    return BoxIndex(rows.source[mine], rows.lower[mine], rows.size[mine])


# Datasets


def open_dataset(
    snapshot: Snapshot,
    table: str,
    pointer: PointerField,
    found: obs_room.ModalityRows,
    layers: Sequence[str],
    columns: Columns,
    recipe: QueryRecipe | None,
    dtypes: Mapping[str, str] | None = None,
) -> CellDataset:
    """A dataset over rows that were found, with their Sources opened and checked."""
    from hbx_gpu._datasets.cells import CellDataset
    from hbx_gpu._datasets.dense import DenseCellDataset

    groups = group_records(snapshot, found.groups, pointer.feature_space)
    sources = build_sources(snapshot, groups, layers, columns)
    check_pointers(snapshot, table, sources, found.rows, found.rowids)
    common: dict[str, Any] = {
        "layer": layers,
        "n_features": len(columns.uids),
        "feature_uids": columns.uids,
        "obs": found.obs,
        "recipe": recipe,
        "feature_space": pointer.feature_space,
    }
    rows = found.rows
    if has_index(snapshot, pointer, sources):
        if dtypes:
            raise ValueError(
                f"{pointer.feature_space!r} is sparse and comes as it is stored; the collate or make_loader "
                "says in which dtype it becomes dense"
            )
        assert isinstance(rows, RowIndex)
        return CellDataset(sources, rows, **common)
    boxes = BoxIndex.of_rows(rows) if isinstance(rows, RowIndex) else rows
    return DenseCellDataset(
        sources, boxes, positions=pointer.kind == "dense", dtypes=dict(dtypes or {}), **common
    )


def has_index(snapshot: Snapshot, pointer: PointerField, sources: Sequence[Source]) -> bool:
    """Whether rows of a field are sparse: columns beside values."""
    if sources:
        return sources[0].index is not None
    if pointer.feature_space in known_spaces():
        return get_space(pointer.feature_space).index_array is not None
    return pointer.kind == "sparse" and pointer.feature_space in snapshot.record.registries


# AnnData


def measured(snapshot: Snapshot, feature_space: str, groups: Sequence[str], join: FeatureJoin) -> np.ndarray:
    """Ascending global indices of the features that any (union) or all (intersection) groups measured."""
    counts = np.zeros(snapshot.registry(feature_space).n_features, dtype=np.int64)
    for group in group_records(snapshot, groups, feature_space):
        remap = snapshot.remap(group.name, feature_space)
        counts[np.unique(remap[remap >= 0])] += 1
    return np.flatnonzero(counts == len(groups) if join == "intersection" and groups else counts > 0)


@dataclass(frozen=True, slots=True)
class Matrices:
    """The layers of a query's rows, with names for both axes, from which AnnData is cut.

    Attributes
    ----------
    layers
        Layer name -> dataset; all over the same rows and columns. The first becomes ``X``.
    obs
        One row per dataset row; the uid among its columns.
    obs_names
        Columns of `obs` that AnnData shall show.
    var
        One row per column, indexed by uid.
    """

    layers: dict[str, CellDataset]
    obs: pa.Table
    obs_names: list[str]
    var: pd.DataFrame

    def __len__(self) -> int:
        return len(self.obs)

    def cut(self, start: int, stop: int) -> AnnData:
        """Rows ``[start, stop)`` as AnnData: CSR of the stored dtype, rows in query order."""
        from anndata import AnnData

        frame = obs_frame(self.obs.slice(start, stop - start), self.obs_names)
        matrices = {name: _read(dataset, start, stop) for name, dataset in self.layers.items()}
        first = next(iter(matrices))
        x = matrices.pop(first)
        return AnnData(x, obs=frame, var=self.var.copy(), layers=matrices)

    def pieces(self, batch_size: int) -> Iterator[AnnData]:
        """All rows, `batch_size` at a time."""
        for start in range(0, len(self), batch_size):
            yield self.cut(start, min(start + batch_size, len(self)))


def _read(dataset: CellDataset, start: int, stop: int) -> object:
    from scipy.sparse import csr_matrix

    blocks = [dataset.__getitems__(block) for block in _blocks(dataset, start, stop)]
    if isinstance(blocks[0], DenseBatch):
        return np.concatenate([block.data for block in blocks])
    lengths = np.concatenate([np.diff(block.offsets) for block in blocks])
    matrix = csr_matrix(
        (
            np.concatenate([block.values for block in blocks]),
            np.concatenate([block.indices for block in blocks]),
            np.concatenate([[0], np.cumsum(lengths)]),
        ),
        shape=(stop - start, dataset.n_features),
    )
    matrix.sort_indices()
    return matrix


def _blocks(dataset: CellDataset, start: int, stop: int) -> list[np.ndarray]:
    """Row numbers cut into at least one piece of at most `_BLOCK_ELEMENTS` matrix entries each."""
    rows = max(1, _BLOCK_ELEMENTS // max(1, dataset.n_features))
    edges = [*range(start, stop, rows), stop] if stop > start else [start, stop]
    return [np.arange(a, b) for a, b in pairwise(edges)]


def obs_frame(obs: pa.Table, names: Sequence[str]) -> pd.DataFrame:
    """Obs columns with the uid as index."""
    frame = to_pandas(obs.select(names))
    frame.index = obs.column("uid").to_numpy().astype(str).astype(object)
    frame.index.name = "uid"
    return frame


def to_pandas(table: pa.Table) -> pd.DataFrame:
    """A pandas frame in which missing bools stay missing bools (pandas' own default makes them objects)."""
    import pandas as pd

    return table.to_pandas(types_mapper={pa.bool_(): pd.BooleanDtype()}.get if _null_bools(table) else None)


def _null_bools(table: pa.Table) -> bool:
    return any(pa.types.is_boolean(c.type) and c.null_count for c in table.columns)
