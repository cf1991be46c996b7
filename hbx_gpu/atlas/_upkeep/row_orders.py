"""What repack must know to order the rows of a group: their extents, and the numbers of the features.

A snapshot pins the numbering of a group's local columns, so that numbering never changes. What may change is
the order of the elements within a row, because nothing refers to it.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from lancedb.table import Table

from hbx_gpu.atlas._catalog import tables
from hbx_gpu.atlas._catalog.snapshot import Snapshot
from hbx_gpu.atlas._catalog.snapshot_records import SnapshotRecord
from hbx_gpu.atlas._query.obs import scan
from hbx_gpu.atlas._writing.recoding import RowOrder
from hbx_gpu.errors import AtlasError

_log = logging.getLogger(__name__)

Key = tuple[str, str]
"""Path and feature space of a group."""
_EXTENT = ("zarr_group", "start", "end")


@dataclass(frozen=True)
class Rows:
    """The rows of a group and the order that their elements shall have.

    Attributes
    ----------
    starts, ends
        int64, (n_rows,). Elements [start, end) of each row that has any; rows ascend and share no element.
    rank
        int64, (n_local_features,). Place of each local column in the order of the registry.
    """

    starts: np.ndarray
    ends: np.ndarray
    rank: np.ndarray

    @property
    def order(self) -> RowOrder:
        """What the order of the registry is for this group: often it is that of the local columns."""
        return "layout" if (np.diff(self.rank) > 0).all() else "registry"


def rows_to_order(
    root: Path,
    store: Path,
    records: Sequence[SnapshotRecord],
    obs_tables: Collection[str],
    groups: Collection[Key],
    *,
    allow_links: bool = False,
) -> dict[Key, Rows | str]:
    """The rows of groups, or why a group cannot be ordered.

    Parameters
    ----------
    root, store
        The atlas and its zarr store.
    records
        All of its snapshots.
    obs_tables
        Obs tables of its current state, which may have cells that no snapshot has.
    groups
        Groups of sparse matrices.
    allow_links
        See `repack`.
    """
    if not groups:
        return {}
    remaps = _remaps(store, root, records, groups, allow_links=allow_links)
    extents = _extents(root, records, obs_tables, {name for name, _ in remaps})
    out: dict[Key, Rows | str] = dict.fromkeys(groups, "its genes have no numbers before the next snapshot")
    for key, remap in remaps.items():
        starts, ends = extents.get(key[0], np.empty((2, 0), np.int64))
        if (starts[1:] < ends[:-1]).any():
            out[key] = "its rows overlap"
            continue
        rank = np.empty(len(remap), np.int64)
        rank[np.argsort(remap, kind="stable")] = np.arange(len(remap))
        out[key] = Rows(starts, ends, rank)
    return out


def _remaps(
    store: Path, root: Path, records: Sequence[SnapshotRecord], groups: Collection[Key], *, allow_links: bool
) -> dict[Key, np.ndarray]:
    """Local column -> number in the registry, of groups that any snapshot has."""
    found: dict[Key, np.ndarray] = {}
    for record in reversed(records):
        left = [key for key in groups if key not in found]
        if not left:
            break
        try:
            snapshot = Snapshot.open(root, record.version, store=store, allow_links=allow_links)
            listed = {
                (row["zarr_group"], row["feature_space"]) for row in snapshot.datasets().to_dict("records")
            }
            here = [key for key in left if key in listed]
            snapshot.load_remaps([snapshot.group(*key) for key in here])
            found |= {key: snapshot.remap(*key) for key in here}
        except AtlasError as error:
            _log.warning("snapshot %d cannot be read, left out: %s", record.version, error)
    return found


def _extents(
    root: Path, records: Sequence[SnapshotRecord], obs_tables: Collection[str], names: Collection[str]
) -> dict[str, np.ndarray]:
    """Group -> int64, (2, n). Starts and ends of its rows in any snapshot or in the current state, ascending.

    Takes 16 bytes per cell.
    """
    versions: set[tuple[str, int | None]] = {(name, None) for name in obs_tables}
    versions |= {(name, version) for record in records for name, version in record.obs_tables.items()}
    found: dict[str, np.ndarray] = {}
    for name, version in sorted(versions, key=str):
        table = tables.open_table(root, name)
        try:
            if version is not None:
                table.checkout(version)
            read: dict[str, list[np.ndarray]] = {}
            for group, pairs in _pointers(table, names):
                read.setdefault(group, []).append(pairs)
        except (ValueError, RuntimeError, OSError) as error:
            if version is None:
                raise
            _log.warning("version %s of table %r cannot be read, left out: %s", version, name, error)
            continue
        for group, parts in read.items():
            found[group] = _distinct([*([found[group]] if group in found else []), *parts])
    return found


def _pointers(table: Table, names: Collection[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Groups, and starts and ends of rows of theirs that have elements, as they are met."""
    for field in table.schema:
        if not pa.types.is_struct(field.type) or not {f.name for f in field.type} >= set(_EXTENT):
            continue
        for batch in scan(table, {part: f"`{field.name}`.`{part}`" for part in _EXTENT}):
            batch = batch.filter(pc.less(batch.column("start"), batch.column("end")))
            codes = batch.column("zarr_group").cast(pa.string()).fill_null("").dictionary_encode()
            pairs = np.stack([batch.column(part).to_numpy() for part in _EXTENT[1:]])
            of = codes.indices.to_numpy()
            by_group = np.argsort(of, kind="stable")
            cuts = np.searchsorted(of[by_group], np.arange(len(codes.dictionary) + 1))
            for k, name in enumerate(codes.dictionary.to_pylist()):
                if name in names:
                    yield name, pairs[:, by_group[cuts[k] : cuts[k + 1]]]


def _distinct(parts: Sequence[np.ndarray]) -> np.ndarray:
    pairs = np.concatenate(parts, axis=1)
    pairs = pairs[:, np.lexsort((pairs[1], pairs[0]))]
    fresh = np.ones(pairs.shape[1], bool)
    fresh[1:] = (pairs[:, 1:] != pairs[:, :-1]).any(axis=0)
    return pairs[:, fresh]
