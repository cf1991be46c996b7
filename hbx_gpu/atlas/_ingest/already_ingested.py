"""Whether data are in an atlas already: made of the same file, in the same form or in another one."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from hbx_gpu._advice import option
from hbx_gpu.atlas._catalog import tables
from hbx_gpu.atlas._catalog.catalog import Catalog
from hbx_gpu.atlas._ingest.cells import Dataset
from hbx_gpu.atlas._ingest.parts import Part
from hbx_gpu.atlas._ingest.settings import Settings
from hbx_gpu.atlas._model.schema import DatasetSchema
from hbx_gpu.atlas._model.spaces import FeatureSpace
from hbx_gpu.atlas._writing.recoding import codec_of
from hbx_gpu.errors import AlreadyIngestedError

_log = logging.getLogger(__name__)
R = TypeVar("R", bound=Mapping[str, Any])


def ingested_before(catalog: Catalog, dataset: Dataset, settings: Settings) -> bool:
    """Whether there is nothing left to do; raises where the same data are there in another form."""
    rows = [_stored_row(catalog, part, settings.record) for part in dataset.parts]
    stored = {part.name: row for part, row in zip(dataset.parts, rows, strict=True) if row is not None}
    if not stored:
        return False
    changed = []
    for part in dataset.parts:
        row = stored.get(part.name)
        prefix = f"{part.name}: " if len(dataset.parts) > 1 else ""
        if row is None:
            changed.append(f"{prefix}it was added without this one")
            continue
        found = differences(catalog, row, part.identity, part.space, settings)
        changed += [f"{prefix}{text}" for text in found]
    first = next(iter(stored.values()))
    uid = first["dataset_uid"]
    if any(row["dataset_uid"] != uid for row in stored.values()):
        changed.append("its modalities were added as several datasets")
    if not catalog.obs(settings.obs_table).count_rows(f"dataset_uid = {tables.quoted(uid)}"):
        changed.append(f"its cells are in another obs table than {settings.obs_table!r}")
    return skip(dataset.source, first, changed, settings, several=len(dataset.parts) > 1)


def differences(
    catalog: Catalog,
    row: Mapping[str, Any],
    identity: Mapping[str, str],
    space: FeatureSpace,
    settings: Settings,
) -> list[str]:
    """How a stored group differs from the one that the same data would make now.

    Parameters
    ----------
    catalog
        The atlas.
    row
        The stored group.
    identity, space
        Of the new one, see :class:`Part`.
    settings
        How it would be added.
    """
    asked = {**identity, **settings.choices}
    changed = [
        f"{key} was {row.get(key)!r}, is {value!r}"
        for key, value in asked.items()
        if (row.get(key) or "") != value
    ]
    path = catalog.group_path(row["zarr_group"])
    if settings.codec_asked and space.index_array is not None and path.exists():
        # As it is stored now, which repack() may have changed; the row says how it was ingested.
        codec = codec_of(path, space, within=None if catalog.allow_links else catalog.store)
        if codec != settings.storage.codec:
            changed.append(f"codec was {codec!r}, is {settings.storage.codec!r} (hbx-gpu repack changes it)")
    return changed


def skip(
    source: str, row: Mapping[str, Any], changed: Sequence[str], settings: Settings, *, several: bool = False
) -> bool:
    """Whether data that are in the atlas are left out, which is said; False where they are replaced.

    Parameters
    ----------
    source
        The new data, for messages.
    row
        The group that is there.
    changed
        What would be otherwise.
    settings
        How the data would be added.
    several
        Whether they have several modalities.

    Raises
    ------
    AlreadyIngestedError
        They are there in another form, or the user did not say that they may be there.
    """
    another = "" if several else ", or a dataset_record with another zarr_group"
    there = f"dataset {row['dataset_uid']!r} (group {row['zarr_group']!r}, from {row.get('source_name')!r})"
    if changed and settings.replace:
        return False
    if changed:
        raise AlreadyIngestedError(
            f"{source}: {there} is in the atlas already, ingested differently: {'; '.join(changed)}. "
            f"Adding it again would store its cells twice; put it in the place of the other with "
            f"{option('replace', 'True')}, or use a new atlas{another}"
        )
    if not settings.exist_ok:
        raise AlreadyIngestedError(f"{source} is in the atlas already as {there}; nothing was added")
    _log.info("%s is in the atlas already as %s; skipped", source, there)
    return True


def _stored_row(catalog: Catalog, part: Part, record: DatasetSchema | None) -> dict[str, Any] | None:
    """The dataset's row of a group made of the same data, best of one made in the same way."""
    if record is not None:
        where = f"zarr_group = {tables.quoted(record.zarr_group)}"
    elif "source_sha256" in catalog.datasets().schema.names:
        space, sha256 = tables.quoted(part.space.name), tables.quoted(part.identity["source_sha256"])
        where = f"source_sha256 = {sha256} AND feature_space = {space}"
    else:
        return None
    return best_row(catalog.dataset_rows(where), part.identity)


def best_row(rows: Sequence[R], identity: Mapping[str, str]) -> R | None:
    """Of some groups the first that was made in the same way, else the first; None where there is none."""
    same = [row for row in rows if all(row.get(key) == value for key, value in identity.items())]
    return next(iter([*same, *rows]), None)


def replaced_datasets(catalog: Catalog, dataset: Dataset, settings: Settings) -> tuple[str, ...]:
    """Datasets in whose place a new one comes: made of the same file, or of one of the same name."""
    if not settings.replace:
        return ()
    found: dict[str, None] = {}
    for part in dataset.parts:
        rows = catalog.dataset_rows(f"feature_space = {tables.quoted(part.space.name)}")
        found |= dict.fromkeys(replaced_by(rows, part.identity["source_sha256"], part.source_name))
    return tuple(found)


def replaced_by(rows: Iterable[Mapping[str, Any]], sha256: str, source_name: str) -> list[str]:
    """Datasets among some groups that were made of a file, or of one of its name."""
    named = source_name != "AnnData object"
    return [
        row["dataset_uid"]
        for row in rows
        if row.get("source_sha256") == sha256 or (named and row.get("source_name") == source_name)
    ]
