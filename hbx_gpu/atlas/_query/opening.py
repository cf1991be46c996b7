"""Opens the arrays that rows of an obs table point to, as Sources and datasets."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hbx_gpu._advice import option, spelled, within_memory
from hbx_gpu._plan.boxes import full_boxes
from hbx_gpu._remote.fetch import map_at_once
from hbx_gpu._remote.places import AnyPath, is_remote
from hbx_gpu._source import ArrayLayout, BoxIndex, RowIndex, RowTable, Source, rows_by_source
from hbx_gpu._storage.metadata import check_last_object, read_layout
from hbx_gpu._untrusted import Within
from hbx_gpu.atlas._model.spaces import FeatureSpace, find_layers, get_space, known_spaces
from hbx_gpu.atlas._query.obs import ModalityRows, row_uid
from hbx_gpu.errors import CorruptDataError, UnknownNameError

if TYPE_CHECKING:
    from hbx_gpu._datasets.dense import FeatureDataset
    from hbx_gpu._datasets.stored import Recipe
    from hbx_gpu.atlas._catalog.snapshot import Group, PointerColumn, Snapshot
    from hbx_gpu.atlas._query.ids import IdRuns

_AT_ONCE = 1 << 20  # rows that are checked together
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns of a dataset.

    Attributes
    ----------
    uids
        object, (n_features,). Feature uid of each column.
    place
        int32, (registry width,). Global index -> column, -1 if left out; None if columns are global indices.
    """

    uids: np.ndarray
    place: np.ndarray | None = None


def all_columns(snapshot: Snapshot, feature_space: str) -> Columns:
    """The whole feature space by global index; no columns for spaces without registered features."""
    if feature_space not in snapshot.record.registries:
        return Columns(np.empty(0, dtype=object))
    return Columns(snapshot.registry(feature_space).uids)


def chosen_columns(snapshot: Snapshot, feature_space: str, global_index: np.ndarray) -> Columns:
    """Columns for the features with these global indices, in that order."""
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
    """First required layer of a registered space, or the only layer of another space.

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
    layers = sorted(find_layers(snapshot.group_path(group.name), snapshot.space(group)))
    if len(layers) != 1:
        raise ValueError(
            f"choose a layer of feature space {feature_space!r}; group {group.name!r} has {layers}"
        )
    return layers[0]


@dataclass(frozen=True, slots=True)
class Arrays:
    """Arrays of a group: column indices where it has them, and layers by name."""

    index: ArrayLayout | None
    layers: dict[str, ArrayLayout]


def build_sources(
    snapshot: Snapshot,
    groups: Sequence[Group],
    layers: Sequence[str],
    columns: Columns,
    ahead: Mapping[str, Arrays] | None = None,
) -> list[Source]:
    """Open layers of several groups, except those whose arrays were opened `ahead`.

    Raises
    ------
    UnknownNameError
        A group lacks the layer.
    CorruptDataError
        A dense layer is not as wide as the group's feature layout.
    """
    composed: dict[str, np.ndarray] = {}
    lookup = None if columns.place is None else np.append(columns.place, np.int32(-1))
    for group in groups:
        layout = group.layout_uid
        if layout not in composed:
            # Sources that share a layout must share the array object; index -1 picks the appended -1.
            remap = snapshot.remap(group.name, group.feature_space)
            composed[layout] = remap if lookup is None else lookup[remap]

    within = links_of(snapshot)
    there = ahead or {}

    def opened(group: Group) -> Source:
        space, remap = snapshot.space(group), composed[group.layout_uid]
        arrays = there.get(group.name) or arrays_of(snapshot, group, space, layers, within)
        return _source(group, space, arrays, remap)

    if not is_remote(snapshot.store_path):
        return [opened(group) for group in groups]
    # A group whose metadata are not known takes several requests, so many groups are opened at once.
    asked = [group for group in groups if not _is_known(snapshot, group, layers)]
    found = {source.name: source for source in map_at_once(opened, asked)}
    return [found.get(group.name) or opened(group) for group in groups]


def _is_known(snapshot: Snapshot, group: Group, layers: Sequence[str]) -> bool:
    """Whether the metadata of all arrays of a group are known without a request."""
    if group.feature_space not in known_spaces():
        return False
    space = get_space(group.feature_space)
    arrays = [f"{space.layers_path}/{layer}" for layer in layers]
    arrays += [] if space.index_array is None else [space.index_array]
    return all(snapshot.array_document(f"{group.name}/{array}") is not None for array in arrays)


def links_of(snapshot: Snapshot) -> Within:
    """What refuses links that lead out of the zarr store, unless they are allowed."""
    free = snapshot.allow_links or is_remote(snapshot.store_path)
    return Within("" if free else str(snapshot.store_path))


def arrays_of(
    snapshot: Snapshot, group: Group, space: FeatureSpace, layers: Sequence[str], within: Within
) -> Arrays:
    """Open layers of a group.

    Raises
    ------
    UnknownNameError
        The group lacks a layer.
    CorruptDataError
        The metadata of an array are damaged.
    """
    folder = snapshot.group_path(group.name, within)
    if not space.old_layers and all(map(_PLAIN_NAME.fullmatch, layers)):
        # Where layers have their usual places, looking for them would take longer than opening them.
        try:
            found = {layer: f"{space.layers_path}/{layer}" for layer in layers}
            return _opened(snapshot, group, space, found, folder, within)
        except FileNotFoundError:
            pass
    found = find_layers(folder, space)
    if unknown := [layer for layer in layers if layer not in found]:
        choose = option("layer")
        choose = spelled(
            f"{choose} of to_cell_dataset, or layers({space.name!r}, [...]) of the query", choose
        )
        raise UnknownNameError(
            f"group {group.name!r} has no layer {', '.join(map(repr, unknown))}; its layers: {sorted(found)} "
            f"(in {folder}). Choose one that all of them have with {choose}"
        )
    places = {layer: found[layer] for layer in layers}
    return _opened(snapshot, group, space, places, folder, within)


def _opened(
    snapshot: Snapshot,
    group: Group,
    space: FeatureSpace,
    places: Mapping[str, str],
    folder: AnyPath,
    within: Within,
) -> Arrays:
    """Open layers of a group whose places in it are known."""
    # Our writer stores every chunk, so a missing one is damage there; other writers skip empty chunks.
    absent_is_fill = not group.software.startswith("hbx_gpu")

    def opened(relative: str) -> ArrayLayout:
        name = f"{group.name}/{relative}"
        layout = read_layout(
            f"{folder}/{relative}",
            name,
            absent_is_fill=absent_is_fill,
            within=within,
            document=snapshot.array_document(name),
        )
        check_last_object(layout)
        return layout

    index = None if space.index_array is None else opened(space.index_array)
    return Arrays(index, {layer: opened(place) for layer, place in places.items()})


def _source(group: Group, space: FeatureSpace, arrays: Arrays, remap: np.ndarray) -> Source:
    for array in arrays.layers.values():
        if arrays.index is None and space.has_features and array.shape[1:] != (len(remap),):
            raise CorruptDataError(
                f"array {array.name!r} has shape {array.shape}, but the layout of group {group.name!r} "
                f"lists {len(remap)} features"
            )
    return Source(group.name, arrays.index, arrays.layers, remap, repeats=space.repeats)


def check_pointers(
    snapshot: Snapshot,
    table: str,
    sources: Sequence[Source],
    rows: RowTable | BoxIndex,
    ids: IdRuns,
) -> None:
    """Check that every row lies inside the arrays of its Source.

    Raises
    ------
    CorruptDataError
        A row does not; the message names group, array and uid of the first such row.
    """
    if isinstance(rows, BoxIndex):
        _check_part(snapshot, table, sources, rows, ids[np.arange(len(rows))])
        return
    limits = _limits(sources)
    if limits is not None:
        outermost = rows.outermost()
        if (outermost.start + outermost.length <= limits[outermost.source]).all():
            return
    for begin in range(0, len(rows), _AT_ONCE):
        part = rows.slice(begin, begin + _AT_ONCE)
        if limits is None or (part.start + part.length > limits[part.source]).any():
            numbers = ids[np.arange(begin, begin + len(part))]
            _check_part(snapshot, table, sources, part, numbers)


def _limits(sources: Sequence[Source]) -> np.ndarray | None:
    """Elements that the arrays of each Source hold along their first axis, the least of several.

    Rows without a Source, -1, have none, which is the last entry. None where arrays have more axes.
    """
    limits = np.zeros(len(sources) + 1, np.int64)
    for i, source in enumerate(sources):
        arrays = [*source.layers.values(), *([] if source.index is None else [source.index])]
        if any(len(array.shape) > 1 for array in arrays):
            return None
        limits[i] = min(array.shape[0] for array in arrays)
    return limits


def _check_part(
    snapshot: Snapshot,
    table: str,
    sources: Sequence[Source],
    rows: RowIndex | BoxIndex,
    rowids: np.ndarray,
) -> None:
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
                upper[:] = np.iinfo(np.int64).max  # the box has more axes than the array
            bad = np.flatnonzero((upper > np.array(array.shape, np.int64)).any(axis=1))
            if bad.size:
                row = int(bad[0])
                claims = (
                    f"elements [{lower[row, 0]}, {upper[row, 0]})"
                    if isinstance(rows, RowIndex)
                    else f"the box from {boxes.lower[row].tolist()}, {boxes.size[row].tolist()} long,"
                )
                raise CorruptDataError(
                    f"pointer beyond the array: row {row_uid(snapshot, table, rowids[mine[row]])!r} "
                    f"claims {claims} of array {array.name!r} in group {source.name!r}, which has "
                    f"{array.shape[0] if len(array.shape) == 1 else list(array.shape)}"
                )


def _boxes_of(rows: RowIndex | BoxIndex, mine: np.ndarray) -> BoxIndex:
    return BoxIndex.of_rows(rows.at(mine)) if isinstance(rows, RowIndex) else rows.at(mine)


# Datasets


def open_dataset(
    snapshot: Snapshot,
    table: str,
    pointer: PointerColumn,
    found: ModalityRows,
    layers: Sequence[str],
    columns: Columns,
    recipe: Recipe | None,
    dtypes: Mapping[str, str] | None = None,
    ahead: Mapping[str, Arrays] | None = None,
) -> FeatureDataset:
    """Open and check the Sources of rows that were found, and make a dataset over them.

    Parameters
    ----------
    snapshot, table
        The atlas, and its obs table.
    pointer
        The field that is read.
    found
        The rows, and where their data lie.
    layers
        Names of the layers that batches carry.
    columns
        Features that become columns.
    recipe
        How a spawned worker makes the dataset again; None if something else sees to that.
    dtypes
        Layer -> dtype of batches of dense matrices; the stored one by default.
    ahead
        Arrays of `layers` that are open already, by name of their group.

    Raises
    ------
    ValueError
        `dtypes` for a sparse field.
    UnknownNameError
        A group lacks a layer.
    CorruptDataError
        A row reaches beyond the arrays of its group.
    ResourceError
        There is too little memory.
    """
    with within_memory(f"a dataset over the atlas at {snapshot.path}"):
        from hbx_gpu._datasets.cells import CellDataset
        from hbx_gpu._datasets.dense import DenseCellDataset

        groups = group_records(snapshot, found.groups, pointer.feature_space)
        sources = build_sources(snapshot, groups, layers, columns, ahead)
        check_pointers(snapshot, table, sources, found.rows, found.ids)
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
                    f"{pointer.feature_space!r} is sparse and comes as it is stored; the collate or "
                    "make_loader says in which dtype it becomes dense"
                )
            assert not isinstance(rows, BoxIndex)
            return CellDataset(sources, rows, **common)
        boxes = rows if isinstance(rows, BoxIndex) else BoxIndex.of_rows(rows)
        return DenseCellDataset(
            sources, boxes, positions=pointer.kind == "dense", dtypes=dict(dtypes or {}), **common
        )


def has_index(snapshot: Snapshot, pointer: PointerColumn, sources: Sequence[Source]) -> bool:
    """Whether rows of a field are sparse, which means that column numbers are stored beside the values."""
    if sources:
        return sources[0].index is not None
    if pointer.feature_space in known_spaces():
        return get_space(pointer.feature_space).index_array is not None
    return pointer.kind == "sparse" and pointer.feature_space in snapshot.record.registries
