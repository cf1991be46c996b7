"""What an atlas, an archive or another store consists of, each part opened when its turn comes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hbx_gpu._remote.places import AnyPath
from hbx_gpu._verify.dataset import Found, Level, Stored, merged, problems, submit
from hbx_gpu.errors import HbxError, ResourceError

if TYPE_CHECKING:
    from hbx_gpu.atlas._catalog.snapshot import Snapshot

_AHEAD = 512  # parts that an executor is given before the first of them is back


@dataclass(frozen=True, slots=True)
class Part:
    """A dataset of a store in one modality, and how to open it; None where it has no cells."""

    name: str
    open: Callable[[], Stored | None]


@dataclass(slots=True)
class Verdict:
    """What was found of a part: its cells, and a line per damage, none where it is whole."""

    name: str
    cells: int = 0
    damage: list[str] = field(default_factory=list)


def verify(
    path: AnyPath,
    level: Level,
    *,
    version: int | None = None,
    allow_links: bool = False,
    threads: int,
    progress: Callable[[int], None],
    executor: Executor | None = None,
) -> Iterator[Verdict]:
    """Check each part of a store, and yield what was found.

    Parameters
    ----------
    path
        An atlas, or a store that `hbx_gpu.open` takes.
    level
        How far the check goes.
    version
        Snapshot of an atlas; None for the newest.
    allow_links
        Follow links that lead out of the store.
    threads
        Threads that read and decode; without an executor.
    progress
        Called with the bytes of chunks that were read since the last call.
    executor
        Any ``concurrent.futures.Executor``: it reads and decodes, and its workers need the same paths. What
        is found, and its order, do not depend on it. None: threads of this process.

    Raises
    ------
    HbxError
        The store cannot be opened at all.
    ResourceError
        A worker of the executor is gone.
    """
    if executor is not None:
        yield from _verify_on(executor, _parts(path, version, allow_links, elsewhere=True), level, progress)
        return
    for part in _parts(path, version, allow_links):
        verdict = Verdict(part.name)
        try:
            dataset = part.open()
            if dataset is not None:
                verdict.cells = len(dataset)
                verdict.damage += problems(dataset, level, threads=threads, progress=progress)
        except (HbxError, OSError, ValueError) as error:
            verdict.damage.append(str(error))
        yield verdict


def _verify_on(
    executor: Executor, parts: Iterator[Part], level: Level, progress: Callable[[int], None]
) -> Iterator[Verdict]:
    """Open parts here and let them be checked anywhere, many at a time; verdicts in order."""
    waiting: deque[tuple[Verdict, list[Future[Found]]]] = deque()
    try:
        for part in parts:
            verdict, tasks = Verdict(part.name), list[Future[Found]]()
            try:
                dataset = part.open()
                if dataset is not None:
                    verdict.cells = len(dataset)
                    tasks = submit(dataset, level, executor)
            except (HbxError, OSError, ValueError) as error:
                verdict.damage.append(str(error))
            waiting.append((verdict, tasks))
            if len(waiting) >= _AHEAD:
                yield _settled(*waiting.popleft(), progress)
        while waiting:
            yield _settled(*waiting.popleft(), progress)
    finally:
        for _, tasks in waiting:
            for task in tasks:
                task.cancel()


def _settled(verdict: Verdict, tasks: list[Future[Found]], progress: Callable[[int], None]) -> Verdict:
    """Wait for the tasks of a part, and write down what they found."""
    from hbx_gpu._executors import result_of

    found: list[Found] = []
    try:
        for task in tasks:
            found.append(result_of(task, verdict.name, goes_on=False))
            progress(found[-1].nbytes)
        verdict.damage += merged(found)
    except ResourceError:
        raise  # a worker that is gone says nothing of the part
    except (HbxError, OSError, ValueError) as error:
        verdict.damage.append(str(error))
    return verdict


def _parts(
    path: AnyPath, version: int | None, allow_links: bool, *, elsewhere: bool = False
) -> Iterator[Part]:
    """The parts of a store; `elsewhere` if their datasets are checked in other processes."""
    from hbx_gpu._inplace.stores import is_atlas

    if is_atlas(path) or version is not None:
        from hbx_gpu.atlas import Snapshot

        yield from _parts_of_atlas(Snapshot.open(path, version, allow_links=allow_links), elsewhere)
    else:
        yield from _parts_of_stores(path, allow_links)


def _parts_of_atlas(snapshot: Snapshot, elsewhere: bool) -> Iterator[Part]:
    """A part per group of zarr arrays and pointer field that leads to it."""
    from hbx_gpu._verify.field_rows import FieldRows
    from hbx_gpu.atlas._model.spaces import find_layers

    fields = [
        (pointer.feature_space, FieldRows(snapshot, table, pointer))
        for table in snapshot.obs_tables
        for pointer in snapshot.pointer_fields(table).values()
    ]
    for record in snapshot.datasets().to_dict("records"):
        group, space_name = str(record["zarr_group"]), str(record["feature_space"])
        label = record.get("source_name")
        name = f"{label if isinstance(label, str) and label else group}, {space_name}"
        for field_space, rows in fields:
            if field_space != space_name:
                continue

            def opened(
                group: str = group, space_name: str = space_name, rows: FieldRows = rows
            ) -> Stored | None:
                space = snapshot.space(snapshot.group(group, space_name))
                layers = sorted(find_layers(snapshot.group_path(group), space))
                return (rows.queried if elsewhere else rows.dataset)(group, layers)

            yield Part(name, opened)


def _parts_of_stores(path: AnyPath, allow_links: bool) -> Iterator[Part]:
    """A part per matrix of a store that other programs wrote."""
    from hbx_gpu._inplace.cells import Cells
    from hbx_gpu._inplace.stores import open_stores
    from hbx_gpu._inplace.table import CellTable

    for store in open_stores([path], allow_links=allow_links):
        cells = Cells(CellTable([store]))
        spaces: list[str | None] = [*store.modalities] or [None]
        for space in spaces:
            parts = [store.modalities[space][0]] if space is not None else store.parts
            names = list(dict.fromkeys(name for part in parts for name in part.matrices))
            for layer in names:

                def opened(
                    cells: Cells = cells, space: str | None = space, layer: str = layer
                ) -> Stored | None:
                    return cells.to_cell_dataset(space, layer=layer) if len(cells.to_arrow()) else None

                label = ", ".join(filter(None, [str(store.path), space, layer]))
                yield Part(label, opened)
