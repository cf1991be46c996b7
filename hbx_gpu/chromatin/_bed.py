"""Lists of intervals: from BED files, frames and triples to three checked arrays."""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hbx_gpu._untrusted import check_file
from hbx_gpu.errors import InvalidDataError

_COLUMNS = ("chrom", "start", "end")


def region_table(table: object) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Chromosome names (object), starts and ends (int64) of a list of intervals, in its order.

    Parameters
    ----------
    table
        As for :class:`hbx_gpu.chromatin._regions.Peaks`.

    Raises
    ------
    InvalidDataError
        See :class:`hbx_gpu.chromatin._regions.Peaks`.
    """
    if isinstance(table, str | os.PathLike):
        source = f"{os.fspath(table)}: "
        chrom, start, end = _bed(Path(table))
    else:
        source = ""
        chrom, start, end = _columns(table)
    _check(chrom, start, end, source)
    return chrom, start, end


def _bed(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    chroms, starts, ends = [], [], []
    for number, line in _lines(path):
        fields = line.split()
        if not fields or line.startswith("#") or fields[0] in ("track", "browser"):
            continue
        try:
            starts.append(int(fields[1]))
            ends.append(int(fields[2]))
        except (IndexError, ValueError):
            raise InvalidDataError(
                f"{path}, line {number}: expected a chromosome, a start and an end, got {line.strip()!r}"
            ) from None
        chroms.append(fields[0])
    return _objects(chroms), np.array(starts, np.int64), np.array(ends, np.int64)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    check_file(path, "a BED file")
    with gzip.open(path, "rt") if path.suffix in (".gz", ".bgz") else open(path) as file:
        yield from enumerate(file, 1)


def _columns(table: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if hasattr(table, "to_pandas"):  # Arrow, polars
        table = table.to_pandas()
    if not hasattr(table, "columns") and not isinstance(table, Mapping):  # no frame of pandas, polars, ...
        rows = list(table)
        if any(isinstance(row, str) or len(row) != 3 for row in rows):
            raise InvalidDataError("peaks must be (chrom, start, end) triples, a table or a BED file")
        columns = zip(*rows, strict=True) if rows else ((), (), ())
        table = dict(zip(_COLUMNS, map(list, columns), strict=True))
    have = list(table.keys() if isinstance(table, Mapping) else table.columns)
    if missing := [name for name in _COLUMNS if name not in have]:
        raise InvalidDataError(
            f"a table of peaks needs {list(_COLUMNS)}; {missing} missing among its columns {have}"
        )
    chrom = _objects([str(name) for name in table["chrom"]])
    return chrom, _whole(table["start"], "start"), _whole(table["end"], "end")


def _whole(values: object, name: str) -> np.ndarray:
    array = np.asarray(values)
    if not len(array):
        return np.empty(0, np.int64)
    try:
        whole = array.astype(np.int64)
        same = bool((whole == array).all())
    except (TypeError, ValueError, OverflowError):
        same = False
    if array.dtype.kind not in "iuf" or not same:
        raise InvalidDataError(f"column {name!r} of the peaks must hold whole numbers, it is {array.dtype}")
    return whole


def _objects(names: list[str]) -> np.ndarray:
    out = np.empty(len(names), dtype=object)
    out[:] = names
    return out


def _check(chrom: np.ndarray, start: np.ndarray, end: np.ndarray, source: str) -> None:
    bad = np.flatnonzero((start < 0) | (end <= start))
    if len(bad):
        i = int(bad[0])
        raise InvalidDataError(
            f"{source}peak {i} is {chrom[i]}:{start[i]}-{end[i]}; a peak needs 0 <= start < end "
            "(0-based, the end not included)"
        )
    seen: set[tuple[str, int, int]] = set()
    for key in zip(chrom.tolist(), start.tolist(), end.tolist(), strict=True):
        if key in seen:
            raise InvalidDataError(
                f"{source}peak {key[0]}:{key[1]}-{key[2]} is listed more than once; columns need names of "
                "their own"
            )
        seen.add(key)
