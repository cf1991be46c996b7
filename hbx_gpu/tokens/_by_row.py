"""The reference engine: :mod:`_reference` row by row, then padded."""

from __future__ import annotations

import numpy as np

from hbx_gpu.tokens._cells import Cells, Options
from hbx_gpu.tokens._compile import Compiled
from hbx_gpu.tokens._draws import Draws
from hbx_gpu.tokens._program import Mask, Sequence
from hbx_gpu.tokens._reference import Cut, Made, row_length, sequence_row
from hbx_gpu.tokens._rows import Row, known_genes

FLOATS = ("values", "masked_values", "counts", "gen_values")


def reference(compiled: Compiled, cells: Cells, options: Options) -> dict[str, np.ndarray]:
    """See :class:`hbx_gpu.tokens._encode.Engine`."""
    program, tables = compiled.program, compiled.tables
    rows = [_row(compiled, cells, i) for i in range(len(cells))]
    known = len(tables.known)
    lengths = np.array([row_length(program, len(r.columns), known, r.known) for r in rows], np.int32)
    width = options.width(lengths, program.length)
    cut = Cut(program, cells.seed, cells.epoch, cells.batch, width)
    back = np.array(compiled.back, np.int64)
    made = [
        sequence_row(program, tables, row, draws(cells, i), cells.front[i % len(cells.front)], back, cut)
        for i, row in enumerate(rows)
    ]
    widths = {}
    if program.mask == Mask.SPLIT:
        widths = dict.fromkeys(("gen_ids", "gen_values"), cut.generated)
        width = cut.seen
    return padded(program, made, options, width, widths)


def draws(cells: Cells, i: int) -> Draws:
    """What row i draws."""
    return Draws(cells.seed, cells.epoch, int(cells.numbers[i]))


def _row(compiled: Compiled, cells: Cells, i: int) -> Row:
    one = slice(cells.offsets[i], cells.offsets[i + 1])
    zeros = compiled.program.zeros
    return known_genes(cells.columns[one], cells.values[one], compiled.tables, zeros=zeros, where=cells.where)


def padded(
    program: Sequence, rows: list[Made], options: Options, width: int, widths: dict[str, int]
) -> dict[str, np.ndarray]:
    """Rows side by side, padded to `width`, or to what `widths` says of a name; or end to end."""
    pads = {"labels": -100, "mask": False, **dict.fromkeys(FLOATS, program.pad_value)}
    dtypes = {"mask": np.bool_, **dict.fromkeys(FLOATS, np.float32)}
    result = {"lengths": np.array([len(row["input_ids"]) for row in rows], np.int32)}
    if rows and "gen_ids" in rows[0]:
        result["gen_lengths"] = np.array([len(row["gen_ids"]) for row in rows], np.int32)
    for name in rows[0] if rows else ():
        dtype = dtypes.get(name, options.ids_dtype)
        if options.padding == "packed":
            result[name] = np.concatenate([row[name] for row in rows]).astype(dtype)
            continue
        result[name] = np.full((len(rows), widths.get(name, width)), pads.get(name, program.pad_id), dtype)
        for out, row in zip(result[name], rows, strict=True):
            out[: len(row[name])] = row[name]
    return result
