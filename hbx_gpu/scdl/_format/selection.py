"""What `obs_features()[...]` returns: pairs as SCDL's program has them, dicts as its documentation does."""

from __future__ import annotations

from typing import Any, Self, SupportsIndex

import numpy as np


class ObservedRow(tuple[Any, ...]):
    """``(values, label)`` of one cell; ``row["name"]`` gives one value."""

    names: list[str]

    def __new__(cls, values: list[object], label: object, names: list[str]) -> Self:
        row = super().__new__(cls, (values, label))
        row.names = names
        return row

    def __getitem__(self, key: SupportsIndex | slice | str) -> Any:
        if isinstance(key, str):
            return dict(zip(self.names, super().__getitem__(0), strict=True))[key]
        return super().__getitem__(key)

    def keys(self) -> list[str]:
        """Names of the columns."""
        return list(self.names)

    def __getnewargs__(self) -> tuple[object, ...]:
        return (*self, self.names)


class ObservedRows(tuple[Any, ...]):
    """``(list of dicts of column -> array, list of labels)`` of rows, one entry per block that they touch.

    Where they touch one block, ``rows["name"]`` gives one of its columns: rows of an archive of one file
    can be used as a dict.
    """

    __slots__ = ()

    def __new__(cls, parts: list[dict[str, np.ndarray]], labels: list[object]) -> Self:
        return super().__new__(cls, (parts, labels))

    def _only(self) -> dict[str, np.ndarray]:
        parts = super().__getitem__(0)
        if len(parts) != 1:
            raise KeyError(
                f"these rows touch {len(parts)} blocks with other columns each; use the list of dicts, [0]"
            )
        return dict(parts[0])

    def __getitem__(self, key: SupportsIndex | slice | str) -> Any:
        return self._only()[key] if isinstance(key, str) else super().__getitem__(key)

    def keys(self) -> list[str]:
        """Names of the columns."""
        return list(self._only())

    def __getnewargs__(self) -> tuple[object, ...]:
        return tuple(self)
