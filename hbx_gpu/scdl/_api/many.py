"""A folder of .h5ad files as one archive, each file converted where an executor runs it."""

from __future__ import annotations

import os
from concurrent.futures import Executor
from pathlib import Path

from hbx_gpu._progress import Progress
from hbx_gpu.errors import InvalidDataError
from hbx_gpu.scdl._api.collection import SingleCellCollection
from hbx_gpu.scdl._format.values import Tolerance, check_dtype
from hbx_gpu.scdl._writing.convert import ConvertOptions
from hbx_gpu.scdl._writing.new_folder import NewFolder


def convert_folder(
    folder: str | os.PathLike[str],
    target: str | os.PathLike[str],
    executor: Executor,
    *,
    options: ConvertOptions,
    data_dtype: str | None,
    tolerance: Tolerance,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> int:
    """Convert all .h5ad files below a folder on an executor, and join them in the order of their paths.

    Parameters
    ----------
    folder
        The folder, searched with all its subfolders; or one file.
    target
        The archive to make, on a disk that the workers see under the same path.
    executor
        Where files are converted. A task may run twice.
    options, data_dtype, tolerance, overwrite
        As :func:`hbx_gpu.scdl._writing.convert.convert_h5ad_files`, which gives the same archive.
    progress
        Called with the files done and their total.

    Returns
    -------
    int
        Number of cells.

    Raises
    ------
    RuntimeError
        A file could not be converted; the target is as it was.
    InvalidDataError
        No file has cells, or they share too few genes.
    """
    check_dtype(data_dtype)
    # Beside the archive, where there is room for it, and removed by the next run if this one is killed.
    place = NewFolder(Path(target))
    try:
        collection = SingleCellCollection(place.folder)
        collection.add_folder(folder, executor, options, data_dtype, tolerance, progress)
        if options.choose and not collection.number_of_rows():
            raise InvalidDataError(
                f"{folder}: there are no cells in its files, so there is nothing to convert"
            )
        collection.flatten(
            target,
            overwrite=overwrite,
            data_dtype="auto" if data_dtype == "auto" else None,
            require_shared_genes=options.require_shared_genes,
        )
        return collection.number_of_rows()
    finally:
        place.discard()
