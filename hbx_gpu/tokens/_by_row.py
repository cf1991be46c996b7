"""The reference engine: rows one after the other, then padded."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hbx_gpu.tokens._cells import Cells, Options
from hbx_gpu.tokens._compile import Compiled
from hbx_gpu.tokens._draws import Draws
from hbx_gpu.tokens._lower_sampled import Prompt, Ranked, Weighted
from hbx_gpu.tokens._program import Mask, Program, Sequence
from hbx_gpu.tokens._reference import Cut, Made, row_length, sequence_row
from hbx_gpu.tokens._reference_sampled import prompt_row, ranked_row, shared_genes, weighted_row
from hbx_gpu.tokens._rows import Row, known_genes

FLOATS = (
    "values", "masked_values", "counts", "gen_values", "query_mask", "total_counts", "label_weights"
)  # fmt: skip
_BOOLS = ("mask", "prompt_mask")
_IDS = ("input_ids", "labels", "gen_ids")
PADDED = (*FLOATS, *_BOOLS, *_IDS)
"""Outputs with an entry for each token."""


def reference(compiled: Compiled, cells: Cells, options: Options) -> dict[str, np.ndarray]:
    """See :class:`hbx_gpu.tokens._cells.Engine`."""
    program, tables = compiled.program, compiled.tables
    if not len(cells):
        return _of_no_cells(compiled, cells, options)
    rows = [_row(compiled, cells, i) for i in range(len(cells))]
    drawn = [Draws(cells.seed, cells.epoch, int(number)) for number in cells.numbers]
    if isinstance(program, Sequence):
        return _sequences(compiled, cells, options, rows, drawn)
    if isinstance(program, Weighted):
        made = [weighted_row(program, tables, row, draws) for row, draws in zip(rows, drawn, strict=True)]
    elif isinstance(program, Ranked):
        shared = shared_genes(program, cells.seed, cells.epoch, cells.batch)
        made = [
            ranked_row(program, tables, row, draws, shared) for row, draws in zip(rows, drawn, strict=True)
        ]
    else:
        assert isinstance(program, Prompt)
        made = [
            prompt_row(program, tables, row, drawn[i], cells.front[i % len(cells.front)], len(rows))
            for i, row in enumerate(rows)
        ]
    lengths = np.array([len(row["input_ids"]) for row in made], np.int32)
    return padded(program, made, options, options.width(lengths, program.length), {})


def _of_no_cells(compiled: Compiled, cells: Cells, options: Options) -> dict[str, np.ndarray]:
    """The arrays of a batch without rows: those of a cell without genes, and none of it."""
    one = replace(
        cells, offsets=np.zeros(2, np.int64), numbers=np.zeros(1, np.int64),
        front=np.zeros((1, cells.front.shape[1]), np.int64),
    )  # fmt: skip
    return {name: array[:0] for name, array in reference(compiled, one, options).items()}


def _sequences(
    compiled: Compiled, cells: Cells, options: Options, rows: list[Row], drawn: list[Draws]
) -> dict[str, np.ndarray]:
    program, tables = compiled.program, compiled.tables
    assert isinstance(program, Sequence)
    known = len(tables.known)
    lengths = np.array([row_length(program, len(r.columns), known, r.known) for r in rows], np.int32)
    width = options.width(lengths, program.length)
    cut = Cut(program, cells.seed, cells.epoch, cells.batch, width)
    back = np.array(compiled.back, np.int64)
    made = [
        sequence_row(program, tables, row, drawn[i], cells.front[i % len(cells.front)], back, cut)
        for i, row in enumerate(rows)
    ]
    widths = {}
    if program.mask == Mask.SPLIT:
        widths = dict.fromkeys(("gen_ids", "gen_values"), cut.generated)
        width = cut.seen
    return padded(program, made, options, width, widths)


def _row(compiled: Compiled, cells: Cells, i: int) -> Row:
    one = slice(cells.offsets[i], cells.offsets[i + 1])
    program = compiled.program
    logged = isinstance(program, Ranked) and program.logged
    return known_genes(
        cells.columns[one],
        cells.values[one],
        compiled.tables,
        zeros=program.zeros,
        logged=logged,
        where=cells.where,
    )


def padded(
    program: Program, rows: list[Made], options: Options, width: int, widths: dict[str, int]
) -> dict[str, np.ndarray]:
    """Rows side by side, padded to `width`, or to what `widths` says of a name; or end to end."""
    pads = {"labels": -100, "mask": False, **dict.fromkeys(FLOATS, program.pad_value)}
    dtypes = {**dict.fromkeys(_BOOLS, np.bool_), **dict.fromkeys(FLOATS, np.float32)}
    result = {"lengths": np.array([len(row["input_ids"]) for row in rows], np.int32)}
    if rows and "gen_ids" in rows[0]:
        result["gen_lengths"] = np.array([len(row["gen_ids"]) for row in rows], np.int32)
    for name in rows[0] if rows else ():
        if name not in PADDED:
            stacked = np.stack([row[name] for row in rows])
            result[name] = stacked.astype(options.ids_dtype) if stacked.dtype == np.int64 else stacked
            continue
        dtype = np.dtype(dtypes.get(name, options.ids_dtype))
        if options.padding == "packed":
            result[name] = np.concatenate([row[name] for row in rows]).astype(dtype)
            continue
        result[name] = np.full((len(rows), widths.get(name, width)), pads.get(name, program.pad_id), dtype)
        for out, row in zip(result[name], rows, strict=True):
            out[: len(row[name])] = row[name]
    return result
