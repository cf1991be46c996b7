"""Columns of data frames, compared the same way whatever pandas makes of missing texts."""

from __future__ import annotations

import pandas as pd


def texts(column: pd.Series) -> list[str | None]:
    """Texts of a column, None for each that is missing: pandas 2 has None there, pandas 3 nan."""
    return [None if pd.isna(value) else value for value in column]
