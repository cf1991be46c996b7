"""The same cells under another file: found by their names and by what was counted in them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hbx_gpu._advice import spelled
from hbx_gpu.atlas._catalog import tables
from hbx_gpu.atlas._catalog.catalog import Catalog
from hbx_gpu.atlas._model.spaces import FeatureSpace, find_layers

_log = logging.getLogger(__name__)

# Of the smaller dataset; names such as cell_0 meet by chance, so counts decide.
MOST_NAMES, MOST_COUNTS = 0.5, 0.8
_COMPARED = 64


@dataclass(frozen=True)
class SameCells:
    """A stored dataset that has most of the cells of a new one.

    Attributes
    ----------
    dataset_uid, source_name
        Uid of the stored dataset, and the name of its file.
    n_names
        Number of cell names that both datasets have.
    """

    dataset_uid: str
    source_name: str
    n_names: int


def datasets_with_names(
    catalog: Catalog, obs_table: str, names: Collection[str], ignored: Collection[str]
) -> dict[str, int]:
    """Datasets that share most names of cells with a new one -> how many; `ignored` ones aside."""
    table = catalog.obs(obs_table)
    if "obs_name" not in table.schema.names or not len(names):
        return {}
    stored = tables.read(table, ["obs_name", "dataset_uid"])
    wanted = pa.array(sorted(set(names)), pa.string())
    known = stored.filter(pc.is_in(stored.column("obs_name").cast(pa.string()), value_set=wanted))
    sizes = {
        row["values"]: row["counts"] for row in pc.value_counts(stored.column("dataset_uid")).to_pylist()
    }
    shared = pc.value_counts(known.column("dataset_uid")).to_pylist()
    return {
        row["values"]: row["counts"]
        for row in shared
        if row["values"] not in ignored
        and row["counts"] >= MOST_NAMES * min(sizes[row["values"]], len(names))
    }


def find_same_cells(
    catalog: Catalog,
    obs_table: str,
    candidates: Mapping[str, int],
    field: tuple[str, FeatureSpace],
    names: pa.Array,
    pointers: pa.Array,
) -> SameCells | None:
    """The first candidate whose cells hold the values of those of a new dataset.

    Parameters
    ----------
    catalog, obs_table
        Where the stored cells are.
    candidates
        As :func:`datasets_with_names` finds them.
    field
        Pointer column of a modality of the new dataset whose group is written, and its feature space.
    names, pointers
        Names of the new cells, and where they are in that modality.
    """
    table = catalog.obs(obs_table)
    field_name, space = field
    if not {"obs_name", field_name} <= set(table.schema.names) or space.pointer == "discrete_spatial":
        return None
    for uid, n_names in candidates.items():
        where = f"dataset_uid = {tables.quoted(uid)} AND `{field_name}`.zarr_group IS NOT NULL"
        stored = tables.read(table, ["obs_name", field_name], where)
        places = pc.index_in(stored.column("obs_name").cast(pa.string()), value_set=names).to_pylist()
        rows = [i for i, place in enumerate(places) if place is not None]
        chosen = rows[:: max(1, len(rows) // _COMPARED)]
        there = stored.column(field_name)
        pairs = [(there[i].as_py(), pointers[places[i]].as_py()) for i in chosen]
        pairs = [(a, b) for a, b in pairs if b is not None and b.get("zarr_group")]
        if not _have_as_many_values(pairs):
            continue
        for group in {str(stored["zarr_group"]) for stored, _ in pairs}:
            catalog.fetch(group)
        if _are_mostly_same(_Values(catalog.store, space), pairs):
            return SameCells(uid, str(stored_row(catalog, uid).get("source_name") or ""), n_names)
    return None


def stored_row(catalog: Catalog, dataset_uid: str) -> Mapping[str, Any]:
    """The row of a group of a dataset; empty where there is none."""
    return next(iter(catalog.dataset_rows(f"dataset_uid = {tables.quoted(dataset_uid)}")), {})


def _have_as_many_values(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> bool:
    """Whether most pairs have as many stored values; other pairs are told apart without reading them."""
    equal = [
        one["end"] - one["start"] == other["end"] - other["start"]
        for one, other in pairs
        if "start" in one and "start" in other
    ]
    return equal.count(True) >= MOST_COUNTS * len(equal)


def _are_mostly_same(read: _Values, pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> bool:
    """Whether most pairs of cells hold the same values; pairs that say nothing are left out.

    Files whose cells are called 0, 1, 2, ... are compared with each other, so a few pairs have to be enough
    to tell different cells.
    """
    same = different = 0
    for one, other in pairs:
        equal = read.same(one, other)
        same, different = same + (equal is True), different + (equal is False)
        if len(pairs) - different < MOST_COUNTS * len(pairs):
            return False  # whatever the rest is
    return same > 0 and same >= MOST_COUNTS * (same + different)


def say_other_version(
    candidates: Mapping[str, int],
    row_of: Callable[[str], Mapping[str, Any]],
    source_names: Collection[str],
    source: str,
) -> None:
    """Warn where cells of the same names, with other values, came from a file of the same name.

    Parameters
    ----------
    candidates
        As :func:`datasets_with_names` finds them.
    row_of
        Returns the row of a group of a dataset, given its uid; an empty one where there is none.
    source_names
        Names of the new files; data in memory have none.
    source
        The new dataset, for the message.
    """
    for uid, n_names in candidates.items():
        name = str(row_of(uid).get("source_name") or "")
        if Path(name).suffix and name in source_names:
            remove = spelled(f"remove_dataset({uid!r})", f"hbx-gpu remove ATLAS {uid}")
            _log.warning(
                "warning: %s: %d of its cells have the names of cells of dataset %r, from a file of the same "
                "name, and other values; both are kept. If the file was corrected, remove the old one: %s",
                source,
                n_names,
                uid,
                remove,
            )


class _Values:
    """Values of cells in the groups of a store."""

    def __init__(self, store: Path, space: FeatureSpace) -> None:
        self._store, self._space = store, space
        self._opened: dict[tuple[str, str], Any] = {}

    def same(self, one: Mapping[str, object], other: Mapping[str, object]) -> bool | None:
        """Whether two cells hold the same values, in any order.

        None where neither holds any, or no layer is common.
        """
        groups = [str(pointer["zarr_group"]) for pointer in (one, other)]
        layers = [find_layers(self._store / group, self._space) for group in groups]
        common = sorted(set(layers[0]) & set(layers[1]))
        if not common:
            return None
        a, b = (
            self._read(pointer, group, paths[common[0]])
            for pointer, group, paths in zip((one, other), groups, layers, strict=True)
        )
        if not a.any() and not b.any():
            return None
        return a.shape == b.shape and bool((a == b).all())

    def _read(self, pointer: Mapping[str, Any], group: str, layer: str) -> np.ndarray:
        import zarr

        if (group, layer) not in self._opened:
            self._opened[group, layer] = zarr.open_array(self._store / group / layer, mode="r")
        array = self._opened[group, layer]
        if "start" in pointer:
            values = array[int(pointer["start"]) : int(pointer["end"])]
        else:
            values = array[int(pointer["position"])]
        values = np.asarray(values).ravel()
        return np.sort(values[values != 0])
