"""Opens the arrays of groups on a thread of its own, while the rows that point to them are read."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Self

from hbx_gpu._remote.places import is_remote
from hbx_gpu.atlas._model.spaces import known_spaces
from hbx_gpu.atlas._query.opening import Arrays, arrays_of, default_layer, links_of
from hbx_gpu.atlas._query.sharing import find_rows
from hbx_gpu.errors import HbxError

if TYPE_CHECKING:
    from hbx_gpu.atlas._catalog.snapshot import Group, PointerColumn
    from hbx_gpu.atlas._query.obs import ModalityRows
    from hbx_gpu.atlas._query.selection import Selection

_WORTH_A_THREAD = 64  # groups


def rows_and_arrays(
    chosen: Selection,
    pointer: PointerColumn,
    columns: Sequence[str],
    layers: Sequence[str] | None,
    *,
    absent: bool,
) -> tuple[ModalityRows, Mapping[str, Arrays]]:
    """What :func:`find_rows` returns, and by name of its group the arrays that were opened meanwhile."""
    with _OpenedAhead(chosen, pointer.feature_space, layers) as ahead:
        return find_rows(chosen, pointer, columns, absent=absent), ahead.arrays()


class _OpenedAhead:
    """Arrays of all groups of a feature space, opened while this context manager is entered.

    Nothing is opened ahead where a query may select few of the groups, or where there are few of them; nor in
    object storage, where groups are opened many at a time once it is known which. A group that
    cannot be opened is left out, because it is an error only if rows point to it.

    Parameters
    ----------
    chosen
        What the query selects.
    feature_space
        Name of the space.
    layers
        Layers to open; None for the default layer.
    """

    def __init__(self, chosen: Selection, feature_space: str, layers: Sequence[str] | None) -> None:
        self._chosen = chosen
        self._arrays: dict[str, Arrays] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._groups: list[Group] = []
        snapshot, state = chosen.snapshot, chosen.state
        whole = state.where is None and state.limit is None and state.balanced is None and not state.offset
        if not whole or feature_space not in known_spaces() or is_remote(snapshot.store_path):
            return
        self._layers = tuple(layers or (default_layer(snapshot, feature_space, ()),))
        self._groups = snapshot.groups(feature_space)
        if len(self._groups) >= _WORTH_A_THREAD:
            self._thread = threading.Thread(target=self._open, name="hbx_gpu-open", daemon=True)

    def __enter__(self) -> Self:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def arrays(self) -> Mapping[str, Arrays]:
        """Arrays by name of their group; waits until all are there."""
        if self._thread is not None:
            self._thread.join()
        return self._arrays

    def _open(self) -> None:
        snapshot = self._chosen.snapshot
        within = links_of(snapshot)
        for group in self._groups:
            if self._stop.is_set():
                return
            try:
                space = snapshot.space(group)
                self._arrays[group.name] = arrays_of(snapshot, group, space, self._layers, within)
            except (HbxError, OSError, ValueError):
                continue
