"""Which chunks a set of rows needs and where every piece of them goes: integers only, no I/O.

A plan covers the rows of one batch, or of several batches laid end to end (a window): a chunk that
several of them need stands in it once. The unit of work is the *piece*: the part of one row that
lies in one chunk of one array. Pieces are sorted by chunk, so an engine decodes a chunk, hands out
its pieces and forgets it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hbx_gpu.source import RowIndex, Source

INDEX_ROLE = 0
"""Role of the column-index array; role ``k + 1`` is the k-th layer."""


@dataclass(frozen=True, slots=True)
class SourceTable:
    """The Sources of a dataset as vectors, so that planning and decoding need no Python per Source.

    Attributes
    ----------
    n_roles
        Arrays per Source: column indices (role 0) and the layers. Array ``source * n_roles + role``
        of the dataset's ChunkDirectory.
    chunk_base
        int64, (n_sources * n_roles + 1,). First global chunk number of each array.
    chunk_elements
        int64, (n_sources * n_roles,). Elements per chunk of each array.
    element_base
        int64, (n_sources * n_roles,). Elements of all chunks of the arrays before each one.
    remap
        int32. The distinct remaps of all Sources, end to end.
    remap_start, remap_length
        int64, (n_sources,). Each Source's part of `remap`.
    n_features
        Width of the output.
    drops
        True if any remap drops a column.
    repeats
        bool, (n_sources,). See :class:`~hbx_gpu.source.Source`.
    identity
        bool, (n_sources,). Whether the Source's remap changes nothing.
    """

    n_roles: int
    chunk_base: np.ndarray
    chunk_elements: np.ndarray
    element_base: np.ndarray
    remap: np.ndarray
    remap_start: np.ndarray
    remap_length: np.ndarray
    n_features: int
    drops: bool
    repeats: np.ndarray
    identity: np.ndarray


def element_base(chunks: Sequence[int], elements: Sequence[int]) -> np.ndarray:
    """Elements before each array, from its number of chunks and elements per chunk."""
    sizes = np.array(chunks, dtype=np.int64) * np.array(elements, dtype=np.int64)
    return np.cumsum(sizes) - sizes


def source_table(sources: Sequence[Source], layers: Sequence[str], n_features: int) -> SourceTable:
    """Vectors of `sources`; their arrays are numbered as :func:`array_order` lists them.

    Raises
    ------
    ValueError
        A remap is not int32 or points outside ``[-1, n_features)``.
    """
    n_roles = 1 + len(layers)
    elements, chunks = [], []
    for source in sources:
        if source.index is None:
            raise ValueError(f"source {source.name!r} is dense: it has no column indices to plan over")
        for layout in (source.index, *(source.layers[name] for name in layers)):
            elements.append(layout.chunk_shape[0])
            chunks.append(-(-layout.shape[0] // layout.chunk_shape[0]))

    # Sources that share a layout share the remap object: keep one copy of each.
    distinct: dict[int, np.ndarray] = {id(s.remap): s.remap for s in sources}
    begin, same, at = {}, {}, 0
    for key, remap in distinct.items():
        if remap.dtype != np.int32:
            raise ValueError(f"a remap must be int32, got {remap.dtype}")
        if remap.size and (remap.min() < -1 or remap.max() >= n_features):
            raise ValueError(
                f"a remap must lie in [-1, {n_features}), got values {remap.min()} .. {remap.max()}"
            )
        begin[key] = at
        same[key] = bool((remap == np.arange(remap.size)).all())
        at += remap.size
    remap = np.concatenate([*distinct.values(), np.empty(0, np.int32)])
    return SourceTable(
        n_roles=n_roles,
        chunk_base=np.concatenate([[0], np.cumsum(chunks)]).astype(np.int64),
        chunk_elements=np.array(elements, dtype=np.int64),
        element_base=element_base(chunks, elements),
        remap=remap,
        remap_start=np.array([begin[id(s.remap)] for s in sources], dtype=np.int64),
        remap_length=np.array([s.remap.size for s in sources], dtype=np.int64),
        n_features=n_features,
        drops=bool((remap < 0).any()),
        repeats=np.array([s.repeats for s in sources], dtype=bool),
        identity=np.array([same[id(s.remap)] for s in sources], dtype=bool),
    )


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """What to read, and where each piece of it goes.

    Attributes
    ----------
    source
        int32, (n_rows,). Source of every output row; -1 = the row lacks this modality (it is empty).
    offsets
        int64, (n_rows + 1,). Where each row's elements begin in the output, before columns are dropped.
    chunks
        int64, (n_chunks,), ascending. Global numbers of the chunks to read, each once.
    chunk_array
        int64, (n_chunks,). Array of each chunk: ``source * n_roles + role``.
    piece_ptr
        int64, (n_chunks + 1,). Chunk ``c`` serves pieces ``piece_ptr[c]:piece_ptr[c + 1]``.
    piece_row, piece_skip, piece_count, piece_out
        int64, (n_pieces,). Output row; first element inside the chunk, ascending within a chunk; number of
        elements; place of the first one in the output.
    """

    source: np.ndarray
    offsets: np.ndarray
    chunks: np.ndarray
    chunk_array: np.ndarray
    piece_ptr: np.ndarray
    piece_row: np.ndarray
    piece_skip: np.ndarray
    piece_count: np.ndarray
    piece_out: np.ndarray

    @property
    def n_rows(self) -> int:
        return len(self.source)

    @property
    def n_elements(self) -> int:
        return int(self.offsets[-1])


def plan_rows(table: SourceTable, rows: RowIndex, selection: np.ndarray) -> BatchPlan:
    """Plan the rows `selection` of `rows`, in the order given; repeats are fine.

    Parameters
    ----------
    table
        Vectors of the dataset's Sources.
    rows
        All rows of the dataset; its segments lie inside their arrays (checked when it was made).
    selection
        int64, (n,), each in ``[0, len(rows))``.
    """
    source = rows.source[selection]
    start = rows.start[selection]
    length = np.where(source >= 0, rows.length[selection], 0).astype(np.int64)
    offsets = np.zeros(len(selection) + 1, dtype=np.int64)
    np.cumsum(length, out=offsets[1:])

    filled = np.flatnonzero(length)  # empty rows have no pieces
    n = len(filled)
    # One entry per (role, row): the chunks its segment touches.
    array = (source[filled].astype(np.int64) * table.n_roles + np.arange(table.n_roles)[:, None]).ravel()
    row = np.tile(filled, table.n_roles)
    begin, end = start[row], start[row] + length[row]
    elements = table.chunk_elements[array]
    first = begin // elements
    n_pieces = (end - 1) // elements - first + 1

    if n and n_pieces.max() > 1:
        entry = np.repeat(np.arange(n * table.n_roles), n_pieces)
        step = np.arange(len(entry)) - np.repeat(np.cumsum(n_pieces) - n_pieces, n_pieces)
        array, row, elements = array[entry], row[entry], elements[entry]
        begin, end, first = begin[entry], end[entry], first[entry] + step
    chunk = table.chunk_base[array] + first
    chunk_start = first * elements
    piece_begin = np.maximum(begin, chunk_start)
    count = np.minimum(end, chunk_start + elements) - piece_begin

    # By place in storage: chunk after chunk, and within a chunk from front to back.
    order = np.argsort(table.element_base[array] + piece_begin, kind="stable")
    chunk = chunk[order]
    head = np.flatnonzero(np.diff(chunk, prepend=-1))
    return BatchPlan(
        source=source,
        offsets=offsets,
        chunks=chunk[head],
        chunk_array=array[order][head],
        piece_ptr=np.append(head, len(chunk)),
        piece_row=row[order],
        piece_skip=(piece_begin - chunk_start)[order],
        piece_count=count[order],
        piece_out=(offsets[row] + piece_begin - begin)[order],
    )
