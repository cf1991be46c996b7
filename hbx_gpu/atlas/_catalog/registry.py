"""Registered features of one feature space at one snapshot: uid <-> global index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hbx_gpu.errors import AtlasError, UnknownNameError

if TYPE_CHECKING:
    import pandas as pd

# Arrays are as long as the largest index. Features that were removed leave gaps.
_SPARE_INDEX, _GAPS = 1 << 24, 64


@dataclass(frozen=True)
class Registry:
    """The features of a space, in ascending global index.

    Attributes
    ----------
    feature_space
        Name of the space.
    table
        All columns of the registry at the pinned version, sorted by ``global_index``.
    n_features
        Width of the space: number of rows, or largest index + 1 where rows were deleted.
    """

    feature_space: str
    table: pa.Table
    n_features: int

    @classmethod
    def from_table(cls, feature_space: str, table: pa.Table, *, name: str) -> Registry:
        """Check and sort the rows of a registry table.

        Parameters
        ----------
        feature_space
            The space it is read for.
        table
            Columns ``uid`` and ``global_index`` and any others.
        name
            Name of the table, used in error messages.

        Raises
        ------
        AtlasError
            A feature has no index, or an index or a uid occurs twice; an index is far beyond their number.
        """
        index = table.column("global_index")
        if index.null_count:
            raise AtlasError(
                f"registry {name!r} holds {index.null_count} feature(s) without a global_index; the writer "
                "must run optimize() and take a new snapshot"
            )
        table = table.sort_by("global_index")
        order = table.column("global_index").to_numpy()
        if len(order) and (order[0] < 0 or (np.diff(order) == 0).any()):
            raise AtlasError(f"registry {name!r} has negative or repeated values in global_index")
        most = _SPARE_INDEX + _GAPS * len(order)
        if len(order) and order[-1] >= most:
            raise AtlasError(
                f"registry {name!r} has a global_index of {order[-1]:,} for {len(order):,} features; indices "
                f"below {most:,} are expected. The atlas was damaged, copy it again from its origin"
            )
        if pc.count_distinct(table.column("uid")).as_py() != len(table):
            raise AtlasError(f"registry {name!r} lists some uid more than once")
        return cls(feature_space, table, int(order[-1]) + 1 if len(order) else 0)

    @property
    def uids(self) -> np.ndarray:
        """object, (n_features,). Uid of every global index; None where the feature was deleted."""
        uids = np.full(self.n_features, None, dtype=object)
        uids[self._global_index()] = self.table.column("uid").to_numpy(zero_copy_only=False)
        return uids

    @property
    def frame(self) -> pd.DataFrame:
        """Registry columns, ``uid`` as index, ascending ``global_index``."""
        return self.table.to_pandas().set_index("uid")

    def _global_index(self) -> np.ndarray:
        result: np.ndarray = self.table.column("global_index").to_numpy()
        return result

    def find(self, uids: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """int32, (len(uids),). Global index of every uid, -1 where it is not registered."""
        uid = self.table.column("uid")
        at = pc.fill_null(pc.index_in(uids.cast(uid.type), value_set=uid), -1).to_numpy()
        out = np.full(len(at), -1, dtype=np.int32)
        out[at >= 0] = self._global_index()[at[at >= 0]]
        return out

    def resolve(self, uids: Sequence[str]) -> np.ndarray:
        """int32, (len(uids),). Global index of every uid asked for.

        Raises
        ------
        UnknownNameError
            Some are not registered.
        """
        found = self.find(pa.array(list(uids), type=pa.string()))
        missing = [uid for uid, at in zip(uids, found, strict=True) if at < 0]
        if missing:
            some = self.table.column("uid").slice(0, 5).to_pylist()
            raise UnknownNameError(
                f"{len(missing)} UID(s) not found in registry. First 5: {missing[:5]}. "
                f"The registry of {self.feature_space!r} has {len(self.table)} features: {some} ..."
            )
        return found
