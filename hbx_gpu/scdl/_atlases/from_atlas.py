"""An atlas becomes an archive that bionemo-scdl opens too: streaming, and without loss."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from hbx_gpu._advice import option
from hbx_gpu._progress import Progress, checked
from hbx_gpu._remote.places import is_remote
from hbx_gpu.errors import AtlasError, InvalidDataError, UnsupportedError
from hbx_gpu.scdl._atlases import origin
from hbx_gpu.scdl._format.values import Tolerance
from hbx_gpu.scdl._writing.concat import append_frames, append_neighbors
from hbx_gpu.scdl._writing.uploading import local_target
from hbx_gpu.scdl._writing.writer import ArchiveWriter, check_target

if TYPE_CHECKING:
    from hbx_gpu.atlas._catalog.snapshot import Snapshot
    from hbx_gpu.atlas._query.query import AtlasQuery
    from hbx_gpu.dataloader import CellDataset

# Values that are copied at once.
_PIECE = 1 << 21
# Columns of an obs table that belong to the atlas and not to the data.
_OWN = ("uid", "dataset_uid", "obs_name")


@dataclass(frozen=True, slots=True)
class _Run:
    """Consecutive rows of one stored matrix: `dataset` numbers, and the group they lie in."""

    first: int
    last: int
    group: int


def atlas_to_archive(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    layer: str | None = None,
    data_dtype: str | None = None,
    table: str | None = None,
    feature_space: str | None = None,
    version: int | None = None,
    union: bool = False,
    keep_uids: bool = False,
    allow_loss: bool = False,
    allow_links: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> int:
    """Write the cells of an atlas, ours or Homeobox's, as an archive that bionemo-scdl opens too.

    Rows come in the order of the obs table. An atlas that is the image of an archive gives that archive back:
    its dtype, blocks, column types, categories, names, labels and neighbors.

    Parameters
    ----------
    source
        The atlas.
    target
        Folder of the archive.
    layer
        Layer to write; by default the only one there is, else the first required one of the space.
    data_dtype
        Dtype of the values; by default that of the archive that the atlas was made of, else ``auto``, the
        smallest that holds them.
    table, feature_space
        Obs table and feature space, where there are several.
    version
        Snapshot; the newest by default.
    union
        One block with all genes instead of a block per dataset with the dataset's own.
    keep_uids
        Write ``uid`` and ``dataset_uid`` as obs columns. Names of cells are stored in any case.
    allow_loss
        Accept values that `data_dtype` does not hold.
    allow_links
        Follow links that lead out of the atlas or its zarr store, which are refused otherwise.
    overwrite
        Replace an archive at the target.
    progress
        Called with the rows done and their number.

    Returns
    -------
    int
        Number of rows.

    Raises
    ------
    FileExistsError
        The target exists.
    UnsupportedError
        Values of a dtype that archives do not have (signed numbers); a dense space.
    InvalidDataError
        No cells.
    """
    from hbx_gpu._datasets.cells import CellDataset
    from hbx_gpu.atlas._catalog.snapshot import Snapshot
    from hbx_gpu.atlas._query.query import AtlasQuery

    progress = checked(progress)
    if not is_remote(target):
        check_target(target, overwrite=overwrite)
    snapshot = Snapshot.open(source, version, allow_links=allow_links)
    query = AtlasQuery(snapshot, table)
    if feature_space is not None:
        query.feature_spaces(feature_space)
    # What an archive had beside its tables is kept in local atlases only.
    made_of = (
        None if is_remote(source) else origin.find(Path(source), snapshot.version, allow_links=allow_links)
    )
    dataset = query.to_cell_dataset(feature_space, layer or _only_layer(snapshot))
    if not isinstance(dataset, CellDataset):
        raise UnsupportedError(
            f"{feature_space or 'the feature space'} of {source} is dense, and archives hold sparse counts; "
            "choose another feature space"
        )
    if made_of is not None and (union or keep_uids or not _is_image(dataset, made_of)):
        made_of = None
    if dataset.dtype.kind not in "uf":
        raise UnsupportedError(
            f"layer {dataset.layer!r} of {source} holds {dataset.dtype}; archives hold unsigned integers and "
            "floating point numbers. Choose another layer"
        )
    if not len(dataset):
        raise InvalidDataError(f"{source} has no cells in this snapshot, so there is nothing to convert")
    runs, rows = list(_runs(dataset, union=union)), dataset
    genes = [np.arange(dataset.n_features)]
    if not union:
        rows, genes = _with_own_columns(dataset)
    n_columns = max([len(own) for own in genes] + ([made_of.n_columns] if made_of else []))
    with (
        local_target(target, overwrite=overwrite) as made,
        ArchiveWriter(
            made,
            n_columns=n_columns,
            data_dtype=data_dtype or (made_of.data_dtype if made_of else "auto"),
            tolerance=Tolerance(allow_loss=allow_loss),
            overwrite=overwrite,
        ) as writer,
    ):
        if made_of is not None:
            append_neighbors(writer, made_of, _PIECE)
            append_frames(writer, made_of, any_obs=made_of.obs is not None and len(made_of.obs) > 0)
        else:
            _append_tables(writer, query, snapshot, dataset, runs, genes, keep_uids=keep_uids)
        for done in _append_rows(writer, rows):
            progress(done, len(rows))
        writer.add_source(str(source), len(rows), dataset.layer)
    return len(rows)


def _only_layer(snapshot: Snapshot) -> str | None:
    """The layer that all datasets were written to, where that is recorded and the same."""
    datasets = snapshot.datasets()
    layers = set(datasets["zarr_layer"]) if "zarr_layer" in datasets.columns else set()
    return str(layers.pop()) if len(layers) == 1 and None not in layers else None


def _is_image(dataset: CellDataset, made_of: origin.Origin) -> bool:
    """Whether rows and values are those of the archive, in its order."""
    if dataset.layer != made_of.layer:
        return False
    lengths = [run.last - run.first for run in _runs(dataset, union=False)]
    inside = np.diff(dataset.groups_np) == 0
    ascending = (np.diff(dataset.row_index.start) >= 0)[inside].all()
    return bool(ascending) and lengths == [n for n in np.diff(made_of.bounds).tolist() if n]


def _runs(dataset: CellDataset, *, union: bool) -> Iterator[_Run]:
    groups = np.zeros(len(dataset), np.int32) if union else dataset.groups_np
    edges = [0, *(np.flatnonzero(np.diff(groups)) + 1).tolist(), len(groups)]
    for first, last in itertools.pairwise(edges):
        if last > first:
            yield _Run(first, last, int(groups[first]))


def _with_own_columns(dataset: CellDataset) -> tuple[CellDataset, list[np.ndarray]]:
    """The same rows with the columns of their own group, and per group the features that these are."""
    from hbx_gpu.dataloader import CellDataset

    sources = dataset.sources
    for source in sources:
        if (source.remap < 0).any():
            raise AtlasError(
                f"group {source.name!r} has {int((source.remap < 0).sum())} features that are registered no "
                f"more: they have no name. Convert with {option('union', 'True')}, which leaves "
                "their values out"
            )
    own = [replace(s, remap=np.arange(len(s.remap), dtype=np.int32)) for s in sources]
    width = max((len(s.remap) for s in sources), default=0)
    local = CellDataset(
        own, dataset.row_index, layer=dataset.layer, n_features=width, feature_uids=np.arange(width)
    )
    return local, [source.remap for source in sources]


def _append_rows(writer: ArchiveWriter, dataset: CellDataset) -> Iterator[int]:
    """Write all rows, a bounded number of values at a time."""
    ends = np.cumsum(dataset.row_index.length, dtype=np.int64)
    first = 0
    while first < len(dataset):
        before = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + _PIECE, "right")))
        last = min(last, first + _PIECE, len(dataset))
        batch = dataset[first:last]
        writer.append_rows(batch.offsets, batch.indices, batch.values, where=f"rows {first} to {last - 1}")
        yield last
        first = last


def _append_tables(
    writer: ArchiveWriter,
    query: AtlasQuery,
    snapshot: Snapshot,
    dataset: CellDataset,
    runs: list[_Run],
    genes: list[np.ndarray],
    *,
    keep_uids: bool,
) -> None:
    """Genes and cells of an atlas, run after run."""
    registry = snapshot.registry(dataset.feature_space)
    table = registry.table
    frame = table.select([n for n in table.column_names if n not in ("uid", "global_index")])
    place = {uid: i for i, uid in enumerate(table.column("uid").to_pylist())}
    rows = np.array([place[uid] for uid in dataset.feature_uids], np.int64)
    records = snapshot.datasets().set_index("zarr_group").to_dict("index")
    obs = query.to_modality_obs(dataset.feature_space)
    for run in runs:
        own = genes[run.group]
        uids = [str(uid) for uid in dataset.feature_uids[own]]
        source = dataset.sources[run.group].name if len(genes) > 1 or len(dataset.sources) == 1 else ""
        label = str(records.get(source, {}).get("source_name") or source)
        columns = _filled(frame.take(pa.array(rows[own])))
        # Readers know columns only, not names: the ids are one, unless a column repeats them.
        if not any(columns[name].to_pylist() == uids for name in columns.column_names):
            ids = pa.table({_free("feature_id", columns): pa.array(uids, pa.string())})
            # A table without columns has no rows either, so columns are added to the ids.
            for name in columns.column_names:
                ids = ids.append_column(columns.schema.field(name), columns[name])
            columns = ids
        named = columns.num_columns > 1 and "feature_name" in columns.column_names
        if named and columns["feature_name"].to_pylist() == uids:  # what ingest adds where nothing is named
            columns = columns.drop_columns(["feature_name"])
        n = run.last - run.first
        writer.append_var(columns, n, label=label, gene_names=uids)
        part = obs.slice(run.first, n)
        cell_names = part["obs_name" if "obs_name" in part.column_names else "uid"].combine_chunks()
        hidden = [
            name for name in _OWN if name in part.column_names and not (keep_uids and name != "obs_name")
        ]
        kept = _filled(part.drop_columns(hidden))
        writer.append_obs(iter([kept]), n, label=label, cell_names=cell_names)


def _filled(table: pa.Table) -> pa.Table:
    """Without the columns that hold nothing: those of other datasets."""
    kept = [name for name in table.column_names if table[name].null_count < len(table) or not len(table)]
    return table.select(kept)


def _free(name: str, table: pa.Table) -> str:
    while name in table.column_names:
        name += "_"
    return name
