"""Results of a model beside the cells of an atlas: a dense space without features, one group per dataset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hbx_gpu._advice import option
from hbx_gpu._version import __version__
from hbx_gpu.atlas._catalog import tables
from hbx_gpu.atlas._catalog.catalog import Catalog
from hbx_gpu.atlas._catalog.journal import GroupNote, IngestNote
from hbx_gpu.atlas._catalog.names import only_table
from hbx_gpu.atlas._catalog.session import Writable
from hbx_gpu.atlas._model import columns
from hbx_gpu.atlas._model.schema import DatasetSchema, make_uid
from hbx_gpu.atlas._model.spaces import EMBEDDINGS, get_space
from hbx_gpu.atlas._writing.arrays import DenseGroupWriter
from hbx_gpu.errors import AlreadyIngestedError, AtlasError, InvalidDataError

if TYPE_CHECKING:
    from lancedb.table import Table

_BLOCK = 64 << 20  # bytes of results in memory at a time
_ROWS = 100_000  # rows of the obs table in memory at a time


class EmbedOptions(TypedDict, total=False):
    """Options of :func:`add_embedding`."""

    obs_table: str | None
    overwrite: bool


@dataclass(frozen=True)
class _Group:
    """The results for the cells of one dataset.

    Attributes
    ----------
    dataset_uid, name
        The dataset, and the path of the group.
    rows
        int64, ascending row numbers of its cells in the obs table.
    """

    dataset_uid: str
    name: str
    rows: np.ndarray


def add_embedding(
    atlas: Writable,
    name: str,
    values: np.ndarray,
    cells: Sequence[str] | np.ndarray,
    *,
    obs_table: str | None = None,
    overwrite: bool = False,
) -> int:
    """Store a row of numbers for each of some cells, as a dense modality of the atlas.

    The rows of the obs table keep their order. Other cells lack the modality. The table changes in one
    commit; if the process is killed before it, the next writer removes what was left.

    Parameters
    ----------
    atlas
        Atlas that is open for writing.
    name
        Name of the modality, thus of a pointer column of the obs table.
    values
        float16 or float32, (n, d). It may be a memory map: blocks of it are read.
    cells
        The ``uid`` of the cell of each row, (n,), in any order; each once.
    obs_table
        Obs table of the cells; required where there are several.
    overwrite
        Whether to replace all results of that name, if there are any.

    Returns
    -------
    int
        Number of cells. Call :meth:`~RaggedAtlas.snapshot` to read them.

    Raises
    ------
    InvalidDataError
        Values of another shape or dtype, a uid that comes twice or that no cell has.
    AlreadyIngestedError
        There are results of that name, and `overwrite` is false.
    AtlasError
        Another column has that name.
    """
    table_name = obs_table or only_table(atlas.session.obs_tables)
    if values.ndim != 2 or values.shape[1] == 0 or values.dtype not in (np.float16, np.float32):
        raise InvalidDataError(
            f"{name}: values must be float16 or float32 of shape (n, d), got {values.dtype} of shape "
            f"{values.shape}; convert them with values.astype('float32')"
        )
    if columns.stored_names([name], ()) != {name: name}:
        raise AtlasError(f"pointer column {name!r}: the name must be free of dots and backticks")
    with atlas.session.writing() as catalog:
        table = catalog.obs(table_name)
        if (schema := atlas.session.obs_schema(table_name)) is not None and name not in table.schema.names:
            raise AtlasError(
                f"{schema.__name__}, the class of obs table {table_name!r}, declares no pointer column "
                f"{name!r}; open the atlas without a class and the column is added"
            )
        catalog.extension(table_name, {name: EMBEDDINGS})  # or raise an error
        is_new = name not in table.schema.names
        before = [] if is_new else _groups_in_use(table, name)
        if before and not overwrite:
            raise AlreadyIngestedError(
                f"obs table {table_name!r} has {name!r} for some cells already; replace it with "
                f"{option('overwrite', 'True')}, or choose another name"
            )
        stored, of_row = _places(table, cells, len(values), name)
        groups = _planned(catalog, stored, of_row, name)
        note = IngestNote(
            make_uid(),
            table_name,
            tuple(group.dataset_uid for group in groups),
            tuple(GroupNote(group.name, EMBEDDINGS, name) for group in groups),
            new_columns={table_name: (name,)} if is_new else {},
        )
        catalog.journal.write(note)
        try:
            _write(catalog, groups, values, of_row, catalog.staging(note.staging))
            catalog.extend(table_name, {name: EMBEDDINGS})
            _point(catalog.obs(table_name), stored, groups, name)
        finally:
            catalog.undo(note)  # of complete work it removes temporary files
        for chosen in tables.batches("zarr_group", before):
            catalog.datasets().delete(chosen)
    return len(values)


def _groups_in_use(table: Table, name: str) -> list[str]:
    """Groups that a pointer column points to."""
    found = table.search().select({"group": f"`{name}`.zarr_group"}).to_arrow().column("group")
    return [group for group in pc.unique(found).to_pylist() if group]


def _places(
    table: Table, cells: Sequence[str] | np.ndarray, n: int, name: str
) -> tuple[pa.Table, np.ndarray]:
    """The rows of an obs table (``dataset_uid``, ``_rowid``) in order, and the result of each row or -1."""
    given = pa.array(np.asarray(cells, dtype=object), pa.string())
    if len(given) != n:
        raise InvalidDataError(f"{name}: there are {n} rows of values and {len(given)} cells")
    stored = table.search().select(["uid", "dataset_uid"]).with_row_id(True).to_arrow().sort_by("_rowid")
    found = pc.index_in(given, value_set=stored.column("uid").combine_chunks())
    if found.null_count:
        lacking = given.filter(pc.is_null(found)).slice(0, 3).to_pylist()
        raise InvalidDataError(
            f"{name}: {found.null_count} cells are not in the obs table {table.name!r}, for example "
            f"{lacking}; cells= takes the column uid of a query, query.to_modality_obs(...)['uid']"
        )
    rows = found.to_numpy(zero_copy_only=False)
    if len(np.unique(rows)) != n:
        raise InvalidDataError(f"{name}: a cell comes more than once; each needs one row of values")
    of_row = np.full(len(stored), -1, np.int64)
    of_row[rows] = np.arange(n)
    return stored.drop_columns(["uid"]), of_row


def _planned(catalog: Catalog, stored: pa.Table, of_row: np.ndarray, name: str) -> list[_Group]:
    """A group for each dataset that has cells with results."""
    datasets = stored.column("dataset_uid").combine_chunks().dictionary_encode()
    codes = datasets.indices.to_numpy(zero_copy_only=False)
    out = []
    for code, uid in enumerate(datasets.dictionary.to_pylist()):
        rows = np.flatnonzero((codes == code) & (of_row >= 0))
        if not len(rows):
            continue
        zarr_group, edition = f"{uid}/{name}", 1
        while catalog.group_path(zarr_group).exists():  # snapshots may have it
            edition += 1
            zarr_group = f"{uid}/{name}-{edition}"
        out.append(_Group(uid, zarr_group, rows))
    return out


def _write(
    catalog: Catalog, groups: Sequence[_Group], values: np.ndarray, of_row: np.ndarray, staging: Path
) -> None:
    """Write the groups and list them in the table of groups."""
    step = max(1, _BLOCK // (values.itemsize * values.shape[1]))
    sources = {row["dataset_uid"]: row.get("source_name") for row in catalog.dataset_rows()}
    listed = []
    staging.mkdir(parents=True)
    for group in groups:
        staged = staging / "group"
        writer = DenseGroupWriter(
            staged,
            get_space(EMBEDDINGS),
            layers={"values": values.dtype.name},
            row_shape=values.shape[1:],
            codec=catalog.names.codec,
        )
        try:
            for begin in range(0, len(group.rows), step):
                writer.append({"values": values[of_row[group.rows[begin : begin + step]]]})
            writer.close()
        finally:
            writer.abort()
        catalog.publish(staged, group.name)
        uid = group.dataset_uid
        record = DatasetSchema(dataset_uid=uid, zarr_group=group.name, feature_space=EMBEDDINGS)
        origin = {"source_name": sources.get(uid), "software": f"hbx_gpu {__version__}"}
        listed.append(record.model_dump() | {"n_rows": len(group.rows)} | origin)
    if listed:
        added = pa.Table.from_pylist(listed)
        tables.prepare(catalog.datasets(), added, allow_new=True, source="embeddings").commit()


def _point(table: Table, stored: pa.Table, groups: Sequence[_Group], name: str) -> None:
    """Point the rows of an obs table to the groups, in one commit that keeps their order.

    LanceDB moves rows that it updates to the end. So the table is written again, row after row; earlier
    versions stay.
    """
    n = len(stored)
    number, position = np.full(n, len(groups)), np.zeros(n, np.int64)
    for at, group in enumerate(groups):
        number[group.rows], position[group.rows] = at, np.arange(len(group.rows))
    names = pa.array([*(group.name for group in groups), None], pa.string())
    rowids = stored.column("_rowid").to_numpy()
    schema = table.schema

    def blocks() -> Iterator[pa.RecordBatch]:
        for begin in range(0, n, _ROWS):
            part = slice(begin, begin + _ROWS)
            rows = table.take_row_ids(rowids[part].tolist()).with_row_id().to_arrow().sort_by("_rowid")
            pointer = pa.StructArray.from_arrays(
                [names.take(pa.array(number[part])), pa.array(position[part])],
                fields=list(schema.field(name).type),
                mask=pa.array(number[part] == len(groups)),
            )
            rows = rows.set_column(rows.schema.get_field_index(name), schema.field(name), pointer)
            yield from rows.select(schema.names).cast(schema).combine_chunks().to_batches()

    table.add(pa.RecordBatchReader.from_batches(schema, blocks()), mode="overwrite")
