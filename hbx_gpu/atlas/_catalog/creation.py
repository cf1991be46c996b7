"""Creation of an atlas: an interrupted one is recognized as unfinished and made anew."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from hbx_gpu._advice import spelled
from hbx_gpu._files import write_durably
from hbx_gpu._untrusted import own_folder
from hbx_gpu.atlas._catalog import tables
from hbx_gpu.atlas._catalog.catalog import Catalog
from hbx_gpu.atlas._catalog.journal import FOLDER
from hbx_gpu.atlas._catalog.lock import WriteLock
from hbx_gpu.atlas._catalog.names import Names
from hbx_gpu.atlas._catalog.paths import check_database
from hbx_gpu.errors import AtlasError

# This file exists from before the first table is made until the names of all tables are written.
_MARK = "making"


def is_unfinished(root: Path) -> bool:
    """Whether the creation of an atlas has begun and not ended: its writer is at work, or was killed."""
    return (root / FOLDER / _MARK).exists() and not Names.exist(root)


@contextlib.contextmanager
def making(root: Path) -> Iterator[None]:
    """Mark an atlas as unfinished while its tables are made; first remove remains of an interrupted creation.

    Callers hold the write lock.
    """
    check_database(root)  # tables are made in it and removed from it
    if is_unfinished(root):
        # Nobody could add anything to an unfinished atlas, so removing it loses nothing.
        shutil.rmtree(root / "lance_db", ignore_errors=True)
    mark = root / FOLDER / _MARK
    own_folder(mark.parent)
    write_durably(mark, "")  # never through a link
    yield
    mark.unlink()


def discard_empty(catalog: Catalog) -> None:
    """Remove an atlas to which nothing was added, and its folder if that holds nothing else.

    Callers hold the write lock.
    """
    root = catalog.root
    stored = (catalog.obs(name) for name in catalog.names.obs_tables)
    if catalog.dataset_rows() or any(table.count_rows() for table in stored):
        return
    if tables.read(catalog.versions(), ["version"]).num_rows:
        return
    for folder in (root / "lance_db", root / "zarr_store"):
        shutil.rmtree(folder, ignore_errors=True)
    Names.forget(root)
    shutil.rmtree(root / FOLDER, ignore_errors=True)
    with contextlib.suppress(OSError):  # the folder holds other files
        root.rmdir()


def finished_names(root: Path, version_table: str, *, allow_links: bool) -> Names | None:
    """Names of an atlas whose creation has ended; None where nothing says them.

    Raises
    ------
    AtlasLockedError
        Somebody is making the atlas.
    AtlasError
        Its creation was interrupted.
    """
    if is_unfinished(root):
        with WriteLock(root).hold():
            pass  # or raise an error that says who is making it
        if is_unfinished(root):
            raise AtlasError(
                f"the making of the atlas at {root} was interrupted, and nothing is in it; "
                f"{spelled('create_or_open_atlas', 'hbx-gpu ingest')} makes it anew"
            )
    return Names.load(root, version_table=version_table, allow_links=allow_links)
