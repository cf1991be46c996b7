"""What bitpacking, gather, densify and compact should do, in NumPy, and launches of them. NumPy only."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from hbx_gpu._codecs.bitpacking_format import BLOCK
from hbx_gpu._engine.device.launches import TILE_SLACK
from hbx_gpu._engine.device.records import ELEMENT_TYPES, OUTPUT, PACKED, PLAIN, SOURCE

BAD_RECORD, BAD_WIDTH, TRUNCATED, BAD_PATCH, BAD_COLUMN, BAD_HEADER, BAD_PLACE = (1 << k for k in range(7))
"""Status bits of kernels/hbx.cuh."""
CANARY = 0xA7
"""Byte that memory holds before a kernel runs, and must still hold where it may not write."""


# --- homeobox.bitpacking ----------------------------------------------------------------------------------


def packed_blocks(n_words: int, element_size: int) -> int:
    """Packed blocks of a chunk: those of the high halves of 8-byte words count too."""
    return -(-n_words // BLOCK) * (element_size // 4)


def bitpacking_shared(max_blocks: int, stage_bytes: int) -> int:
    """Bytes of dynamic shared memory that the decoders ask for.

    The chunk lies in the first stage_bytes, rounded down to 16; behind it 4 bytes per packed block hold sums
    and 4 the place of the width byte.
    """
    return stage_bytes + 8 * max_blocks


def pack_arena(
    chunks: Sequence[bytes], words: Sequence[int], element_size: int, *, offset: int = 0, tail: int = 16
) -> tuple[np.ndarray, np.ndarray]:
    """An arena: room for the words of all chunks, then each chunk `offset` bytes behind a multiple of 16.

    The last chunk ends `tail` bytes before the arena does. Returns (arena, jobs), jobs wanting all words.
    """
    jobs = np.zeros(len(chunks), PACKED)
    at = 0
    for job, n in zip(jobs, words, strict=True):
        job["out"], job["n_words"], job["last_word"] = at + 8, n, n  # 8 bytes of canary in front
        at += 8 + -(-n * element_size // 8) * 8
    for job, chunk in zip(jobs, chunks, strict=True):
        at = -(-at // 16) * 16 + offset
        job["data"], job["nbytes"] = at, len(chunk)
        at += len(chunk)
    arena = np.full(at + tail, CANARY, np.uint8)
    for job, chunk in zip(jobs, chunks, strict=True):
        arena[int(job["data"]) :][: len(chunk)] = np.frombuffer(chunk, np.uint8)
    return arena, jobs


def decode_packed(
    launcher: Any,
    arena: np.ndarray,
    jobs: np.ndarray,
    element_size: int,
    *,
    stage_bytes: int = 1 << 15,
    max_blocks: int | None = None,
    grid: int | None = None,
    block: int = 64,
) -> tuple[np.ndarray, int]:
    """Run the decoder over `arena` in place; (status per job, any)."""
    if max_blocks is None:
        max_blocks = max((packed_blocks(int(n), element_size) for n in jobs["n_words"]), default=0)
    status, flag = np.zeros(len(jobs), np.uint32), np.zeros(1, np.uint32)
    launcher.run(
        f"bitpacking_decode_u{8 * element_size}",
        grid or max(1, len(jobs)),
        block,
        [
            arena,
            np.uint64(arena.nbytes),
            jobs,
            np.uint32(len(jobs)),
            np.uint32(max_blocks),
            np.uint32(stage_bytes),
            status,
            flag,
        ],
        bitpacking_shared(max_blocks, stage_bytes),
    )
    return status, int(flag[0])


def packed_words(arena: np.ndarray, job: np.void, element_size: int) -> np.ndarray:
    """The words of a job that the kernel was to write."""
    out, first, last = (int(job[key]) for key in ("out", "first_word", "last_word"))
    words = arena[out + first * element_size : out + last * element_size]
    return words.view(f"<u{element_size}")


# --- gather -----------------------------------------------------------------------------------------------


def source_records(remaps: Sequence[np.ndarray], identities: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
    """(sources, one table of all remaps)."""
    sources = np.zeros(len(remaps), SOURCE)
    sources["remap_length"] = [len(remap) for remap in remaps]
    sources["remap_start"] = np.cumsum(sources["remap_length"]) - sources["remap_length"]
    sources["identity"] = identities
    return sources, np.concatenate([*remaps, np.empty(0, np.int32)]).astype(np.int32)


def plain_arena(
    arrays: Sequence[np.ndarray], *, gap: int = 0, tail: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """An arena with the bytes of each array, `gap` elements behind a multiple of 16; (arena, records).

    Records have data, count and type; the rest is for the caller.
    """
    records = np.zeros(len(arrays), PLAIN)
    at = 0
    for record, array in zip(records, arrays, strict=True):
        at = -(-at // 16) * 16 + gap * array.itemsize
        record["data"], record["count"] = at, len(array)
        record["type"] = ELEMENT_TYPES[array.dtype.name]
        at += array.nbytes
    arena = np.full(at + tail, CANARY, np.uint8)
    for record, array in zip(records, arrays, strict=True):
        arena[int(record["data"]) :][: array.nbytes] = array.view(np.uint8)
    return arena, records


def run_gather(
    launcher: Any,
    arena: np.ndarray,
    pieces: np.ndarray,
    sources: np.ndarray,
    remap: np.ndarray,
    outputs: Sequence[np.ndarray],
    *,
    records: np.ndarray | None = None,
    grid: int = 2,
    block: int = 64,
) -> tuple[np.ndarray, int]:
    """Run `gather_pieces` into `outputs` in place; (status per piece, any). `records`: other than theirs."""
    if records is None:
        records = output_records(launcher, outputs)
    status, flag = np.zeros(len(pieces), np.uint32), np.zeros(1, np.uint32)
    launcher.run(
        "gather_pieces",
        grid,
        block,
        [
            arena,
            np.uint64(arena.nbytes),
            pieces,
            np.uint32(len(pieces)),
            sources,
            np.uint32(len(sources)),
            remap,
            np.uint64(len(remap)),
            records,
            np.uint32(len(records)),
            status,
            flag,
        ],
    )
    return status, int(flag[0])


def output_records(launcher: Any, outputs: Sequence[np.ndarray]) -> np.ndarray:
    """HbxOutput of each array."""
    records = np.zeros(len(outputs), OUTPUT)
    for record, output in zip(records, outputs, strict=True):
        record["address"] = launcher.address(output)
        record["elements"], record["type"] = len(output), ELEMENT_TYPES[output.dtype.name]
    return records


def converts(source: np.dtype, target: np.dtype) -> bool:
    """Whether gather converts so; what it refuses, no result type of NumPy ever asks for."""
    if source == target:
        return True
    if target.kind in "iu":
        return source.kind in "iu"
    return (source, target) != (np.dtype(np.float64), np.dtype(np.float16))


# --- densify ----------------------------------------------------------------------------------------------


def bfloat16_bits(x: np.ndarray) -> np.ndarray:
    """Nearest bfloat16 of float32, ties to even, as uint16."""
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16)


def float16_bits(x: np.ndarray) -> np.ndarray:
    """Nearest float16 of float32, ties to even, as uint16; a NaN keeps its sign only."""
    x = np.asarray(x, np.float32)
    with np.errstate(over="ignore"):
        bits = x.astype(np.float16).view(np.uint16)
    return np.where(np.isnan(x), 0x7E00 | np.signbit(x) * 0x8000, bits).astype(np.uint16)


def dense_reference(
    indices: np.ndarray,
    values: np.ndarray,
    offsets: np.ndarray,
    n_features: int,
    *,
    target_sum: float = 0.0,
    log: bool = False,
    dtype: str = "float32",
) -> np.ndarray:
    """Dense rows of CSR; columns of -1 are dropped, others must fit. 16-bit floats come as uint16."""
    number = np.float64 if dtype == "float64" else np.float32
    out = np.zeros((len(offsets) - 1, n_features), number)
    for row, (begin, end) in enumerate(itertools.pairwise(offsets)):
        kept = indices[begin:end] != -1
        counts = values[begin:end][kept]
        total = counts.sum(dtype=np.float64)
        scale = target_sum / total if target_sum > 0 and total > 0 else 1.0
        scaled = counts.astype(number) if scale == 1.0 else (counts * np.float64(scale)).astype(number)
        np.add.at(out[row], indices[begin:end][kept], scaled)
    if log:
        with np.errstate(all="ignore"):
            out = np.log1p(out.astype(np.float64)).astype(number)
    return {"float16": float16_bits, "bfloat16": bfloat16_bits}.get(dtype, np.asarray)(out)


DENSE = {
    "float32": "densify_f32",
    "float16": "densify_f16",
    "bfloat16": "densify_bf16",
    "float64": "densify_f64",
}
"""Kernel of each dtype."""


def run_densify(
    launcher: Any,
    indices: np.ndarray,
    values: np.ndarray,
    offsets: np.ndarray,
    n_features: int,
    *,
    target_sum: float = 0.0,
    log: bool = False,
    dtype: str = "float32",
    tile: int | None = None,
    grid: int = 2,
    block: int = 64,
    value_type: int | None = None,
) -> tuple[np.ndarray, np.ndarray, int]:
    """(rows, status per row, any); rows stand between canaries, which are checked."""
    n_rows = len(offsets) - 1
    stored = np.dtype(np.uint16 if dtype in ("float16", "bfloat16") else dtype)
    room = np.full(16 + n_rows * n_features * stored.itemsize + 16, CANARY, np.uint8)
    status, flag = np.zeros(n_rows, np.uint32), np.zeros(1, np.uint32)
    tile = n_features if tile is None else tile
    launcher.run(
        DENSE[dtype],
        grid,
        block,
        [
            indices,
            values,
            np.uint32(ELEMENT_TYPES[values.dtype.name] if value_type is None else value_type),
            np.uint64(len(indices)),
            offsets.astype(np.int64),
            np.uint32(n_rows),
            np.uint64(launcher.address(room) + 16),
            np.uint32(n_features),
            np.uint32(tile),
            np.float64(target_sum),
            np.uint32(log),
            status,
            flag,
        ],
        tile * (8 if dtype == "float64" else 4) + TILE_SLACK,
    )
    assert (np.concatenate([room[:16], room[-16:]]) == CANARY).all(), "written outside the output"
    return room[16:-16].view(stored).reshape(n_rows, n_features), status, int(flag[0])


# --- compact ----------------------------------------------------------------------------------------------


def compact(
    launcher: Any, indices: np.ndarray, values: Sequence[np.ndarray], offsets: np.ndarray, *, block: int = 64
) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """All three launches: (indices, layers, offsets) of kept elements. Canaries behind them are checked."""
    n_rows = len(offsets) - 1
    kept, offsets_out = np.full(n_rows, -7, np.int64), np.full(n_rows + 1, -7, np.int64)
    common = [indices, np.uint64(len(indices)), offsets, np.uint32(n_rows)]
    launcher.run("count_kept", 3, block, [*common, kept])
    launcher.run("scan_kept", 1, 256, [kept, np.uint32(n_rows), offsets_out])
    indices_out = np.full(len(indices), -7, np.int32)
    layers = []
    for k, layer in enumerate(values):
        out = np.frombuffer(bytes([CANARY]) * layer.nbytes, layer.dtype).copy()
        launcher.run(
            "compact_rows",
            3,
            block,
            [
                indices,
                offsets,
                np.uint32(n_rows),
                np.uint64(len(indices)),
                offsets_out,
                indices_out if k == 0 else None,
                layer,
                out,
                np.uint32(layer.itemsize),
                np.uint64(len(out)),
            ],
        )
        layers.append(out)
    total = int(offsets_out[-1])
    assert (indices_out[total:] == -7).all(), "indices written behind the last kept element"
    for out in layers:
        assert (out[total:].view(np.uint8) == CANARY).all(), "values written behind the last kept element"
    return indices_out[:total], [out[:total] for out in layers], offsets_out


# --- sort -------------------------------------------------------------------------------------------------


def sort_rows(
    launcher: Any,
    indices: np.ndarray,
    values: np.ndarray,
    offsets: np.ndarray,
    n_features: int,
    tile_words: int,
    *,
    block: int = 64,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """(indices, values, offsets, unsorted) of kept elements. Canaries behind them are checked."""
    n_rows = len(offsets) - 1
    kept, ends = np.full(n_rows, -7, np.int64), np.full(n_rows + 1, -7, np.int64)
    launcher.run("count_kept", 3, block, [indices, np.uint64(len(indices)), offsets, np.uint32(n_rows), kept])
    launcher.run("scan_kept", 1, 256, [kept, np.uint32(n_rows), ends])
    columns = np.full(len(indices), -7, np.int64)
    out = np.frombuffer(bytes([CANARY]) * values.nbytes, values.dtype).copy()
    unsorted = np.zeros(1, np.uint32)
    launcher.run(
        "sort_rows",
        3,
        block,
        [
            indices,
            offsets,
            np.uint32(n_rows),
            np.uint64(len(indices)),
            ends,
            columns,
            values,
            out,
            np.uint32(values.itemsize),
            np.uint64(len(out)),
            np.uint32(n_features),
            np.uint32(tile_words),
            unsorted,
        ],
        8 * tile_words,
    )
    total = int(ends[-1])
    assert (columns[total:] == -7).all(), "indices written behind the last kept element"
    assert (out[total:].view(np.uint8) == CANARY).all(), "values written behind the last kept element"
    return columns[:total], out[:total], ends, int(unsorted[0])
