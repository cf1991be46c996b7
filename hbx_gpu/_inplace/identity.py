"""Which column tells features apart, of the matrices of several stores that are opened together."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hbx_gpu._identity.choice import FeatureChoice, choose
from hbx_gpu._identity.overlap import compare
from hbx_gpu._identity.tables import INDEX, FeatureTable, without_versions
from hbx_gpu._inplace.join import names_of

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd


def identities(
    variables: Sequence[pd.DataFrame],
    wheres: Sequence[str],
    column: str | None = None,
    *,
    strip_versions: bool = False,
) -> list[np.ndarray]:
    """What identifies the features of each matrix.

    The names do, unless they are positions, or repeat, in one of several matrices: then the column is chosen
    as for files of an atlas, see :func:`hbx_gpu._identity.choice.choose`. A matrix that shares less than half
    of the smaller set with those before it is named in a warning.

    Parameters
    ----------
    variables
        var of each matrix.
    wheres
        What each matrix is called in messages.
    column
        Column that the user names; None to choose.
    strip_versions
        Whether versions of Ensembl ids are dropped.

    Returns
    -------
    list of ndarray
        object, (n,), per matrix.

    Raises
    ------
    UnknownNameError
        The column does not exist.
    InvalidDataError
        The column has missing values.
    """
    kinds: dict[bytes, int] = {}
    kind_of = [kinds.setdefault(_digest(var), len(kinds)) for var in variables]
    firsts = [kind_of.index(kind) for kind in range(len(kinds))]
    tables = [FeatureTable.of_frame(variables[at], wheres[at]) for at in firsts]
    choices = [FeatureChoice(column or INDEX, strip_versions) for _ in tables]
    # Names of a single matrix may repeat, because nothing is joined by them.
    bad = any(t.names_positions(INDEX) or (len(tables) > 1 and not t.identifies(INDEX)) for t in tables)
    if column is None and bad:
        choices = choose(tables, strip_versions=strip_versions)
        for table, choice in zip(tables, choices, strict=True):
            if choice.column != INDEX:
                _warn(f"{table.where}: features are told apart by {choice} ({choice.reason})")
    known: set[str] = set()
    names = []
    for at, table, choice in zip(firsts, tables, choices, strict=True):
        own = names_of(variables[at], choice.column, wheres[at])
        own[:] = without_versions(own) if strip_versions else own
        if known and len(set(own)) == len(own) and table.identifies(choice.column):
            overlap = compare(table, choice, known)
            if overlap.is_small:
                _warn(str(overlap))
        known.update(own)
        names.append(own)
    return [names[kind] for kind in kind_of]


def _digest(var: pd.DataFrame) -> bytes:
    """Equal for features that are identified alike: by their names, or where these are positions, by all."""
    names = var.index.astype(str).tolist()
    state = hashlib.blake2b("\0".join(names).encode(), digest_size=16)
    if all(name.isdigit() for name in names):
        for column in var.columns:
            state.update("\0".join([str(column), *var[column].astype(str)]).encode())
    return state.digest()


def _warn(what: str) -> None:
    warnings.warn(what, UserWarning, stacklevel=2)
