"""Removing a dataset from an atlas: its cells and features go, its arrays stay for earlier snapshots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hbx_gpu.atlas._catalog import tables
from hbx_gpu.atlas._catalog.catalog import Catalog
from hbx_gpu.atlas._catalog.journal import RemoveNote
from hbx_gpu.atlas._model.schema import make_uid
from hbx_gpu.errors import UnknownNameError


@dataclass(frozen=True)
class Removal:
    """What was removed.

    Attributes
    ----------
    dataset_uid
        Uid of the removed dataset.
    n_cells
        Number of rows removed from obs tables.
    n_features
        Number of removed features, those that no other dataset has.
    """

    dataset_uid: str
    n_cells: int
    n_features: int


def find_dataset(catalog: Catalog, name: str) -> str:
    """The uid of a dataset that the user names by its uid or by its file.

    Raises
    ------
    UnknownNameError
        No dataset or several match; the message lists the candidates.
    """
    rows = catalog.dataset_rows()
    uids = {row["dataset_uid"]: str(row.get("source_name") or "") for row in rows}
    if name in uids:
        return name
    found = [uid for uid, source in uids.items() if source == name]
    if len(found) == 1:
        result: str = found[0]
        return result
    known = ", ".join(f"{uid} ({source or 'no file name'})" for uid, source in uids.items()) or "none"
    what = (
        f"{len(found)} datasets come from {name!r}; name one by its uid" if found else f"no dataset {name!r}"
    )
    raise UnknownNameError(f"{what}. Datasets of the atlas at {catalog.root}: {known}")


def remove_dataset(catalog: Catalog, dataset_uid: str) -> Removal:
    """Remove the cells, groups and features of a dataset from the newest state; callers hold the write lock.

    Earlier snapshots keep their versions of the tables and the arrays.
    If it is interrupted, the next writer finishes it.
    """
    where = f"dataset_uid = {tables.quoted(dataset_uid)}"
    layouts = tuple((row["feature_space"], row["layout_uid"]) for row in catalog.dataset_rows(where))
    n_cells = sum(catalog.obs(name).count_rows(where) for name in catalog.names.obs_tables)
    note = RemoveNote(make_uid(), dataset_uid, layouts)
    catalog.journal.write(note)
    return Removal(dataset_uid, n_cells, finish(catalog, note))


def finish(catalog: Catalog, note: RemoveNote) -> int:
    """Carry out a removal that a note describes; safe to repeat. Returns the number of removed features."""
    where = f"dataset_uid = {tables.quoted(note.dataset_uid)}"
    for name in catalog.names.obs_tables:
        catalog.obs(name).delete(where)
    catalog.datasets().delete(where)
    n_features = 0
    for space, layout in note.layouts:
        n_features += _remove_features(catalog, space, layout)
        catalog.remove_layout(layout)
    catalog.journal.remove(note)
    return n_features


def recover(catalog: Catalog) -> None:
    """Finish the removals that were interrupted."""
    for note in catalog.journal.removals():
        finish(catalog, note)


def _remove_features(catalog: Catalog, space: str, layout: str) -> int:
    """Remove from the registry of a space the features that only this list names."""
    if not layout or space not in catalog.names.registries:
        return 0
    used = {row["layout_uid"] for row in catalog.dataset_rows(f"feature_space = {tables.quoted(space)}")}
    if layout in used:
        return 0
    gone = _features(catalog, [layout]) - _features(catalog, sorted(used))
    registry = catalog.registry(space)
    for chosen in tables.batches("uid", sorted(gone)):
        registry.delete(chosen)
    return len(gone)


def _features(catalog: Catalog, layouts: Sequence[str]) -> set[str]:
    found: set[str] = set()
    for chosen in tables.batches("layout_uid", layouts):
        rows = tables.read(catalog.layouts(), ["feature_uid"], chosen)
        found.update(rows.column("feature_uid").to_pylist())
    return found
