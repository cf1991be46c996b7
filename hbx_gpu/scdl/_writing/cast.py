"""The values of an archive in another dtype; everything else of it stays."""

from __future__ import annotations

import os

from hbx_gpu.scdl._format.archive import Archive
from hbx_gpu.scdl._format.values import Tolerance, check_dtype
from hbx_gpu.scdl._writing.concat import concat_archives


def cast_archive(
    archive: str | os.PathLike[str] | Archive, dtype: str, *, tolerance: Tolerance | None = None
) -> None:
    """Store the values of an archive in another dtype.

    The archive is written anew beside itself and replaced in one step, so that an error or a kill leaves it
    as it was. Whoever has it open keeps the old values until it is opened again.

    Parameters
    ----------
    archive
        The archive, by path or opened.
    dtype
        One of the seven dtypes, or ``auto`` for the smallest that holds all values exactly.
    tolerance
        What happens to values that the dtype does not hold.

    Raises
    ------
    ValueError
        No such dtype.
    InvalidDataError
        A value would change by more than the tolerance.
    """
    if dtype is None:
        raise ValueError("Invalid data_dtype None. Name a dtype")
    path = archive.path if isinstance(archive, Archive) else archive
    concat_archives([archive], path, data_dtype=check_dtype(dtype), tolerance=tolerance, overwrite=True)
