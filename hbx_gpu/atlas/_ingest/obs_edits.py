"""What users change about obs columns on their way in: other types, other names, columns left out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hbx_gpu._advice import option
from hbx_gpu.atlas._model.column_types import NAMED_TYPES
from hbx_gpu.errors import InvalidDataError, UnknownNameError

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class ObsEdits:
    """Changes to the obs columns of one dataset, by their names in the file.

    Attributes
    ----------
    types
        Column (its new name, if it gets one) -> ``int``, ``float``, ``bool``, ``str`` or ``datetime``.
    drop
        Columns that are left out.
    rename
        Name in the file -> name that it is to have.

    Raises
    ------
    ValueError
        No such type.
    """

    types: Mapping[str, str] = field(default_factory=dict)
    drop: Sequence[str] = ()
    rename: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, kind in self.types.items():
            if kind not in NAMED_TYPES:
                raise ValueError(
                    f"{option('obs_types')} of column {name!r}: unknown type {kind!r}; choose one of "
                    f"{list(NAMED_TYPES)}"
                )

    def check(self, columns: Collection[str], source: str) -> None:
        """Refuse names that no table has.

        Raises
        ------
        UnknownNameError
            Lists the columns that there are.
        """
        renamed = {self.rename.get(name, name) for name in columns}
        for name, given, there in (
            ("drop_obs", self.drop, set(columns)),
            ("rename_obs", self.rename, set(columns)),
            ("obs_types", self.types, renamed),
        ):
            if unknown := sorted(set(given) - there):
                raise UnknownNameError(
                    f"{source}: {option(name)} names {unknown}; the obs columns are {sorted(there)}"
                )

    def limited_to(self, columns: Collection[str]) -> ObsEdits:
        """The changes that concern columns which a file has."""
        renamed = {self.rename.get(name, name) for name in columns}
        return ObsEdits(
            {name: kind for name, kind in self.types.items() if name in renamed},
            [name for name in self.drop if name in columns],
            {old: new for old, new in self.rename.items() if old in columns},
        )

    def apply(self, frame: pd.DataFrame, source: str) -> pd.DataFrame:
        """The table with columns left out and renamed.

        Raises
        ------
        InvalidDataError
            A new name is in use.
        """
        if not self.drop and not self.rename:
            return frame
        kept = frame.drop(columns=[name for name in self.drop if name in frame.columns])
        kept = kept.rename(columns=dict(self.rename))
        names = [str(name) for name in kept.columns]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise InvalidDataError(
                f"{source}: {option('rename_obs')} gives the name {twice[0]!r} to a column, and another one "
                "has it; choose another name"
            )
        return kept
