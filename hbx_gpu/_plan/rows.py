"""Plan rows: find the chunks that a set of rows needs, and where every piece of them goes, without any I/O.

A plan covers the rows of one batch, or of several batches end to end (a window). A chunk that several batches
need occurs in it once. The unit of work is the *piece*: the part of one row that lies in one chunk of one
array. Pieces are sorted by chunk, so that an engine decodes a chunk, copies its pieces and can drop it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hbx_gpu._source import ArrayLayout, RowTable, Source

_DECODED_IN_PARTS = {"bytes", "crc32c", "hbx_gpu.rowpack"}
_ROWS = 1 << 20  # rows of a dataset that are looked at together
INDEX_ROLE = 0
"""Role of the column-index array; role ``k + 1`` is the k-th layer."""


@dataclass(frozen=True, slots=True)
class SourceTable:
    """The Sources of a dataset as vectors, so that planning and decoding need no Python per Source.

    Attributes
    ----------
    n_roles
        Arrays per Source: the column indices (role 0), if it has them, and the layers. In the dataset's
        ChunkDirectory, the array of a role has the number ``source * n_roles + role - first_role``.
    chunk_base
        int64, (n_sources * n_roles + 1,). First global chunk number of each array.
    chunk_elements
        int64, (n_sources * n_roles,). Elements per chunk of each array.
    element_base
        int64, (n_sources * n_roles,). Elements of all chunks of all arrays before each array.
    remap
        int32. The distinct remaps of all Sources, end to end.
    remap_start, remap_length
        int64, (n_sources,). Each Source's part of `remap`.
    n_features
        Width of the output.
    drops
        True if any remap drops a column.
    repeats
        bool, (n_sources,). Whether columns may repeat within a row; see :class:`~hbx_gpu._source.Source`.
    identity
        bool, (n_sources,). Whether the Source's remap changes nothing.
    in_parts
        bool, (n_sources * n_roles,). Whether only what is needed of the chunks of each array is looked at.
    first_role
        Role of a Source's first array: `INDEX_ROLE`, or 1 where there are no column indices.
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
    in_parts: np.ndarray
    first_role: int = 0

    def roles(self, array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return source and role of each of the arrays `array`."""
        source, number = np.divmod(array, self.n_roles)
        return source, number + self.first_role


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
    elements, chunks, in_parts = [], [], []
    for source in sources:
        if source.index is None:
            raise ValueError(f"source {source.name!r} is dense: it has no column indices to plan over")
        for layout in (source.index, *(source.layers[name] for name in layers)):
            elements.append(layout.chunk_shape[0])
            chunks.append(-(-layout.shape[0] // layout.chunk_shape[0]))
            in_parts.append(_in_parts(layout))

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
        in_parts=np.array(in_parts, dtype=bool),
    )


def _in_parts(layout: ArrayLayout) -> bool:
    return {codec["name"] for codec in layout.codecs} <= _DECODED_IN_PARTS


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
        int64, (n_pieces,). For each piece: its output row; its first element inside the chunk, ascending
        within a chunk; its number of elements; the place of its first element in the output.
    share
        Part of the chunks that decoding looks at, 0 to 1; about, as chunks differ in bytes.
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
    share: float = 1.0

    @property
    def n_rows(self) -> int:
        return len(self.source)

    @property
    def n_elements(self) -> int:
        return int(self.offsets[-1])


def plan_rows(table: SourceTable, rows: RowTable, selection: np.ndarray) -> BatchPlan:
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
    places = rows.at(selection)
    source, start = places.source, places.start
    length = np.where(source >= 0, places.length, 0).astype(np.int64)
    offsets = np.zeros(len(selection) + 1, dtype=np.int64)
    np.cumsum(length, out=offsets[1:])

    filled = np.flatnonzero(length)  # empty rows have no pieces
    group = source[filled].astype(np.int64)
    # Sort rows by their place in storage; their pieces are then sorted too, with rare exceptions.
    by_place = np.argsort(table.element_base[group * table.n_roles] + start[filled], kind="stable")
    filled, group = filled[by_place], group[by_place]
    begin = start[filled]
    end = begin + length[filled]
    cuts: dict[bytes, tuple[np.ndarray, ...]] = {}
    arrays, chunks, pieces = [], [], []
    for role in range(table.n_roles):
        elements = table.chunk_elements[role :: table.n_roles]
        if (key := elements.tobytes()) not in cuts:  # most arrays are chunked alike
            cuts[key] = _cut(elements, group, begin, end)
        entry, first, skip, count, behind = cuts[key]
        arrays.append(group[entry] * table.n_roles + role)
        chunks.append(table.chunk_base[arrays[-1]] + first)
        row = filled[entry]
        pieces.append((row, skip, count, offsets[row] + behind))
    array, chunk = np.concatenate(arrays), np.concatenate(chunks)
    row, skip, count, out = (np.concatenate(parts) for parts in zip(*pieces, strict=True))
    if len(group) and group[0] != group[-1]:  # array after array
        order = np.argsort(array, kind="stable")
        array, chunk = array[order], chunk[order]
        row, skip, count, out = row[order], skip[order], count[order], out[order]
    head = np.flatnonzero(np.diff(chunk, prepend=-1))
    share = 1.0
    if len(head):
        taken = np.add.reduceat(count, head) / table.chunk_elements[array[head]]
        share = float(np.where(table.in_parts[array[head]], np.minimum(taken, 1), 1).mean())
    return BatchPlan(
        source=source,
        offsets=offsets,
        chunks=chunk[head],
        chunk_array=array[head],
        piece_ptr=np.append(head, len(chunk)),
        piece_row=row,
        piece_skip=skip,
        piece_count=count,
        piece_out=out,
        share=share,
    )


def _cut(
    elements: np.ndarray, group: np.ndarray, begin: np.ndarray, end: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Cut segments into pieces at the borders of chunks.

    Parameters
    ----------
    elements
        Elements per chunk of each Source.
    group, begin, end
        Source, first element and end of each segment, sorted by place in storage.

    Returns
    -------
    entry, first, skip, count, behind
        For each piece, sorted by place in storage: its segment, the number of its chunk in the array, its
        first element in the chunk, its number of elements, and the elements of the segment before it.
    """
    size = elements[group]
    first = begin // size
    n_pieces = (end - 1) // size - first + 1
    entry = np.repeat(np.arange(len(group)), n_pieces)
    if len(entry) > len(group):
        step = np.arange(len(entry)) - np.repeat(np.cumsum(n_pieces) - n_pieces, n_pieces)
        group, begin, end, size = group[entry], begin[entry], end[entry], size[entry]
        first = first[entry] + step
    chunk_begin = first * size
    piece_begin = np.maximum(begin, chunk_begin)
    count = np.minimum(end, chunk_begin + size) - piece_begin
    parts: tuple[np.ndarray, ...] = (entry, first, piece_begin - chunk_begin, count, piece_begin - begin)
    # Segments that overlap have pieces out of order.
    moved = (np.diff(group) == 0) & (np.diff(piece_begin) < 0)
    if moved.any():
        order = np.lexsort((piece_begin, group))
        parts = tuple(part[order] for part in parts)
    return parts


def needed_chunks(table: SourceTable, rows: RowTable) -> np.ndarray:
    """Chunks that any row needs.

    Returns
    -------
    ndarray
        int64, (k,). Global chunk numbers. Chunks of column indices come next to the chunks of their values,
        so that the first chunks of the list, however many, serve whole rows.
    """
    n_chunks = int(table.chunk_base[-1])
    change = np.zeros(n_chunks + 1, np.int64)
    for begin in range(0, len(rows), _ROWS):
        part = rows.slice(begin, begin + _ROWS)
        filled = (part.source >= 0) & (part.length > 0)
        source = part.source[filled].astype(np.int64)
        start, length = part.start[filled], part.length[filled]
        for role in range(table.n_roles):
            array = source * table.n_roles + role
            first = table.chunk_base[array] + start // table.chunk_elements[array]
            last = table.chunk_base[array] + (start + length - 1) // table.chunk_elements[array]
            change += np.bincount(first, minlength=n_chunks + 1)
            change -= np.bincount(last + 1, minlength=n_chunks + 1)
    chunks = np.flatnonzero(np.cumsum(change[:-1]))
    array = np.searchsorted(table.chunk_base, chunks, "right") - 1
    element = (chunks - table.chunk_base[array]) * table.chunk_elements[array]
    return chunks[np.lexsort((array, element, array // table.n_roles))]
