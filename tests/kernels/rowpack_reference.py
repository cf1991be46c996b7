"""What the rowpack kernels should do, in NumPy over the same records, and launches of them. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from hbx_gpu._codecs import rowpack, rowpack_format
from hbx_gpu._codecs.rowpack_format import BLOCK, RECORD_BLOCKS, Block, ChunkHeader
from hbx_gpu._engine.device.launches import TILE_SLACK
from hbx_gpu._engine.device.records import ELEMENT_TYPES, OUTPUT, PIECE, RUN, SEGMENT, SOURCE
from hbx_gpu.errors import CorruptChunkError

BAD_RECORD, BAD_WIDTH, TRUNCATED, BAD_PATCH, BAD_COLUMN, BAD_HEADER, BAD_PLACE = (1 << k for k in range(7))
"""Status bits of kernels/hbx.cuh."""
CANARY = 0xA7
"""Byte that memory holds before a kernel runs, and must still hold where it may not write."""


@dataclass
class Batch:
    """Records and staged bytes of a batch, as kernels take them."""

    arena: np.ndarray
    runs: np.ndarray
    pieces: np.ndarray
    sources: np.ndarray
    remap: np.ndarray
    segments: np.ndarray = field(default_factory=lambda: np.zeros(0, SEGMENT))
    row_ptr: np.ndarray = field(default_factory=lambda: np.zeros(1, np.uint32))

    def copy(self) -> Batch:
        """A batch that may be damaged without touching this one."""
        parts = {name: getattr(self, name).copy() for name in self.__dataclass_fields__}
        return replace(self, **parts)


# --- staging ----------------------------------------------------------------------------------------------


class Stage:
    """Collects runs and the bytes they point at; every area is followed by canary bytes but the last one."""

    def __init__(self) -> None:
        self.parts: list[tuple[int, bytes]] = []
        self.end = 0
        self.runs: list[np.ndarray] = []

    def add(self, chunk: bytes, first: int = 0, last: int | None = None) -> int:
        """Stage blocks [first, last) of a chunk, all of them by default; returns the number of the run."""
        data, head = np.frombuffer(chunk, np.uint8), rowpack_format.read_header(chunk, check=False)
        whole = last is None
        last = head.n_blocks if last is None else last
        run = np.zeros((), RUN)
        for name in ("minimum", "n", "element_size", "transform", "base_bytes"):
            run[name] = getattr(head, name)
        r0, r1 = first // RECORD_BLOCKS, -(-last // RECORD_BLOCKS)
        payload, payload_end = head.payload_start, head.patch_start
        patch, patch_end = head.patch_start, head.patch_end
        if not whole:
            begin, end = rowpack.look_up(data, head, first), rowpack.look_up(data, head, last - 1)
            payload, patch = begin.payload_at, begin.patch_at
            payload_end, patch_end = end.payload_at + 16 * end.width, end.patch_at + end.patch_bytes
        records = rowpack_format.HEADER.size + np.array([r0, r1]) * head.record_bytes
        run["first_record"], run["n_records"] = r0, r1 - r0
        run["payload_begin"], run["payload_units"] = (
            (payload - head.payload_start) // 16,
            (payload_end - payload) // 16,
        )
        run["patch_begin"], run["patch_bytes"] = patch - head.patch_start, patch_end - patch
        run["records"] = self._place(chunk[records[0] : records[1]], 8)
        run["payload"] = self._place(chunk[payload : payload + 16 * int(run["payload_units"])], 16)
        run["patches"] = self._place(chunk[patch:patch_end], 1)
        self.runs.append(run)
        return len(self.runs) - 1

    def _place(self, content: bytes, alignment: int) -> int:
        at = -(-(self.end + 3) // alignment) * alignment
        self.parts.append((at, content))
        self.end = at + len(content)
        return at

    def arena(self) -> np.ndarray:
        """The staged bytes, 16-byte aligned; they end where the last area does."""
        arena = aligned(self.end)
        for at, content in self.parts:
            arena[at : at + len(content)] = np.frombuffer(content, np.uint8)
        return arena


def aligned(nbytes: int, shift: int = 0) -> np.ndarray:
    """Canary bytes, the first one `shift` behind a multiple of 16."""
    backing = np.full(nbytes + 32, CANARY, np.uint8)
    begin = -backing.ctypes.data % 16 + shift
    return backing[begin : begin + nbytes]


def records(dtype: np.dtype, rows: Sequence[Any]) -> np.ndarray:
    """A table of records from scalars of their dtype."""
    return np.array(rows, dtype) if len(rows) else np.zeros(0, dtype)


def piece(run: int, skip: int, count: int, *, out: int = 0, role: int = 0, source: int = 0) -> np.ndarray:
    """One HbxPiece."""
    return np.array((out, run, skip, count, source, role, 0), PIECE)


def remap_tables(
    remaps: Sequence[np.ndarray], identity: Sequence[bool] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(sources, remap) of HbxSource and int32, one Source per remap; `identity` is found out if None."""
    sources = np.zeros(len(remaps), SOURCE)
    sources["remap_length"] = [len(r) for r in remaps]
    sources["remap_start"] = np.cumsum(sources["remap_length"]) - sources["remap_length"]
    sources["identity"] = (
        [np.array_equal(r, np.arange(len(r))) for r in remaps] if identity is None else identity
    )
    return sources, np.concatenate([*remaps, np.empty(0, np.int32)]).astype(np.int32)


def csr_batch(
    rows: Sequence[np.ndarray],
    counts: Sequence[np.ndarray],
    *,
    chunk: int = 256,
    order: Sequence[int] | None = None,
    remaps: Sequence[np.ndarray],
    row_source: Sequence[int] | None = None,
    partial: bool = False,
) -> Batch:
    """A batch of the rows `order` (all by default) of one CSR matrix, in rowpack chunks of `chunk` values.

    `partial` stages a run per piece, with just the blocks it needs, in place of whole chunks. The matrix's
    last chunk is padded with zeros, as in zarr. Indices are packed as gaps, counts as they are; role 1 holds
    counts.
    """
    bounds = np.concatenate([[0], np.cumsum([len(r) for r in rows])])
    stage, encoded, whole = Stage(), [], []
    for parts, transform in ((rows, "gaps"), (counts, "none")):
        flat = np.concatenate(parts)
        flat = np.concatenate([flat, np.zeros(-len(flat) % chunk, flat.dtype)]).reshape(-1, chunk)
        encoded.append([rowpack.encode_rowpack(np.ascontiguousarray(c), transform) for c in flat])
    if not partial:
        whole = [[stage.add(c) for c in chunks] for chunks in encoded]
    pieces: list[np.ndarray] = []
    segments: list[np.ndarray] = []
    row_ptr, out = [0], 0
    for row in range(len(rows)) if order is None else order:
        at, end = bounds[row], bounds[row + 1]
        while at < end:
            c, skip = divmod(int(at), chunk)
            count = int(min(end, (c + 1) * chunk) - at)
            for role in (0, 1):
                blocks = skip // BLOCK, -(-(skip + count) // BLOCK)
                run = stage.add(encoded[role][c], *blocks) if partial else whole[role][c]
                source = 0 if row_source is None else row_source[row]
                pieces.append(piece(run, skip, count, out=out, role=role, source=source))
            segments.append(np.array((len(pieces) - 2, len(pieces) - 1, skip, skip, count, 0), SEGMENT))
            at, out = at + count, out + count
        row_ptr.append(len(segments))
    sources, remap = remap_tables(remaps)
    return Batch(
        arena=stage.arena(),
        runs=records(RUN, stage.runs),
        pieces=records(PIECE, pieces),
        sources=sources,
        remap=remap,
        segments=records(SEGMENT, segments),
        row_ptr=np.array(row_ptr, np.uint32),
    )


# --- reference --------------------------------------------------------------------------------------------


class BadBlock(Exception):
    """A block or record that must be refused; holds the status bits."""

    def __init__(self, bits: int) -> None:
        super().__init__(f"status {bits}")
        self.bits = bits


def check_run(batch: Batch, number: int, skip: int, count: int) -> np.void:
    """The run, if values [skip, skip + count) can be looked up in it."""
    if number >= len(batch.runs):
        raise BadBlock(BAD_RECORD)
    run, room = batch.runs[number], batch.arena.nbytes
    size, base, gaps = int(run["element_size"]), int(run["base_bytes"]), int(run["transform"])
    sizes = rowpack_format.ELEMENT_SIZES
    good = size in sizes and gaps in (0, 1) and (base in sizes and base <= size if gaps else base == 0)
    good = good and run["records"] % 8 == 0 and run["payload"] % 16 == 0
    for name, length in (
        ("records", int(run["n_records"]) * rowpack_format.record_bytes(gaps, base)),
        ("payload", 16 * int(run["payload_units"])),
        ("patches", int(run["patch_bytes"])),
    ):
        good = good and int(run[name]) + length <= room
    first = int(run["first_record"])
    staged = range(first, first + int(run["n_records"]))
    good = good and skip + count <= run["n"]
    if not good or skip // 1024 not in staged or (skip + count - 1) // 1024 not in staged:
        raise BadBlock(BAD_RECORD)
    result: np.void = run
    return result


def decode_block(batch: Batch, run: np.void, b: int) -> np.ndarray:
    """The 128 values of block b, uint64, as its run and the arena have them."""
    size, base_bytes, gaps = int(run["element_size"]), int(run["base_bytes"]), int(run["transform"])
    length = rowpack_format.record_bytes(gaps, base_bytes)
    at = int(run["records"]) + (b // RECORD_BLOCKS - int(run["first_record"])) * length
    record = batch.arena[at : at + length]
    # Only element_size, transform, base_bytes and minimum are read.
    head = ChunkHeader(size, gaps, base_bytes, int(run["n"]), 0, int(run["minimum"]), 0)
    payload, patch = (int.from_bytes(record[4 * k : 4 * k + 4].tobytes(), "little") for k in (0, 1))
    block = list(rowpack.directory_entries(record, head, 16 * payload, patch, b % RECORD_BLOCKS + 1))[-1]
    payload_begin, patch_begin = 16 * int(run["payload_begin"]), int(run["patch_begin"])
    payload_end = payload_begin + 16 * int(run["payload_units"])
    bits = 0
    if block.width > 8 * size or (block.width == 8 * size and block.exceptions):
        bits |= BAD_WIDTH
    if not payload_begin <= block.payload_at <= payload_end - 16 * block.width:
        bits |= TRUNCATED
    if not patch_begin <= block.patch_at <= patch_begin + int(run["patch_bytes"]) - block.patch_bytes:
        bits |= TRUNCATED
    if bits:
        raise BadBlock(bits)
    placed = replace(
        block,
        payload_at=int(run["payload"]) + block.payload_at - payload_begin,
        patch_at=int(run["patches"]) + block.patch_at - patch_begin,
    )
    return _decode_placed(batch.arena, head, b, placed) & np.uint64(2 ** (8 * size) - 1)


def _decode_placed(arena: np.ndarray, head: ChunkHeader, b: int, block: Block) -> np.ndarray:
    try:
        with np.errstate(over="ignore"):
            return rowpack.decode_block(arena, head, b, block)
    except CorruptChunkError as error:
        raise BadBlock(BAD_PATCH) from error


def part_of_block(b: int, skip: int, count: int) -> slice:
    """Which of block b's values belong to [skip, skip + count)."""
    return slice(max(skip - b * BLOCK, 0), min(skip + count - b * BLOCK, BLOCK))


def blocks_of(skip: int, count: int) -> range:
    """Blocks that hold values [skip, skip + count)."""
    return range(skip // BLOCK, -(-(skip + count) // BLOCK))


@dataclass
class Columns:
    """A Source's features: how many, and their output columns; None: the same numbers."""

    length: int
    remap: np.ndarray | None

    def of(self, ids: np.ndarray) -> np.ndarray:
        """int64 output columns of stored column numbers below `length`."""
        columns = ids if self.remap is None else self.remap[ids.astype(np.int64)]
        return columns.astype(np.int64)


def source_columns(batch: Batch, number: int) -> Columns:
    """The features of a Source, if it and its remap lie in their tables."""
    if number >= len(batch.sources):
        raise BadBlock(BAD_PLACE)
    start, length, identity = batch.sources[number].tolist()
    if identity:
        return Columns(length, None)
    if start + length > len(batch.remap):
        raise BadBlock(BAD_PLACE)
    return Columns(length, batch.remap[start : start + length])


def to_columns(ids: np.ndarray, features: Columns) -> np.ndarray:
    """Output columns of stored column numbers."""
    if (ids >= np.uint64(features.length)).any():
        raise BadBlock(BAD_COLUMN)
    return features.of(ids)


def rowpack_csr(batch: Batch, outputs: Sequence[np.ndarray]) -> np.ndarray:
    """What the kernel writes to `outputs`; returns a status per piece."""
    status = np.zeros(len(batch.pieces), np.uint32)
    for p, record in enumerate(batch.pieces):
        try:
            _csr_piece(batch, record, outputs)
        except BadBlock as error:
            status[p] = error.bits
    return status


def _csr_piece(batch: Batch, record: np.void, outputs: Sequence[np.ndarray]) -> None:
    out, number, skip, count, source, role, _ = record.tolist()
    if count == 0:
        return
    if role >= len(outputs) or out + count > len(outputs[role]):
        raise BadBlock(BAD_PLACE)
    features = source_columns(batch, source) if role == 0 else None
    run = check_run(batch, number, skip, count)
    for b in blocks_of(skip, count):
        part = part_of_block(b, skip, count)
        values = decode_block(batch, run, b)[part]
        values = values if features is None else to_columns(values, features)
        to = out + b * BLOCK + part.start - skip
        with np.errstate(over="ignore"):
            outputs[role][to : to + len(values)] = values.astype(
                f"u{run['element_size']}" if role else np.int32
            )


def rowpack_sums(batch: Batch, n_features: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(sums of counts modulo 2^32 per row and column, totals per row, status per piece)."""
    n_rows = len(batch.row_ptr) - 1
    sums, totals = np.zeros((n_rows, n_features), np.uint32), np.zeros(n_rows, np.uint64)
    status = np.zeros(len(batch.pieces), np.uint32)
    for row in range(n_rows):
        for segment in batch.segments[batch.row_ptr[row] : batch.row_ptr[row + 1]]:
            totals[row] += np.uint64(_add_segment(batch, segment, sums[row], status))
    return sums, totals, status


def _add_segment(batch: Batch, segment: np.void, line: np.ndarray, status: np.ndarray) -> int:
    index_piece, value_piece, index_skip, value_skip, count, _ = segment.tolist()
    if count == 0:
        return 0
    roles = ((index_piece, index_skip), (value_piece, value_skip))
    runs: list[Any] = []
    for number, skip in roles:
        try:
            if number >= len(batch.pieces) or (index_skip - value_skip) % BLOCK:
                raise BadBlock(BAD_RECORD)
            runs.append(check_run(batch, int(batch.pieces["run"][number]), skip, count))
            if runs[-1]["element_size"] > 4:
                raise BadBlock(BAD_RECORD)
        except BadBlock as error:
            runs.append(None)
            if number < len(status):
                status[number] |= error.bits
    if runs[0] is None or runs[1] is None:
        return 0
    try:
        features = source_columns(batch, int(batch.pieces["source"][index_piece]))
    except BadBlock as error:
        status[index_piece] |= error.bits
        return 0
    total = 0
    for pair in zip(blocks_of(index_skip, count), blocks_of(value_skip, count), strict=True):
        found = []
        for (number, skip), run, b in zip(roles, runs, pair, strict=True):
            try:
                found.append(decode_block(batch, run, b)[part_of_block(b, skip, count)])
            except BadBlock as error:
                status[number] |= error.bits
        if len(found) < 2:
            continue
        good = found[0] < np.uint64(features.length)
        columns = features.of(found[0][good])
        inside = (columns >= 0) & (columns < len(line))
        if not good.all():
            status[index_piece] |= BAD_COLUMN
        if (~inside & (columns != -1)).any():
            status[index_piece] |= BAD_PLACE
        np.add.at(line, columns[inside], found[1][good][inside].astype(np.uint32))
        total += int(found[1][good][inside].sum())
    return total


def transformed(sums: np.ndarray, totals: np.ndarray, target_sum: float, log1p: bool) -> np.ndarray:
    """float32 values of dense rows."""
    if target_sum > 0:
        with np.errstate(divide="ignore"):
            scale = np.where(totals > 0, target_sum / totals.astype(np.float64), 1.0)
        x = (sums * scale[:, None]).astype(np.float32)
    else:
        x = sums.astype(np.float32)
    return np.log1p(x.astype(np.float64)).astype(np.float32) if log1p else x


def bfloat16_bits(x: np.ndarray) -> np.ndarray:
    """Nearest bfloat16 of float32, ties to even; no NaN."""
    bits = x.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def float16_bits(x: np.ndarray) -> np.ndarray:
    """Nearest float16 of float32, ties to even."""
    with np.errstate(over="ignore"):
        return x.astype(np.float16).view(np.uint16)


# --- launches ---------------------------------------------------------------------------------------------


def output_records(launcher: Any, outputs: Sequence[np.ndarray]) -> np.ndarray:
    """HbxOutput of each array."""
    table = np.zeros(len(outputs), OUTPUT)
    for record, array in zip(table, outputs, strict=True):
        record["address"], record["elements"] = launcher.address(array), len(array)
        record["type"] = ELEMENT_TYPES[array.dtype.name]
    return table


def _tables(batch: Batch) -> tuple[list[Any], list[Any]]:
    """The arguments that both kernels begin with, and those about Sources."""
    first = [batch.arena, np.uint64(batch.arena.nbytes)]
    for table in (batch.runs, batch.pieces):
        first += [table, np.uint32(len(table))]
    return first, [batch.sources, np.uint32(len(batch.sources)), batch.remap, np.uint64(len(batch.remap))]


def run_csr(
    launcher: Any,
    batch: Batch,
    outputs: Sequence[np.ndarray],
    *,
    table: np.ndarray | None = None,
    grid: int = 2,
    block: int = 64,
) -> tuple[np.ndarray, int]:
    """Run `rowpack_csr` into `outputs` in place; (status per piece, any)."""
    table = output_records(launcher, outputs) if table is None else table
    status, flag = np.zeros(len(batch.pieces), np.uint32), np.zeros(1, np.uint32)
    first, sources = _tables(batch)
    launcher.run("rowpack_csr", grid, block, [*first, *sources, table, np.uint32(len(table)), status, flag])
    return status, int(flag[0])


def run_dense(
    launcher: Any,
    batch: Batch,
    n_features: int,
    *,
    kind: str = "f32",
    tile: int | None = None,
    target_sum: float = 0.0,
    log1p: bool = False,
    shift: int = 0,
    grid: int = 2,
    block: int = 64,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Run `rowpack_dense_*`; (rows, status per piece, any). Rows are float32, or bits in uint16.

    The output begins `shift` elements behind a multiple of 16 bytes, between canaries that must survive.
    """
    dtype = np.dtype(np.float32 if kind == "f32" else np.uint16)
    n_rows, tile = len(batch.row_ptr) - 1, n_features if tile is None else tile
    edge = 16 // dtype.itemsize
    memory = aligned((n_rows * n_features + shift + 2 * edge) * dtype.itemsize).view(dtype)
    address = np.uint64(launcher.address(memory) + (edge + shift) * dtype.itemsize)
    status, flag = np.zeros(len(batch.pieces), np.uint32), np.zeros(1, np.uint32)
    first, sources = _tables(batch)
    args = [
        *first,
        batch.segments,
        np.uint32(len(batch.segments)),
        batch.row_ptr,
        np.uint32(n_rows),
        *sources,
    ]
    args += [
        address,
        np.uint32(n_features),
        np.uint32(tile),
        np.float64(target_sum),
        np.uint32(log1p),
        status,
        flag,
    ]
    launcher.run(f"rowpack_dense_{kind}", grid, block, args, 4 * tile + TILE_SLACK)
    rows = memory[edge + shift : edge + shift + n_rows * n_features]
    outside = np.concatenate([memory[: edge + shift], memory[edge + shift + rows.size :]])
    assert (outside.view(np.uint8) == CANARY).all(), "written outside the output"
    return rows.reshape(n_rows, n_features), status, int(flag[0])
