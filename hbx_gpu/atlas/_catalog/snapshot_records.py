"""Location and snapshots of an atlas, for every generation of the format."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hbx_gpu._remote.lookup import is_dir
from hbx_gpu._remote.places import AnyPath, Place, parse
from hbx_gpu._untrusted import parse_json
from hbx_gpu.atlas._catalog.paths import LAYOUT_TABLE, check_store, plain_name
from hbx_gpu.atlas._catalog.table_errors import open_guarded
from hbx_gpu.errors import AtlasError, CorruptDataError, UnsafePathError, UnsupportedError

if TYPE_CHECKING:
    import pandas as pd

VERSION_TABLE = "atlas_versions"


@dataclass(frozen=True, slots=True)
class SnapshotRecord:
    """One row of the version table, translated to the newest generation of the format.

    Attributes
    ----------
    version
        Number of the snapshot.
    obs_tables
        Obs table -> Lance version.
    dataset_table
        Name and Lance version of the table of groups.
    registries
        Feature space -> (name, Lance version) of its registry.
    layouts_version
        Lance version of ``_feature_layouts``.
    total_rows
        Number of rows in all obs tables.
    created_at
        Time of the snapshot, in ISO format.
    zarr_store_uri
        Where the writer kept the zarr store. Only the oldest generation records it, and the store may have
        moved.
    """

    version: int
    obs_tables: Mapping[str, int]
    dataset_table: tuple[str, int]
    registries: Mapping[str, tuple[str, int]]
    layouts_version: int
    total_rows: int
    created_at: str
    zarr_store_uri: str = ""

    @property
    def pinned(self) -> dict[str, set[int]]:
        """Every table that the snapshot needs -> its Lance versions, which must never be cleaned up."""
        out: dict[str, set[int]] = {}
        for name, version in (
            *self.obs_tables.items(),
            self.dataset_table,
            *self.registries.values(),
            (LAYOUT_TABLE, self.layouts_version),
        ):
            out.setdefault(name, set()).add(version)
        return out


def atlas_root(path: str | os.PathLike[str], storage_options: Mapping[str, str] | None = None) -> AnyPath:
    """Directory or address of the atlas; `path` is that or its ``lance_db``.

    Raises
    ------
    RemotePathError
        `path` is an address of an unknown scheme.
    UnsupportedError
        `path` is on a plain HTTP server, where LanceDB cannot open tables.
    FileNotFoundError
        There is no atlas at `path`.
    """
    root = parse(path, storage_options)
    if root.name == "lance_db":
        root = root.parent
    if isinstance(root, Place) and not root.lists:
        raise UnsupportedError(
            f"{root} is on a plain HTTP server, which cannot list the files of an atlas's tables: open the "
            "atlas by s3://, gs:// or az://, or copy it to a local disk; .h5ad files and SCDL archives can "
            "be opened by https://"
        )
    if not is_dir(root / "lance_db"):
        raise FileNotFoundError(f"No atlas found at {root}: there is no directory {root / 'lance_db'}")
    return root


def read_records(
    path: str | os.PathLike[str],
    *,
    version_table_name: str = VERSION_TABLE,
    storage_options: Mapping[str, str] | None = None,
) -> list[SnapshotRecord]:
    """All snapshots of an atlas, by ascending version.

    Raises
    ------
    FileNotFoundError
        No atlas at `path`.
    AtlasError
        The columns of the version table belong to no known generation.
    """
    root = atlas_root(path, storage_options)
    # Ask the file system first, because a missing table is not damage.
    if not is_dir(root / "lance_db" / f"{version_table_name}.lance"):
        return []
    rows = open_guarded(root, version_table_name).to_arrow().to_pylist()
    return sorted((_parse(row, version_table_name) for row in rows), key=lambda record: record.version)


def _parse(row: dict[str, object], table: str) -> SnapshotRecord:
    where = f"table {table!r}"
    try:
        if "obs_table_versions" in row:
            obs_tables = _mapping(row["obs_table_versions"], where)
            total_rows = row["total_rows"]
        else:
            obs_tables = {str(row["cell_table_name"]): row["cell_table_version"]}
            total_rows = row["total_cells"]
        names = _mapping(row["registry_table_names"], where)
        versions = _mapping(row["registry_table_versions"], where)
        return SnapshotRecord(
            version=_number(row["version"]),
            obs_tables=dict(_pinned(name, version, where) for name, version in obs_tables.items()),
            dataset_table=_pinned(row["dataset_table_name"], row["dataset_table_version"], where),
            registries={space: _pinned(name, versions[space], where) for space, name in names.items()},
            layouts_version=_number(row["feature_layouts_table_version"]),
            total_rows=_number(total_rows),
            created_at=str(row["created_at"]),
            zarr_store_uri=str(row.get("zarr_store_uri") or ""),
        )
    except (KeyError, TypeError, CorruptDataError) as error:
        if isinstance(error, UnsafePathError):
            raise
        raise AtlasError(
            f"{where} is not a snapshot record of a known generation ({error!r}); its columns: {sorted(row)}"
        ) from error


def _mapping(text: object, where: str) -> dict[str, object]:
    found = parse_json(text.encode() if isinstance(text, str) else b"", where)
    if not isinstance(found, dict):
        raise TypeError(f"{str(found)[:100]} is not a mapping")
    return found


def _pinned(name: object, version: object, where: str) -> tuple[str, int]:
    return plain_name(name, f"the name of a table in {where}"), _number(version)


def _number(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 62:
        raise TypeError(f"{str(value)[:100]} is not the number of a version or of rows")
    return value


def list_versions(
    path: str | os.PathLike[str],
    *,
    version_table_name: str = VERSION_TABLE,
    storage_options: Mapping[str, str] | None = None,
) -> pd.DataFrame:
    """The snapshots of an atlas, one row each, sorted by version, with the same columns for all generations.

    Parameters
    ----------
    path
        Directory of the atlas, or its address in object storage.
    version_table_name
        Table that records the snapshots.
    storage_options
        Options of the object storage, as in :meth:`RaggedAtlas.checkout`.

    Returns
    -------
    pandas.DataFrame
        ``version`` and ``total_rows`` (int64), ``created_at`` (ISO time), ``obs_tables`` and
        ``feature_spaces`` (lists of names).

    Raises
    ------
    FileNotFoundError
        There is no atlas at `path`.
    RemoteError
        Object storage does not answer, or refuses.
    """
    import pandas as pd

    records = read_records(path, version_table_name=version_table_name, storage_options=storage_options)
    return pd.DataFrame(
        {
            "version": pd.Series([r.version for r in records], dtype="int64"),
            "created_at": pd.Series([r.created_at for r in records], dtype=object),
            "total_rows": pd.Series([r.total_rows for r in records], dtype="int64"),
            "obs_tables": pd.Series([sorted(r.obs_tables) for r in records], dtype=object),
            "feature_spaces": pd.Series([sorted(r.registries) for r in records], dtype=object),
        }
    )


def resolve_store(
    root: AnyPath, record: SnapshotRecord, store: object = None, *, allow_links: bool = False
) -> AnyPath:
    """Directory of the zarr store: the given one, else the sibling of ``lance_db``, else the recorded one.

    Parameters
    ----------
    root
        Directory of the atlas.
    record
        The snapshot.
    store
        A path, or a local store object of zarr (``.root``) or obstore (``.prefix``).
    allow_links
        Whether to follow links out of the atlas.

    Raises
    ------
    FileNotFoundError
        None of them exists.
    AtlasError
        The store is not local.
    UnsafePathError
        `store` is None, and the default store is a link that leads out of the atlas.
    """
    if store is not None:
        given = parse(store_path(store))
        if not is_dir(given):
            raise FileNotFoundError(f"zarr store {given} is not a directory")
        return given
    sibling = root / "zarr_store"
    if is_dir(sibling):
        return check_store(root, sibling, allow_links=allow_links)
    recorded = parse(record.zarr_store_uri) if record.zarr_store_uri else None
    if recorded is not None and isinstance(recorded, Place) == isinstance(root, Place) and is_dir(recorded):
        return recorded
    raise FileNotFoundError(
        f"no zarr store for the atlas at {root}: looked at {sibling}"
        + (f" and {recorded}" if recorded else "")
        + "; pass its path as store="
    )


def store_path(store: object) -> str | os.PathLike[str]:
    """Where a store lies: a path, or a local store object of zarr (``.root``) or obstore (``.prefix``).

    Raises
    ------
    AtlasError
        The store is not local.
    """
    if isinstance(store, str | os.PathLike):
        return store
    # zarr.storage.ObjectStore wraps an obstore store, zarr.storage.LocalStore has a root.
    inner = getattr(store, "store", store)
    for name in ("root", "prefix"):
        path = getattr(inner, name, None)
        if isinstance(path, str | os.PathLike):
            return path
    raise AtlasError(
        f"cannot tell where {store!r} lies: pass a path, a zarr LocalStore or an obstore LocalStore"
    )
