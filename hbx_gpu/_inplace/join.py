"""Features of several matrices on one axis: which column of each matrix is which column of the dataset."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from hbx_gpu._advice import option
from hbx_gpu._identity.tables import INDEX, UNIQUE_NAMES, numbered
from hbx_gpu.errors import InvalidDataError, UnknownNameError

if TYPE_CHECKING:
    import pandas as pd

Join = Literal["outer", "inner"]


@dataclass(frozen=True, slots=True)
class Axis:
    """Columns of a dataset and where those of each matrix go.

    Attributes
    ----------
    uids
        object, (n_features,). Name of each column.
    remaps
        int32, (n_columns,) per matrix. Column of the dataset for each stored column, -1 where it is left
        out. Matrices with the same names share the array.
    """

    uids: np.ndarray
    remaps: list[np.ndarray]


def names_of(var: pd.DataFrame, column: str | None, where: str) -> np.ndarray:
    """What identifies the features of a matrix: object, (n,).

    Parameters
    ----------
    var
        Its features.
    column
        A column of var; None or ``"index"`` for their names, ``"unique_names"`` for these with repeats
        numbered.
    where
        What the matrix is called in messages.

    Raises
    ------
    UnknownNameError
        The column does not exist.
    InvalidDataError
        The column has missing values.
    """
    if column == UNIQUE_NAMES and column not in var.columns:
        unique = np.empty(len(var), object)
        unique[:] = numbered(var.index.astype(str).tolist())
        return unique
    if column is None or (column == INDEX and column not in var.columns):
        result: np.ndarray = var.index.to_numpy().astype(str).astype(object)
        return result
    if column not in var.columns:
        raise UnknownNameError(f"{where}: var has no column {column!r}; it has {list(map(str, var.columns))}")
    values = var[column]
    if values.isna().any():
        raise InvalidDataError(
            f"{where}: column {column!r} of var misses {int(values.isna().sum())} values, so it cannot "
            f"identify features; pass another {option('feature_id_column')}"
        )
    result = values.astype(str).to_numpy().astype(object)
    return result


def joined(
    names: Sequence[np.ndarray], wheres: Sequence[str], join: Join, panel: Sequence[str] | None = None
) -> Axis:
    """Join the features of matrices by name.

    Parameters
    ----------
    names
        object, (n_columns,) per matrix.
    wheres
        What each matrix is called in messages.
    join
        ``"outer"``: all features, in the order in which they are first seen. ``"inner"``: those that every
        matrix has, in the order of the first.
    panel
        Exactly these features, in this order, whatever `join` says.

    Raises
    ------
    InvalidDataError
        A name occurs twice in a matrix where several are joined or a panel is asked for; ``"inner"``, and
        no feature is in all of them.
    UnknownNameError
        No matrix has a feature of the panel.
    """
    if join not in ("outer", "inner"):
        raise ValueError(f"join must be 'outer' or 'inner', got {join!r}")
    distinct: dict[bytes, int] = {}
    which = [distinct.setdefault("\0".join(each).encode(), len(distinct)) for each in names]
    firsts = [which.index(k) for k in range(len(distinct))]
    if len(firsts) == 1 and panel is None:
        only = names[firsts[0]]
        remap = np.arange(len(only), dtype=np.int32)
        return Axis(only, [remap] * len(names))
    for k in firsts:
        _refuse_repeats(names[k], wheres[k])
    if panel is not None:
        order = list(map(str, panel))
        known = set().union(*(names[k].tolist() for k in firsts))
        if missing := [name for name in order if name not in known]:
            raise UnknownNameError(
                f"{len(missing)} of {len(order)} features are in none of the stores, first {missing[:3]}; "
                f"the stores name features like {names[0][:3].tolist()}"
            )
    elif join == "outer":
        order = list(dict.fromkeys(name for k in firsts for name in names[k].tolist()))
    else:
        common = set.intersection(*(set(names[k].tolist()) for k in firsts))
        order = [name for name in names[firsts[0]].tolist() if name in common]
        if not order and any(len(each) for each in names):
            raise InvalidDataError(
                "join='inner', and no feature is in all stores; they name features like "
                + " and ".join(str(names[k][:3].tolist()) for k in firsts[:3])
                + f". Pass {option('feature_id_column')} if another column of var identifies them"
            )
    place = {name: column for column, name in enumerate(order)}
    remaps = [np.array([place.get(name, -1) for name in names[k].tolist()], np.int32) for k in firsts]
    uids = np.empty(len(order), object)
    uids[:] = order
    return Axis(uids, [remaps[k] for k in which])


def _refuse_repeats(names: np.ndarray, where: str) -> None:
    repeated = [name for name, n in Counter(names.tolist()).items() if n > 1]
    if repeated:
        raise InvalidDataError(
            f"{where}: {len(repeated)} features occur more than once, first {repeated[:3]}, so they cannot "
            f"be joined by name; pass {option('feature_id_column')} with a column of var that identifies "
            f"them, or {UNIQUE_NAMES!r} to number repeated names (a, a-1, ...) in the order of each store"
        )
