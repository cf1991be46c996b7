"""The host engine: memory for a batch, then the kernels."""

from __future__ import annotations

import numpy as np

from hbx_gpu._buffers import POOL
from hbx_gpu.tokens._by_row import reference
from hbx_gpu.tokens._cells import Cells, Options
from hbx_gpu.tokens._compile import Compiled
from hbx_gpu.tokens._host import bins, sequence, sorting
from hbx_gpu.tokens._host.known import Known
from hbx_gpu.tokens._host.sentences import sentences
from hbx_gpu.tokens._numbers import numbers_of, quantiles_of
from hbx_gpu.tokens._program import Fill, Mask, Sequence, Tables, Value
from hbx_gpu.tokens._reference import Cut


def host(compiled: Compiled, cells: Cells, options: Options) -> dict[str, np.ndarray]:
    """See :class:`hbx_gpu.tokens._cells.Engine`."""
    if not len(cells):
        return reference(compiled, cells, options)
    if not isinstance(compiled.program, Sequence):
        return sentences(compiled, cells, options)
    return _sequences(compiled, cells, options)


def _sequences(compiled: Compiled, cells: Cells, options: Options) -> dict[str, np.ndarray]:
    program, tables = compiled.program, compiled.tables
    assert isinstance(program, Sequence)
    known = Known(compiled, cells)
    n = len(cells)
    whole, fractions = numbers_of(program)
    lengths = np.empty(n, np.int32)
    sequence.lengths(whole, known.pointers, known.totals_known, len(tables.known), lengths)
    width = options.width(lengths, program.length)
    cut = Cut(program, cells.seed, cells.epoch, cells.batch, width)
    split = program.mask == Mask.SPLIT
    if split:
        width = cut.seen
    packed = options.padding == "packed"
    widths = lengths.astype(np.int64) if packed else np.full(n, width, np.int64)
    starts = np.zeros(n, np.int64)
    np.cumsum(widths[:-1], out=starts[1:])
    size = int(widths.sum())

    ids_dtype = np.dtype(options.ids_dtype)
    made: dict[str, np.ndarray] = {"input_ids": POOL.empty(size, ids_dtype)}
    if program.value != Value.NONE:
        made["values"] = POOL.empty(size, np.float32)
    if program.counts:
        made["counts"] = POOL.empty(size, np.float32)
    if program.mask == Mask.TOKENS:
        made["labels"] = POOL.empty(size, ids_dtype)
    if program.mask in (Mask.BERNOULLI, Mask.EXACT):
        made["mask"], made["masked_values"] = POOL.empty(size, np.bool_), POOL.empty(size, np.float32)
    generated = {}
    gen_lengths = np.empty(n if split else 0, np.int32)
    if split:
        generated["gen_ids"] = POOL.empty(n * cut.generated, ids_dtype)
        generated["gen_values"] = POOL.empty(n * cut.generated, np.float32)
    none = {
        "values": np.empty(0, np.float32),
        "counts": np.empty(0, np.float32),
        "masked_values": np.empty(0, np.float32),
        "gen_values": np.empty(0, np.float32),
        "mask": np.empty(0, np.bool_),
        "labels": np.empty(0, ids_dtype),
        "gen_ids": np.empty(0, ids_dtype),
    }
    every = {**none, **made, **generated}

    room = max(known.longest, len(tables.known) if program.fill != Fill.NONE else 0) + program.length + 64
    quantiles = quantiles_of(program)
    sequence.fill_rows(
        whole, fractions, quantiles, program.ratios, program.protect, program.front_values,
        program.back_values, tables.token, tables.scale, _index(tables), tables.known,
        known.pointers, known.genes, known.counts, known.totals, known.totals_known,
        np.ascontiguousarray(cells.front), np.array(compiled.back, np.int64), np.uint64(cells.seed),
        np.uint64(cells.epoch), cells.numbers, starts, widths, cut.generated, cut.ratio,
        every["input_ids"], every["values"], every["counts"], every["labels"], every["masked_values"],
        every["mask"], every["gen_ids"], every["gen_values"], gen_lengths, lengths,
        np.empty(room, np.uint64), np.empty(room, np.uint64), np.empty(room, np.uint64),
        np.empty(room, np.uint32), np.empty(room, np.uint32), np.empty(room, np.uint32),
        np.empty(room, np.float32),
        np.empty(sorting.HISTOGRAM, np.uint32), np.zeros((4, bins.SMALL), np.int32),
        np.empty((2, bins.SMALL + 1), np.int32), np.empty(len(quantiles), np.float64),
        np.empty(room, np.uint32), np.empty(room, np.float64),
        np.zeros(compiled.n_features if program.fill != Fill.NONE else 0, np.uint8),
    )  # fmt: skip
    if not packed:
        made = {name: array.reshape(n, width) for name, array in made.items()}
    result = {"lengths": lengths, **made}
    if split:
        result["gen_lengths"] = gen_lengths
        result |= {name: array.reshape(n, cut.generated) for name, array in generated.items()}
    return result


def _index(tables: Tables) -> np.ndarray:
    """Numbers of columns in draws; empty where those are the columns, which need no look-up."""
    plain = np.array_equal(tables.index, np.arange(len(tables.index), dtype=tables.index.dtype))
    return tables.index[:0] if plain else tables.index
