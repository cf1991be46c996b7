"""The steps of a query of an obs table, as plain data."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Literal

FeatureJoin = Literal["union", "intersection"]


@dataclass(frozen=True, slots=True)
class QueryState:
    """All steps of an :class:`~hbx_gpu.atlas._query.query.AtlasQuery`.

    Attributes
    ----------
    where
        SQL condition, or None.
    columns
        Obs columns selected, or None for all.
    panels
        (feature space, uids) pairs.
    join
        How features of several groups are joined into one matrix.
    limit, offset
        Rows to take and to skip after filtering.
    balanced
        (number of rows, column), or None.
    layers
        (feature space, layer names) pairs, for AnnData.
    spaces, fields
        Feature spaces and pointer fields to which the query is restricted, or None.
    """

    where: str | None = None
    columns: tuple[str, ...] | None = None
    panels: tuple[tuple[str, tuple[str, ...]], ...] = ()
    join: FeatureJoin = "union"
    limit: int | None = None
    offset: int = 0
    balanced: tuple[int, str] | None = None
    layers: tuple[tuple[str, tuple[str, ...]], ...] = ()
    spaces: tuple[str, ...] | None = None
    fields: tuple[str, ...] | None = None


def whole_number(n: int, what: str) -> int:
    """Return `n` as an int; `what` is the step that takes it, for errors.

    Raises
    ------
    TypeError
        Not an integer.
    ValueError
        Below 0.
    """
    number = operator.index(n)
    if number < 0:
        raise ValueError(f"{what} must not be negative, got {number}")
    return number
