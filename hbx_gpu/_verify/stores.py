"""What an atlas, an archive or another store consists of, each part opened when its turn comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hbx_gpu._remote.places import AnyPath
from hbx_gpu._verify.dataset import Level, Stored, problems
from hbx_gpu.errors import HbxError

if TYPE_CHECKING:
    from hbx_gpu.atlas._catalog.snapshot import Snapshot


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
        Threads that read and decode.
    progress
        Called with the bytes of chunks that were read since the last call.

    Raises
    ------
    HbxError
        The store cannot be opened at all.
    """
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


def _parts(path: AnyPath, version: int | None, allow_links: bool) -> Iterator[Part]:
    from hbx_gpu._inplace.stores import is_atlas

    if is_atlas(path) or version is not None:
        from hbx_gpu.atlas import Snapshot

        yield from _parts_of_atlas(Snapshot.open(path, version, allow_links=allow_links))
    else:
        yield from _parts_of_stores(path, allow_links)


def _parts_of_atlas(snapshot: Snapshot) -> Iterator[Part]:
    """A part per group of zarr arrays and pointer field that leads to it."""
    from hbx_gpu.atlas._model.spaces import find_layers
    from hbx_gpu.atlas._query.query import AtlasQuery

    for record in snapshot.datasets().to_dict("records"):
        group, space_name = str(record["zarr_group"]), str(record["feature_space"])
        label = record.get("source_name")
        name = f"{label if isinstance(label, str) and label else group}, {space_name}"
        for table in snapshot.obs_tables:
            for pointer in snapshot.pointer_fields(table).values():
                if pointer.feature_space != space_name:
                    continue

                def opened(
                    group: str = group,
                    space_name: str = space_name,
                    table: str = table,
                    at: str = pointer.name,
                ) -> Stored | None:
                    space = snapshot.space(snapshot.group(group, space_name))
                    layers = sorted(find_layers(snapshot.group_path(group), space))
                    quoted = group.replace("'", "''")
                    query = AtlasQuery(snapshot, table).where(f"`{at}`.zarr_group = '{quoted}'")
                    if not query.count():
                        return None
                    return query.to_cell_dataset(field_name=at, layer=layers)

                yield Part(name, opened)


def _parts_of_stores(path: AnyPath, allow_links: bool) -> Iterator[Part]:
    """A part per matrix of a store that other programs wrote."""
    import hbx_gpu
    from hbx_gpu._inplace.cells import Cells
    from hbx_gpu._inplace.stores import open_stores

    for store in open_stores([path], allow_links=allow_links):
        cells = hbx_gpu.open(store.path, allow_links=allow_links)
        assert isinstance(cells, Cells)  # an atlas was told apart before
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
