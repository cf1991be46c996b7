"""What tokens are, in NumPy, one row after the other: slow, and the measure of every engine."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

from hbx_gpu._draws import unit
from hbx_gpu.tokens import _arithmetic as a
from hbx_gpu.tokens._draws import Draws, Step, batch_cell, scaled, smallest, special_index
from hbx_gpu.tokens._program import Curve, Depth, Fill, Mask, Norm, Order, Sequence, Side, Tables, Value
from hbx_gpu.tokens._rows import Row

Made: TypeAlias = dict[str, np.ndarray]
"""Arrays of one row, without padding."""


def sequence_row(
    program: Sequence, tables: Tables, row: Row, draws: Draws, front: np.ndarray, back: np.ndarray, cut: Cut
) -> Made:
    """One row of :class:`Sequence`.

    Parameters
    ----------
    row
        The cell's known genes.
    draws
        Its random numbers.
    front, back
        int64. Special tokens before and after the genes.
    cut
        Where :attr:`Mask.SPLIT` cuts.

    Returns
    -------
    dict
        ``input_ids`` and, as the program says, ``values``, ``counts``, ``labels``, ``masked_values``,
        ``mask``, ``gen_ids``, ``gen_values``.
    """
    if program.mask == Mask.SPLIT:
        return _split(program, tables, row, draws, front, cut)
    genes = _chosen(program, tables, row, draws)
    columns, counts = row.columns[genes], row.counts[genes]
    n_expressed = len(genes)
    filled = _unexpressed(program, tables, row, draws, n_expressed)
    columns = np.concatenate([columns, filled])
    counts = np.concatenate([counts, np.zeros(len(filled))])
    depth_ids, depth_values = _depth(program, row)
    back = np.concatenate([back, depth_ids])
    back_values = np.concatenate([program.back_values, depth_values])
    n_front, n_back = len(front), len(back)
    made: Made = {"input_ids": np.concatenate([front, tables.token[columns], back]).astype(np.int64)}
    if program.value != Value.NONE:
        values = np.zeros(len(columns), np.float32)
        values[:n_expressed] = _values(program, tables, row, draws, genes)
        made["values"] = np.concatenate([program.front_values, values, back_values]).astype(np.float32)
    if program.counts:
        made["counts"] = np.full(len(made["input_ids"]), program.pad_value, np.float32)
        made["counts"][n_front : n_front + len(counts)] = counts
    index = np.concatenate(
        [
            special_index(np.arange(n_front)),
            tables.index[columns],
            special_index(n_front + np.arange(n_back)),
        ]
    ).astype(np.int64)
    if program.mask == Mask.TOKENS:
        made["input_ids"], made["labels"] = hide_tokens(program, made["input_ids"], index, draws)
    elif program.mask != Mask.NONE:
        first = 0 if program.mask_front else n_front
        last = n_front + len(columns)
        if program.mask_short:
            last = max(first, last - n_front)
        hidden = np.zeros(len(index), bool)
        hidden[first:last] = hide(program, index[first:last], draws)
        made["mask"] = hidden
        made["masked_values"] = np.where(hidden, np.float32(program.mask_value), made["values"])
    return made


def row_length(program: Sequence, n_known: int, n_total_known: int, total_known: int) -> int:
    """Tokens of a row with so many known genes, of so many in the vocabulary, which sum to `total_known`."""
    kept = min(n_known, program.keep)
    filled = min(max(program.fill_to - kept, 0), n_total_known - n_known)
    n = program.n_front + kept + filled + program.n_back
    if program.depth != Depth.NONE:
        n += 2 - (program.depth_drop and total_known <= 1)
    return n


# -- which genes, in which order -----------------------------------------------------------------------


def _chosen(program: Sequence, tables: Tables, row: Row, draws: Draws) -> np.ndarray:
    """Positions in `row` of the genes that are kept, in order."""
    index = tables.index[row.columns]
    if len(row.columns) > program.keep and program.cut_random:
        return smallest(draws.keys(Step.PICK, index), index, program.keep)
    return _ordered(program, tables, row, draws)[: program.keep]


def _ordered(program: Sequence, tables: Tables, row: Row, draws: Draws) -> np.ndarray:
    if program.order == Order.VALUE:
        return np.argsort(-rank_values(program, tables, row), kind="stable")
    if program.order == Order.ID:
        return np.argsort(tables.token[row.columns], kind="stable")
    if program.order == Order.RANDOM:
        index = tables.index[row.columns]
        return smallest(draws.keys(Step.PICK, index), index, len(index))
    return np.arange(len(row.columns))


def rank_values(program: Sequence, tables: Tables, row: Row) -> np.ndarray:
    """float64 (n,). What genes are ranked by."""
    values = a.normalize(program.rank, row.counts, row.total, row.known, 0.0, program.rank_target)
    return a.rank_keys(program.rank, values, tables.scale[row.columns]) if program.scaled else values


def _unexpressed(program: Sequence, tables: Tables, row: Row, draws: Draws, n_expressed: int) -> np.ndarray:
    """Columns of genes that fill the row up."""
    if program.fill == Fill.NONE or program.fill_to <= n_expressed:
        return np.empty(0, np.int64)
    absent = np.setdiff1d(tables.known, row.columns)
    if program.fill == Fill.RANDOM:
        index = tables.index[absent]
        absent = absent[smallest(draws.keys(Step.ZEROS, index), index, len(index))]
    return absent[: program.fill_to - n_expressed].astype(np.int64)


# -- what stands beside them ---------------------------------------------------------------------------


def _values(program: Sequence, tables: Tables, row: Row, draws: Draws, genes: np.ndarray) -> np.ndarray:
    counts = row.counts[genes]
    if program.value == Value.KEPT_BINS:
        return bins(program, counts, tables.index[row.columns[genes]], draws).astype(np.float32)
    if program.value == Value.BINS:
        result: np.ndarray = bins(program, row.counts, tables.index[row.columns], draws)[genes].astype(
            np.float32
        )
        return result
    values = a.normalize(program.norm, counts, row.total, row.known, float(counts.sum()), program.target)
    if program.norm == Norm.COUNT and program.curve == Curve.NONE and program.clip == np.inf:
        return values.astype(np.float32)
    return a.bend(program.curve, values, program.clip)


def bins(program: Sequence, counts: np.ndarray, index: np.ndarray, draws: Draws) -> np.ndarray:
    """int64 (n,). Quantile bins among the counts above 0; zeros are in bin 0."""
    result = np.zeros(len(counts), np.int64)
    expressed = counts > 0
    values = counts[expressed].astype(np.float32)
    if not len(values):
        return result
    edges = (a.edges_torch if program.torch_edges else a.edges_numpy)(values, program.bins)
    below, above = a.digits(values, edges)
    if program.side == Side.BOTH:
        span = np.maximum(above - below, 1)
        words = draws.words(Step.BIN, index[expressed])[0]
        result[expressed] = above - np.where(above > below, scaled(words, span), 0)
    else:
        result[expressed] = above if program.side == Side.ONE else below + 1
    return result


def _depth(program: Sequence, row: Row) -> tuple[np.ndarray, np.ndarray]:
    """scFoundation's two tokens at the end: what depth to aim at, and what depth there is."""
    if program.depth == Depth.NONE:
        return np.empty(0, np.int64), np.empty(0, np.float32)
    measured = a.log1p(np.array([max(row.known, 1) - 1.0]))[0] * a.INV_LN10
    number = program.depth_number
    aimed = number
    if program.depth == Depth.ADDED:
        aimed = measured + number
    elif program.depth == Depth.TIMES:
        aimed = a.log1p(np.array([max(row.known, 1) * number - 1.0]))[0] * a.INV_LN10
    ids = np.array(program.depth_ids, np.int64)
    values = np.array([aimed, measured]).astype(np.float32)
    n = 1 if program.depth_drop and row.known <= 1 else 2
    return ids[:n], values[:n]


# -- what is hidden ------------------------------------------------------------------------------------


def hide_tokens(
    program: Sequence, ids: np.ndarray, index: np.ndarray, draws: Draws
) -> tuple[np.ndarray, np.ndarray]:
    """Ids with some hidden, and labels: what they were, -100 elsewhere."""
    chosen = draws.units(Step.MASK, index) < program.ratios[0]
    chosen &= ~np.isin(ids, program.protect)
    words = draws.words(Step.KIND, index)
    kind = unit(words[0], words[1])
    replacement = program.replace_first + scaled(words[2], program.replace_span)
    hidden = np.where(
        kind < program.masked, program.mask_id, np.where(kind < program.replaced, replacement, ids)
    )
    return np.where(chosen, hidden, ids), np.where(chosen, ids, -100)


def hide(program: Sequence, index: np.ndarray, draws: Draws) -> np.ndarray:
    """bool (n,). Values that are hidden."""
    ratios = program.ratios
    ratio = ratios[draws.below(Step.RATIO, len(ratios)) if len(ratios) > 1 else 0]
    if program.mask == Mask.BERNOULLI:
        result: np.ndarray = draws.units(Step.MASK, index) < ratio
        return result
    hidden = np.zeros(len(index), bool)
    hidden[smallest(draws.keys(Step.MASK, index), index, int(len(index) * ratio))] = True
    return hidden


class Cut:
    """Where a batch is cut in genes to see and genes to generate.

    Parameters
    ----------
    program
        Says with which shares.
    seed, epoch, batch
        What the share is drawn from.
    width
        Tokens of the batch's rows.
    """

    def __init__(self, program: Sequence, seed: int, epoch: int, batch: int, width: int) -> None:
        number = 0
        if len(program.ratios) > 1:  # of one there is nothing to draw
            number = Draws(seed, epoch, batch_cell(batch)).below(Step.RATIO, len(program.ratios))
        self.ratio = float(program.ratios[number])
        # What is seen has room for the tokens in front, however many there are.
        self.generated = min(int((width - 1) * self.ratio), max(width - program.n_front, 0))
        self.seen = width - self.generated


def _split(program: Sequence, tables: Tables, row: Row, draws: Draws, front: np.ndarray, cut: Cut) -> Made:
    index = tables.index[row.columns]
    order = smallest(draws.keys(Step.PICK, index), index, len(index))
    n_generated = int(len(order) * cut.ratio)
    generated = order[:n_generated][: cut.generated]
    seen = order[n_generated:][: cut.seen - len(front)]
    token = tables.token[row.columns].astype(np.int64)
    made: Made = {"input_ids": np.concatenate([front, token[seen]]), "gen_ids": token[generated]}
    values = _values(program, tables, row, draws, np.arange(len(order)))
    made["values"] = np.concatenate([program.front_values, values[seen]]).astype(np.float32)
    made["gen_values"] = values[generated]
    return made
