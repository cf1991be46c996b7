"""Removing a dataset from an atlas: its cells and features go, its arrays stay for earlier snapshots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hbx_gpu.atlas._catalogue import tables
from hbx_gpu.atlas._catalogue.catalogue import Catalogue
from hbx_gpu.atlas._catalogue.journal import RemoveNote
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


def find_dataset(catalogue: Catalogue, name: str) -> str:
    """The uid of a dataset that the user names by its uid or by its file.

    Raises
    ------
    UnknownNameError
        No dataset or several match; the message lists the candidates.
    """
    rows = catalogue.dataset_rows()
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
    raise UnknownNameError(f"{what}. Datasets of the atlas at {catalogue.root}: {known}")


def remove_dataset(catalogue: Catalogue, dataset_uid: str) -> Removal:
    """Remove the cells, groups and features of a dataset from the newest state; callers hold the write lock.

    Earlier snapshots keep their versions of the tables and the arrays.
    If it is interrupted, the next writer finishes it.
    """
    where = f"dataset_uid = {tables.quoted(dataset_uid)}"
    layouts = tuple((row["feature_space"], row["layout_uid"]) for row in catalogue.dataset_rows(where))
    n_cells = sum(catalogue.obs(name).count_rows(where) for name in catalogue.names.obs_tables)
    note = RemoveNote(make_uid(), dataset_uid, layouts)
    catalogue.journal.write(note)
    return Removal(dataset_uid, n_cells, finish(catalogue, note))


def finish(catalogue: Catalogue, note: RemoveNote) -> int:
    """Carry out a removal that a note describes; safe to repeat. Returns the number of removed features."""
    where = f"dataset_uid = {tables.quoted(note.dataset_uid)}"
    for name in catalogue.names.obs_tables:
        catalogue.obs(name).delete(where)
    catalogue.datasets().delete(where)
    n_features = 0
    for space, layout in note.layouts:
        n_features += _remove_features(catalogue, space, layout)
        catalogue.remove_layout(layout)
    catalogue.journal.remove(note)
    return n_features


def recover(catalogue: Catalogue) -> None:
    """Finish the removals that were interrupted."""
    for note in catalogue.journal.removals():
        finish(catalogue, note)


def _remove_features(catalogue: Catalogue, space: str, layout: str) -> int:
    """Remove from the registry of a space the features that only this list names."""
    if not layout or space not in catalogue.names.registries:
        return 0
    used = {row["layout_uid"] for row in catalogue.dataset_rows(f"feature_space = {tables.quoted(space)}")}
    if layout in used:
        return 0
    gone = _features(catalogue, [layout]) - _features(catalogue, sorted(used))
    registry = catalogue.registry(space)
    for chosen in tables.batches("uid", sorted(gone)):
        registry.delete(chosen)
    return len(gone)


def _features(catalogue: Catalogue, layouts: Sequence[str]) -> set[str]:
    found: set[str] = set()
    for chosen in tables.batches("layout_uid", layouts):
        rows = tables.read(catalogue.layouts(), ["feature_uid"], chosen)
        found.update(rows.column("feature_uid").to_pylist())
    return found
