"""A stored row as a cell: zeros dropped, repeated genes summed, columns ascending, totals exact."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hbx_gpu.errors import InvalidDataError
from hbx_gpu.tokens._program import Tables

MAX_TOTAL = 2**53
"""Totals up to here are exact in float64."""


@dataclass(frozen=True, slots=True)
class Row:
    """One cell's known genes.

    Attributes
    ----------
    columns
        int64, (n,), ascending.
    counts
        float64, (n,), whole numbers above 0 (0 too, where a recipe takes all genes).
    total, known
        Sum over all genes of the cell, and over the known ones.
    """

    columns: np.ndarray
    counts: np.ndarray
    total: int
    known: int


def not_counts(where: str) -> InvalidDataError:
    """The error for values that are not counts."""
    return InvalidDataError(
        f"{where}: tokens are made of counts, but some values are negative, fractions or not finite. Choose "
        "the "
        "layer that holds counts: logarithms and normalized values cannot be turned back"
    )


def not_logarithms(where: str) -> InvalidDataError:
    """The error for values that are not logarithms of counts."""
    return InvalidDataError(
        f"{where}: values='log1p' is for logarithms of counts, but some values are negative or not finite"
    )


def too_many(where: str) -> InvalidDataError:
    """The error for a total that is no longer exact."""
    return InvalidDataError(
        f"{where}: the counts of a cell sum to more than 2**53, beyond which sums are not exact; are they "
        "counts?"
    )


def known_genes(
    columns: np.ndarray,
    values: np.ndarray,
    tables: Tables,
    *,
    zeros: bool = False,
    logged: bool = False,
    where: str = "the layer",
) -> Row:
    """A stored row as its cell's known genes.

    Parameters
    ----------
    columns, values
        (n,), as stored: in any order, with zeros and repeats.
    zeros
        Whether genes that are not expressed are listed too.
    logged
        Whether values are logarithms instead of counts; totals are then 0.
    where
        What holds the row, for messages.

    Raises
    ------
    InvalidDataError
        A value that is not a count; a total above 2**53.
    """
    wide = values.astype(np.float64)
    if logged:
        if not (np.isfinite(wide) & (wide >= 0)).all():
            raise not_logarithms(where)
    elif not (np.isfinite(wide) & (wide >= 0) & (np.floor(wide) == wide)).all():
        raise not_counts(where)
    total = 0 if logged else sum(int(value) for value in wide)
    if total > MAX_TOTAL:
        raise too_many(where)
    sums: dict[int, float] = dict.fromkeys(tables.known.tolist(), 0.0) if zeros else {}
    for column, value in zip(columns.tolist(), wide.tolist(), strict=True):
        own = int(tables.column[column])
        if own >= 0 and value:
            sums[own] = sums.get(own, 0.0) + value
    found = sorted(sums)
    counts = np.array([sums[column] for column in found], np.float64)
    return Row(np.array(found, np.int64), counts, total, 0 if logged else int(counts.sum()))
