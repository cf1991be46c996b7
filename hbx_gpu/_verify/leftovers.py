"""What writers left that died: found, and finished or removed."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from hbx_gpu._remote.commits import clean as clean_place
from hbx_gpu._remote.places import AnyPath, Place, parse


def clean(
    path: AnyPath, *, storage_options: Mapping[str, object] | None = None, allow_links: bool = False
) -> list[str]:
    """Finish or remove what interrupted writers left of an atlas or an archive.

    Parameters
    ----------
    path
        An atlas or an SCDL archive, on a local disk or in object storage.
    storage_options
        Credentials and settings of an address, under the names of obstore.
    allow_links
        Follow links that lead out of a local atlas.

    Returns
    -------
    list of str
        What was done, a sentence for each; empty if nothing was left.

    Raises
    ------
    AtlasLockedError
        Somebody is writing.
    AtlasError
        A note of unfinished work is not one of this release.
    """
    place = parse(path, storage_options)
    if isinstance(place, Place):
        return clean_place(place.parent if place.name == "lance_db" else place)
    if (place / "lance_db").is_dir() or place.name == "lance_db":
        return _clean_atlas(place.parent if place.name == "lance_db" else place, allow_links=allow_links)
    return _clean_archive(place)


def _clean_atlas(root: Path, *, allow_links: bool) -> list[str]:
    from hbx_gpu.atlas import RaggedAtlas
    from hbx_gpu.atlas._catalog.journal import FOLDER
    from hbx_gpu.atlas._catalog.paths import STAGING

    notes = sorted((root / FOLDER).glob("*-*.json"))
    staged = root / "zarr_store" / STAGING
    folders = [] if staged.is_symlink() or not staged.is_dir() else sorted(staged.iterdir())
    atlas = RaggedAtlas.open(root, allow_links=allow_links)
    with atlas.session.writing():  # which begins with the work of writers that died
        for folder in folders:
            if folder.is_dir() and not folder.is_symlink():
                shutil.rmtree(folder, ignore_errors=True)
    said = [f"{note}: finished or undid the work of a writer that had died" for note in notes]
    gone = [folder for folder in folders if not folder.exists()]
    return said + [f"{folder}: removed unfinished files" for folder in gone]


def _clean_archive(target: Path) -> list[str]:
    from hbx_gpu.scdl._writing.new_folder import leftovers, recover

    places = leftovers(target)
    if not places:
        return []
    restored = recover(target)
    said = [f"{place}: removed unfinished files" for place in places if not place.exists()]
    return said + ([f"{target}: put back, because its replacement had not finished"] if restored else [])
