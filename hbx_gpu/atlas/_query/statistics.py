"""Statistics of what a query selects: read from a file beside the catalog, or computed and kept there.

The files lie in the folder ``statistics`` of the atlas, one per snapshot and question. Homeobox looks at
``lance_db`` and ``zarr_store`` only. A snapshot never changes, so a file never has to be renewed.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import tempfile
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from hbx_gpu._files import sync
from hbx_gpu._progress import Progress
from hbx_gpu._remote.places import AnyPath, Place
from hbx_gpu._remote.writing import put
from hbx_gpu._untrusted import Within, own_folder, read_small
from hbx_gpu.atlas._query.opening import default_layer
from hbx_gpu.atlas._query.recipe import QueryRecipe
from hbx_gpu.atlas._query.selection import Selection
from hbx_gpu.atlas._query.state import QueryState
from hbx_gpu.errors import CorruptDataError, HbxError

if TYPE_CHECKING:
    from hbx_gpu.atlas._catalog.snapshot import PointerColumn, Snapshot
    from hbx_gpu.statistics import Statistics

FOLDER = "statistics"
_LARGEST = 1 << 30  # most bytes of an object with statistics
_log = logging.getLogger(__name__)


class Options(TypedDict, total=False):
    """Options of ``statistics()``.

    Attributes
    ----------
    feature_space, layer, field_name
        As in ``to_cell_dataset``.
    target_sum, medians, executor, progress
        As in :func:`hbx_gpu.statistics.compute`.
    keep
        False neither reads nor writes the file in the atlas.
    """

    feature_space: str | None
    layer: str | None
    field_name: str | None
    target_sum: float | None
    medians: bool
    executor: Executor | None
    progress: Progress | None
    keep: bool


@dataclass(frozen=True)
class _Question:
    """What the statistics are of."""

    selection: Selection
    pointer: PointerColumn
    layer: str | None
    by: str | None
    target_sum: float | None
    medians: bool

    @property
    def path(self) -> AnyPath:
        """Where the answer is kept."""
        root = self.selection.snapshot.path
        state, space = self.selection.state, self.pointer.feature_space
        asked = {
            "record": repr(self.selection.snapshot.record),
            "table": self.selection.name,
            "rows": [state.where, state.limit, state.offset, state.balanced],
            "panel": dict(state.panels).get(space),
            "field": self.pointer.name,
            "layer": self.layer,
            "by": self.by,
            "target_sum": self.target_sum,
            "medians": self.medians,
        }
        digest = hashlib.blake2b(json.dumps(asked).encode(), digest_size=12).hexdigest()
        return root / FOLDER / f"{self.selection.snapshot.version}-{digest}.npz"


def statistics_of(selection: Selection, by: str | None, options: Options) -> Statistics:
    """The statistics that a query asks for.

    Raises
    ------
    UnknownNameError
        No such column, layer, space or field.
    UnsupportedError
        A modality without features.
    TypeError
        No such option; a misspelled one would answer another question.
    """
    from hbx_gpu.statistics import compute

    if unknown := sorted(set(options) - Options.__optional_keys__):
        raise TypeError(
            f"statistics() has no argument {unknown[0]!r}; it has by, {', '.join(Options.__annotations__)}"
        )
    pointer = selection.fields.one(options.get("feature_space"), options.get("field_name"))
    selection.check_panels([pointer])
    names = selection.metadata([by] if by is not None else [])
    target, medians = options.get("target_sum", 10_000.0), options.get("medians", True)
    question = _Question(selection, pointer, options.get("layer"), by, target, medians)
    place = question.path if options.get("keep", True) else None
    if place is not None and (kept := _kept(selection.snapshot, place)) is not None:
        return kept
    found = selection.read_rows(pointer, names)
    layer = question.layer or default_layer(selection.snapshot, pointer.feature_space, found.groups)
    recipe = QueryRecipe.of(selection, pointer, (layer,), names)
    result = compute(
        recipe.dataset(selection, found),
        by,
        target_sum=target,
        medians=medians,
        executor=options.get("executor"),
        progress=options.get("progress"),
    )
    if place is not None:
        _keep(result, place)
    return result


def _kept(snapshot: Snapshot, path: AnyPath) -> Statistics | None:
    """The statistics in a file or an object; None where there is none, or where it is damaged."""
    from hbx_gpu.statistics import Statistics

    if isinstance(path, Path):
        if not os.path.lexists(path):
            return None
        if not snapshot.allow_links:
            Within(str(snapshot.path)).check(str(path))
    try:
        if isinstance(path, Path):
            return Statistics.load(path)
        return Statistics.read(io.BytesIO(read_small(path, _LARGEST)), str(path))
    except FileNotFoundError:
        return None
    except CorruptDataError as error:
        _log.warning("%s; they are computed again", error)
        return None


def _keep(result: Statistics, path: AnyPath) -> None:
    """Write the file so that readers see the whole of it or nothing; do not where nothing may be written."""
    if isinstance(path, Place):
        content = io.BytesIO()
        result.write(content)
        try:
            put(path, content.getvalue())
        except HbxError as error:  # without the right to write
            _log.info("the statistics are not kept in the atlas: %s", error)
        return
    temporary = None
    try:
        own_folder(path.parent)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.stem}-", dir=path.parent)
        with open(descriptor, "wb") as file:
            os.fchmod(descriptor, 0o666 & ~_umask())
            result.write(file)
        sync(Path(temporary))
        os.replace(temporary, path)
    except (OSError, HbxError) as error:  # a read-only atlas, a full disk, a link in the way
        _log.info("the statistics are not kept in the atlas: %s", error)
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _umask() -> int:
    """The permissions that new files of this process lack; it can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def parsed_panel(panel: str) -> int:
    """Number of features that a panel of the form ``hvg:2000`` asks for.

    Raises
    ------
    ValueError
        The text has another form.
    """
    kind, _, number = panel.partition(":")
    if kind != "hvg" or not number.isdecimal() or int(number) == 0:
        raise ValueError(
            "features() needs a list of uids, or 'hvg:2000' for the 2,000 most variable features; got the "
            f"string {panel!r}"
        )
    return int(number)


def highly_variable(selection: Selection, panel: str, space: str) -> list[str]:
    """The features that a panel of the form ``hvg:2000`` means, the most variable one first.

    They are those of all cells of the obs table, whatever a query selects: training and test sets of one
    atlas then have the same columns.
    """
    number = parsed_panel(panel)
    everything = Selection.of(selection.snapshot, selection.name, QueryState())
    return list(statistics_of(everything, None, {"feature_space": space}).highly_variable(number).index)
