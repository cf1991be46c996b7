"""Batches of the models that sample genes: memory for a batch, then the kernels of `sampled`."""

from __future__ import annotations

from functools import cache

import numpy as np

from hbx_gpu._buffers import POOL
from hbx_gpu.tokens import _arithmetic as a
from hbx_gpu.tokens._by_row import FLOATS, PADDED
from hbx_gpu.tokens._cells import Cells, Options
from hbx_gpu.tokens._compile import Compiled
from hbx_gpu.tokens._host import sampled, sorting, weighted
from hbx_gpu.tokens._host.bits import SPARE
from hbx_gpu.tokens._host.known import Known
from hbx_gpu.tokens._lower_sampled import Prompt, Ranked, Weighted
from hbx_gpu.tokens._reference_sampled import shared_genes

IDS = ("input_ids", "labels", "task_ids", "metadata_ids", "metadata_labels")


def sentences(compiled: Compiled, cells: Cells, options: Options) -> dict[str, np.ndarray]:
    """Outputs of :class:`Weighted`, :class:`Ranked` and :class:`Prompt`."""
    known = Known(compiled, cells)
    program = compiled.program
    if isinstance(program, Weighted):
        made, lengths = _weighted(program, cells, known)
    elif isinstance(program, Ranked):
        made, lengths = _ranked(compiled, program, cells, known)
    else:
        assert isinstance(program, Prompt)
        made, lengths = _prompt(compiled, program, cells, known)
    return {"lengths": lengths, **_handed_out(program, made, lengths, options)}


@cache
def _logs() -> np.ndarray:
    """float64. Logarithms of small counts."""
    return a.log1p(np.arange(sampled.SMALL, dtype=np.float64))


@cache
def _weights() -> np.ndarray:
    """uint64. The same as weights, in whole multiples of 2**-32."""
    return np.rint(_logs() * sampled.FIXED).astype(np.uint64)


@cache
def _logs_of_depths() -> np.ndarray:
    """float32. Logarithms of whole numbers up to which most cells are sequenced."""
    return a.log1p(np.arange(2**15, dtype=np.float64)).astype(np.float32)


def _scratch(room: int) -> tuple[np.ndarray, ...]:
    """Keys three times, a histogram, and two lists of positions, for rows of up to `room` genes."""
    return (
        *(np.empty(room, np.uint64) for _ in range(3)),
        np.empty(sorting.HISTOGRAM, np.uint32),
        *(np.empty(room, np.uint32) for _ in range(2)),
    )


def _weighted(program: Weighted, cells: Cells, known: Known) -> tuple[dict[str, np.ndarray], np.ndarray]:
    n, n_known = len(cells), len(program.tokens)
    room = max(known.longest, program.samples, len(program.codes), weighted.GUIDE) + SPARE
    key, key_2, key_3, histogram, item, guide = _scratch(room)
    ids, lengths = POOL.empty((n, program.length), np.int32), np.empty(n, np.int32)
    weighted.weighted_rows(
        known.pointers, known.genes, known.counts, cells.numbers, np.uint64(cells.seed),
        np.uint64(cells.epoch), program.samples, program.cls, program.close, program.offset,
        program.codes, program.bounds, program.turn, program.tokens, _weights(),
        np.arange(program.samples, dtype=np.uint32), key, key_2, key_3, histogram, item,
        np.empty(room, np.uint64), guide, np.zeros(n_known, np.uint32),
        np.zeros(-(-n_known // 64), np.uint64), np.empty((2, len(program.codes)), np.int64), ids, lengths,
    )  # fmt: skip
    return {"input_ids": ids}, lengths


def _ranked(
    compiled: Compiled, program: Ranked, cells: Cells, known: Known
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    n, tables = len(cells), compiled.tables
    n_tasks = sum(program.tasks)
    made = {
        "input_ids": POOL.empty((n, program.length), np.int64),
        "values": POOL.empty((n, program.length), np.float32),
        "task_ids": POOL.empty((n, n_tasks), np.int64),
        "task_values": POOL.empty((n, n_tasks), np.float32),
        "totals": np.empty(n, np.float32),
    }
    shared = shared_genes(program, cells.seed, cells.epoch, cells.batch)
    owner = np.full(max(program.n_ids, int(tables.token.max()) + 1), -1, np.int64)
    owner[tables.token[tables.known]] = tables.known
    room = max(known.longest, len(tables.known), program.length, *program.tasks, sampled.FEW) + SPARE
    key, key_2, key_3, histogram, item, index = _scratch(room)
    keys, columns = np.empty((2, room), np.uint64), np.empty((2, room), np.uint32)
    sampled.ranked_rows(
        known.pointers, known.genes, known.counts, cells.numbers, np.uint64(cells.seed),
        np.uint64(cells.epoch), program.logged, program.cls_column, program.tasks[0], program.tasks[1],
        program.count_one_absent, shared, owner[shared], tables.token, tables.index, tables.known,
        tables.index[tables.known], keys, columns,
        _logs().astype(np.float32), np.arange(room, dtype=np.uint32), key, key_2, key_3,
        np.empty(room, np.uint64), histogram, item, index, np.zeros(compiled.n_features, np.float32),
        np.zeros(compiled.n_features, np.uint8), *made.values(),
    )  # fmt: skip
    return made, np.full(n, program.length, np.int32)


def _prompt(
    compiled: Compiled, program: Prompt, cells: Cells, known: Known
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    n, tables, m = len(cells), compiled.tables, len(program.metadata_masks)
    shape = (n, program.length)
    made = {
        "input_ids": POOL.empty(shape, np.int64),
        "values": POOL.empty(shape, np.float32),
        "query_mask": POOL.empty(shape, np.float32),
        "total_counts": POOL.empty(shape, np.float32),
        "prompt_mask": POOL.empty(shape, np.bool_),
        "labels": POOL.empty(shape, np.int64),
        "metadata_ids": np.empty((n, m), np.int64),
        "metadata_labels": np.empty((n, m), np.int64),
        "metadata_mask": np.empty((n, m), np.bool_),
        "label_weights": POOL.empty(shape, np.float32),
    }
    room = max(len(tables.known), program.length, sampled.FEW) + SPARE
    key, key_2, key_3, histogram, item, index = _scratch(room)
    sampled.prompt_rows(
        known.pointers, known.genes, known.counts, known.totals, cells.numbers, np.uint64(cells.seed),
        np.uint64(cells.epoch), np.array(program.metadata_masks, np.int64), program.thinned,
        program.min_umis, program.max_umis, program.prefix, program.prefix_sums, program.shown,
        program.value_vocabulary, program.predict, program.query, tables.token, tables.index,
        np.ascontiguousarray(cells.front), tables.known, tables.index[tables.known],
        np.zeros(compiled.n_features, np.float64), _logs(), _logs_of_depths(), np.empty(room, np.uint64),
        np.empty(room, np.uint32), np.empty(room, np.uint32), key, key_2, key_3, histogram, item, index,
        *made.values(),
    )  # fmt: skip
    return made, np.full(n, program.length, np.int32)


def _handed_out(
    program: Weighted | Ranked | Prompt, made: dict[str, np.ndarray], lengths: np.ndarray, options: Options
) -> dict[str, np.ndarray]:
    """Rows of full length as they are asked for."""
    n, most = len(lengths), program.length
    width = options.width(lengths, most)
    result = {}
    for name, array in made.items():
        dtype = np.dtype(options.ids_dtype) if name in IDS else array.dtype
        if name not in PADDED:
            result[name] = array.astype(dtype, copy=False)
        elif isinstance(program, Weighted):
            result[name] = _placed(array, lengths, width, dtype, program.pad_id, options.padding == "packed")
        elif options.padding == "packed":
            result[name] = array.reshape(-1).astype(dtype, copy=False)
        elif width == most:
            result[name] = array.astype(dtype, copy=False)
        else:
            pad = {"labels": -100, "prompt_mask": program.pad_id}.get(
                name, program.pad_value if name in FLOATS else program.pad_id
            )
            whole = POOL.empty((n, width), dtype)
            kept = min(width, most)
            whole[:, :kept] = array[:, :kept]
            whole[:, kept:] = pad
            result[name] = whole
    return result


def _placed(
    drafts: np.ndarray, lengths: np.ndarray, width: int, dtype: np.dtype, pad: int, packed: bool
) -> np.ndarray:
    """Drafts of rows as they are handed out."""
    n = len(lengths)
    widths = lengths.astype(np.int64) if packed else np.full(n, width, np.int64)
    starts = np.zeros(n, np.int64)
    np.cumsum(widths[:-1], out=starts[1:])
    whole = POOL.empty(int(widths.sum()), dtype)
    weighted.place_rows(drafts, lengths, starts, widths, pad, whole)
    return whole if packed else whole.reshape(n, width)
