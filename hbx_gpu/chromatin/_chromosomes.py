"""Names and sizes of the chromosomes of a fragment dataset, from its registry or a file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hbx_gpu._untrusted import check_file
from hbx_gpu.errors import InvalidDataError

if TYPE_CHECKING:
    import pandas as pd

NAME_COLUMNS = ("sequence_name", "chromosome", "chrom", "name")
"""Registry columns that may hold chromosome names, the best first."""

SIZE_COLUMNS = ("sequence_length", "chromosome_size", "chrom_size", "length", "size")
"""Registry columns that may hold chromosome sizes in bases, the best first."""


def registered(
    frame: pd.DataFrame, uids: Sequence[str | None] | np.ndarray
) -> tuple[np.ndarray, dict[str, int]]:
    """Names and sizes of the chromosomes of a dataset, as its registry has them.

    Parameters
    ----------
    frame
        The registry: any columns, indexed by uid.
    uids
        The dataset's ``feature_uids``. None stands for a chromosome that was deleted.

    Returns
    -------
    names
        object, (len(uids),). From the first of `NAME_COLUMNS` there is, else the uid; None where the uid is.
    sizes
        Name -> bases, from the first of `SIZE_COLUMNS` there is; empty where there is none.

    Raises
    ------
    InvalidDataError
        Two of the chromosomes have one name.
    """
    uids = list(uids)
    rows = frame.reindex([uid for uid in uids if uid is not None])
    label = next((name for name in NAME_COLUMNS if name in rows), None)
    found = rows.index if label is None else rows[label].where(rows[label].notna(), rows.index.to_series())
    by_uid = dict(zip(rows.index, found, strict=True))
    names = np.array([None if uid is None else str(by_uid[uid]) for uid in uids], dtype=object)
    check_unique(names, uids)
    size = next((name for name in SIZE_COLUMNS if name in rows), None)
    if size is None:
        return names, {}
    lengths = dict(zip(rows.index, rows[size], strict=True))
    known = [(name, lengths[uid]) for name, uid in zip(names, uids, strict=True) if uid is not None]
    return names, {name: int(length) for name, length in known if length == length and length is not None}


def check_unique(names: Sequence[str | None] | np.ndarray, uids: Sequence[object] | None = None) -> None:
    """Every chromosome needs a name of its own, or regions could not say which they mean.

    Raises
    ------
    InvalidDataError
        Two have the same.
    """
    first: dict[str, int] = {}
    for i, name in enumerate(names):
        if name is None:
            continue
        if name in first:
            which = f" (uids {uids[first[name]]!r} and {uids[i]!r})" if uids is not None else ""
            raise InvalidDataError(
                f"two chromosomes are called {name!r}{which}; choose those of one assembly with "
                '.features([...], "chromatin_accessibility"), or pass names that differ as chromosome_names'
            )
        first[name] = i


def read_sizes(sizes: Mapping[str, int] | str | os.PathLike[str]) -> dict[str, int]:
    """Chromosome sizes from a mapping or a file, in its order.

    Parameters
    ----------
    sizes
        Name -> bases; or the path of a table whose first two columns are these, separated by blanks or tabs,
        such as UCSC's ``.chrom.sizes`` or the ``.fai`` index of a FASTA file.

    Raises
    ------
    InvalidDataError
        A size is not a positive whole number, or a chromosome occurs twice.
    """
    if isinstance(sizes, Mapping):
        return {str(name): _size(name, value, "chromosome_sizes") for name, value in sizes.items()}
    path = Path(sizes)
    check_file(path, "a table of chromosome sizes")
    found: dict[str, int] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        fields = line.split()
        if not fields or line.startswith("#"):
            continue
        where = f"{path}, line {number}"
        if len(fields) < 2:
            raise InvalidDataError(f"{where}: expected a chromosome and its size, got {line!r}")
        if fields[0] in found:
            raise InvalidDataError(f"{where}: chromosome {fields[0]!r} occurs twice")
        found[fields[0]] = _size(fields[0], fields[1], where)
    return found


def _size(name: object, value: object, where: str) -> int:
    size = 0
    if isinstance(value, str | int | float | np.integer | np.floating):
        with contextlib.suppress(ValueError, OverflowError):
            size = int(value)
    if size <= 0 or (not isinstance(value, str) and size != value):
        raise InvalidDataError(
            f"{where}: the size of chromosome {name!r} must be a positive number of bases, got {value!r}"
        )
    return size
