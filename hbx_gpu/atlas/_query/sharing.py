"""The rows that a query finds, read once for all ranks of a host."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import numpy as np

from hbx_gpu._datasets.shared import several_ranks_here, shared
from hbx_gpu._plan.index import CompactIndex
from hbx_gpu._source import BoxIndex, ObsColumns, RowIndex, RowTable
from hbx_gpu.atlas._query.ids import IdRuns
from hbx_gpu.atlas._query.obs import ModalityRows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hbx_gpu.atlas._catalog.snapshot import PointerColumn
    from hbx_gpu.atlas._query.selection import Selection

_KINDS: dict[str, type[CompactIndex] | type[RowIndex] | type[BoxIndex]] = {
    kind.__name__: kind for kind in (CompactIndex, RowIndex, BoxIndex)
}


def find_rows(
    chosen: Selection, pointer: PointerColumn, columns: Sequence[str], *, absent: bool
) -> ModalityRows:
    """What :meth:`Selection.read_rows` returns; on a host with several ranks of a job, one of them reads it.

    The others map the files that the first one writes to the folder of temporary files. Without room there,
    each rank reads for itself.
    """
    if not several_ranks_here():
        return chosen.read_rows(pointer, columns, absent=absent)
    try:
        arrays, state = shared(
            _key(chosen, pointer, columns, absent),
            lambda: _taken_apart(chosen.read_rows(pointer, columns, absent=absent)),
        )
    except OSError:
        return chosen.read_rows(pointer, columns, absent=absent)
    return _put_together(arrays, cast("tuple[str, list[str], list[str], _Objects, _Objects]", state))


_Objects = dict[str, np.ndarray]


def _key(chosen: Selection, pointer: PointerColumn, columns: Sequence[str], absent: bool) -> str:
    """A name that is the same in every process that asks the same of the same snapshot."""
    snapshot = chosen.snapshot
    try:
        found = os.stat(snapshot.path)
        place: tuple[object, ...] = (found.st_dev, found.st_ino)
    except OSError:  # not a folder of this host
        place = (snapshot.path,)
    asked = (place, snapshot.version, chosen.name, chosen.state, pointer.name, tuple(columns), absent)
    return hashlib.blake2b(repr(asked).encode(), digest_size=16).hexdigest()


def _taken_apart(
    found: ModalityRows,
) -> tuple[Mapping[str, np.ndarray], tuple[str, list[str], list[str], _Objects, _Objects]]:
    columns = found.obs.columns
    objects = {name: column for name, column in columns.items() if column.dtype == object}
    plain = [name for name in columns if name not in objects]
    arrays = {f"rows-{name}": array for name, array in found.rows.arrays().items()}
    arrays |= {"ids-first": found.ids.first, "ids-starts": found.ids.starts}
    arrays |= {f"column-{i}": columns[name] for i, name in enumerate(plain)}
    state = (type(found.rows).__name__, found.groups, list(columns), objects, found.obs.categories)
    return arrays, state


def _put_together(
    arrays: Mapping[str, np.ndarray], state: tuple[str, list[str], list[str], _Objects, _Objects]
) -> ModalityRows:
    kind, groups, names, objects, categories = state
    plain = [name for name in names if name not in objects]
    columns = {name: arrays[f"column-{i}"] for i, name in enumerate(plain)} | objects
    index = {name.removeprefix("rows-"): array for name, array in arrays.items() if name.startswith("rows-")}
    rows: RowTable | BoxIndex = _KINDS[kind](**index)
    return ModalityRows(
        IdRuns(arrays["ids-first"], arrays["ids-starts"]),
        groups,
        rows,
        ObsColumns({name: columns[name] for name in names}, categories),
    )
