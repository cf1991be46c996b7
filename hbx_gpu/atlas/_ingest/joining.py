"""Several files about the same cells: the rows they make together, and one table of their obs columns."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hbx_gpu._advice import option
from hbx_gpu.atlas._ingest.obs_edits import ObsEdits
from hbx_gpu.atlas._model import columns
from hbx_gpu.atlas._model.column_types import Column, convert, is_empty, join_types
from hbx_gpu.errors import InvalidDataError

if TYPE_CHECKING:
    import pandas as pd

_log = logging.getLogger(__name__)

Join = Literal["inner", "outer", "exact"]
"""Which cells are kept: those of every file, those of any file, or those of all files, which must agree."""
Role = Literal["cells", "table", "reads"]
"""What ids in a file say: these are cells; these cells have an image; reads bore these barcodes."""
_SHOWN = 5


@dataclass(frozen=True)
class CellIds:
    """Ids of one file.

    Attributes
    ----------
    name
        Name of the modality, used in error messages.
    source
        Path of the file, used in error messages.
    ids
        One per row of the file.
    role
        What they say; only ids of ``cells`` make rows where there are such.
    """

    name: str
    source: str
    ids: Sequence[str]
    role: Role = "cells"


@dataclass(frozen=True)
class Joined:
    """Rows of an obs table.

    Attributes
    ----------
    ids
        Ids of the rows.
    rows
        Per file, int64, (n_rows,): the row of the file that belongs to it, -1 where it has none.
    """

    ids: Sequence[str]
    rows: tuple[np.ndarray, ...]


def check_join(join: str) -> None:
    """Refuse a value that is not a :data:`Join`.

    Raises
    ------
    ValueError
        The value is not valid.
    """
    if join not in get_args(Join):
        raise ValueError(f"unknown join {join!r}; choose one of {list(get_args(Join))}")


def join_cells(files: Sequence[CellIds], join: Join) -> Joined:
    """Join files by cell id.

    Rows come in the order of the first file, then those that only later files have.

    Parameters
    ----------
    files
        At least one.
    join
        ``outer`` keeps a cell that any file has. Two kinds of files add none where others say what the cells
        are: in a table of images an unknown id is an error, barcodes of reads that are not cells are left
        out.

    Raises
    ------
    InvalidDataError
        Ids are missing or repeated within a file; no id is in all files; ids have no partner where they
        must.
    """
    import pandas as pd

    indices = [pd.Index(_checked(file), dtype=object) for file in files]
    leading = [i for i, file in enumerate(files) if file.role == "cells"]
    leading = leading or [i for i, file in enumerate(files) if file.role == "table"] or [0]
    if join == "exact":
        _check_equal(files, indices)
    if join == "outer":
        ids = indices[leading[0]]
        for i in leading[1:]:
            ids = ids.append(indices[i].difference(ids, sort=False))
        for i, file in enumerate(files):
            if i not in leading and file.role == "table":
                _check_known(file, indices[i], ids)
    else:
        ids = indices[leading[0]]
        for index in indices:
            ids = ids[index.get_indexer(ids) >= 0]
    if not len(ids):
        raise InvalidDataError(f"no cell id is in all files: {_examples(files)}; make the ids alike")
    rows = tuple(index.get_indexer(ids).astype(np.int64) for index in indices)
    matrices = [i for i, file in enumerate(files) if file.role == "cells"]
    if len(matrices) > 1 and not np.all([rows[i] >= 0 for i in matrices], axis=0).any():
        _log.warning("no cell is in all matrices, are their ids alike? %s", _examples(files))
    return Joined(ids.tolist(), rows)


def _checked(file: CellIds) -> list[str]:
    missing = [i for i, name in enumerate(file.ids) if not isinstance(name, str) or not name]
    if missing:
        raise InvalidDataError(
            f"{file.source}: {len(missing)} row(s) have no cell id, first: row {missing[0]}; files are "
            "joined by cell id, so every row needs one"
        )
    ids = list(file.ids)
    if len(set(ids)) < len(ids):
        seen: set[str] = set()
        twice = list(dict.fromkeys(name for name in ids if name in seen or seen.add(name)))  # type: ignore[func-returns-value]
        raise InvalidDataError(
            f"{file.source}: {len(twice)} cell id(s) occur more than once, for example {twice[:_SHOWN]}; "
            "files are joined by cell id, so each may occur once per file"
        )
    return ids


def _check_equal(files: Sequence[CellIds], indices: Sequence[pd.Index]) -> None:
    reads_only = all(file.role == "reads" for file in files)
    for i, file in enumerate(files):
        if file.role == "reads" and not reads_only:
            continue  # most barcodes of a sequencing run are not cells
        for j, other in enumerate(files):
            alone = indices[i].difference(indices[j], sort=False)
            if len(alone):
                raise InvalidDataError(
                    f"{len(alone)} cell id(s) of {file.name!r} ({file.source}) are not in {other.name!r} "
                    f"({other.source}), first {min(_SHOWN, len(alone))}: {alone[:_SHOWN].tolist()}; "
                    f"{option('join', 'outer')} keeps such cells without the other modality, "
                    f"{option('join', 'inner')} leaves them out"
                )


def _check_known(file: CellIds, index: pd.Index, ids: pd.Index) -> None:
    unknown = index.difference(ids, sort=False)
    if len(unknown):
        raise InvalidDataError(
            f"{file.source}: {len(unknown)} cell id(s) are in no other modality, first "
            f"{min(_SHOWN, len(unknown))}: {unknown[:_SHOWN].tolist()}; correct or remove them, or leave "
            f"them out with {option('join', 'inner')}"
        )


def _examples(files: Sequence[CellIds]) -> str:
    return "; ".join(f"{file.name!r} has {list(file.ids[:2])}" for file in files)


def join_obs(
    joined: Joined,
    frames: Sequence[tuple[str, str, pd.DataFrame, np.ndarray]],
    *,
    reserved: Collection[str],
    winner: str | None = None,
    known: Mapping[str, str] | None = None,
    edits: ObsEdits | None = None,
) -> pa.Table:
    """One table out of the obs columns of several files, a row per cell.

    Where several files have a column, a value that is missing in one is taken from another; values that
    differ are an error.

    Parameters
    ----------
    joined
        The rows.
    frames
        Per table its name, a name for messages, the table, and per row of `joined` its row (-1: none).
    reserved
        Names that mean something else.
    winner
        Table whose values count where others differ.
    known
        Name in a file -> name in the obs table, of the columns that it has.
    edits
        What the user changes about the columns.

    Raises
    ------
    InvalidDataError
        Names a column with differing values and the first such cell; see also `columns.to_arrow`.
    """
    found: dict[str, tuple[str, pa.Array]] = {}
    fields: dict[str, pa.Field] = {}
    edits, names = edits or ObsEdits(), dict(known or {})
    edits.check(
        [str(column) for _, _, frame, _ in frames for column in frame.columns], frames[0][1] if frames else ""
    )
    ordered = sorted(frames, key=lambda frame: frame[0] != winner)  # stable: the winner first
    for name, source, frame, rows in ordered:
        frame = edits.apply(frame, source)
        table = columns.to_arrow(frame, reserved=reserved, source=source, known=names, types=edits.types)
        names |= columns.names_in_files(table.schema)
        whole = len(rows) == len(frame) and np.array_equal(rows, np.arange(len(rows)))
        take = None if whole else pa.array(rows, mask=rows < 0)
        for column in table.schema.names:
            array = table.column(column).combine_chunks()
            array = array if take is None else array.take(take)
            if column in found:
                other, there = found[column]
                wins = winner is not None and other == winner
                array = _merge(column, (other, there), (name, array), joined.ids, wins=wins)
                name_of = other
            else:
                name_of = name
            found[column] = (name_of, array)
            fields[column] = table.schema.field(column).with_type(array.type)
    return pa.Table.from_arrays([array for _, array in found.values()], schema=pa.schema(fields.values()))


def _merge(
    column: str, first: tuple[str, pa.Array], second: tuple[str, pa.Array], ids: Sequence[str], *, wins: bool
) -> pa.Array:
    (a, left), (b, right) = first, second
    where = f"obs column {column!r} of {a!r} and {b!r}"
    if left.type != right.type:
        kind = join_types(
            Column(left.type, lambda: pa.chunked_array([left])),
            Column(right.type, lambda: pa.chunked_array([right])),
            where,
        )
        left, right = (
            pa.nulls(len(side), kind) if is_empty(side) else convert(side, kind, where)
            for side in (left, right)
        )
    if not wins:
        both = pc.and_(pc.is_valid(left), pc.is_valid(right)).to_numpy(zero_copy_only=False)
        at = np.flatnonzero(both)[_differ(left.filter(pa.array(both)), right.filter(pa.array(both)))]
        if at.size:
            i = int(at[0])
            raise InvalidDataError(
                f"obs column {column!r} differs between {a!r} and {b!r} for {at.size} cell(s), first "
                f"{ids[i]!r}: {left[i].as_py()!r} and {right[i].as_py()!r}; rename one of the columns, or "
                f"name the modality that counts with {option('obs_from')}"
            )
    return (
        pa.array(
            [x if x is not None else y for x, y in zip(left.to_pylist(), right.to_pylist(), strict=True)],
            left.type,
        )
        if pa.types.is_nested(left.type)
        else pc.coalesce(left, right)
    )


def _differ(left: pa.Array, right: pa.Array) -> np.ndarray:
    if pa.types.is_nested(left.type):
        pairs = zip(left.to_pylist(), right.to_pylist(), strict=True)
        return np.array([x != y for x, y in pairs], bool)
    result: np.ndarray = pc.not_equal(left, right).to_numpy(zero_copy_only=False).astype(bool)
    return result
