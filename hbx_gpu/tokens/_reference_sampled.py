"""What sentences of sampled genes are, in NumPy: the measure of every engine."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from hbx_gpu._draws import unit
from hbx_gpu.tokens import _arithmetic as a
from hbx_gpu.tokens._draws import Draws, Step, batch_cell, mulhi, smallest, special_index, thin
from hbx_gpu.tokens._lower_sampled import Prompt, Ranked, Weighted
from hbx_gpu.tokens._program import Tables
from hbx_gpu.tokens._reference import Made
from hbx_gpu.tokens._rows import Row

FIXED = 2.0**32
"""Sums of logarithms are made of whole multiples of 1 / this, so that any order of adding gives the same."""


# -- UCE -----------------------------------------------------------------------------------------------


def weighted_row(program: Weighted, tables: Tables, row: Row, draws: Draws) -> Made:
    """One row of :class:`Weighted`."""
    if not len(row.columns):
        return {"input_ids": np.array([program.cls], np.int64)}
    drawn = row.columns[weighted_draws(a.log1p(row.counts), draws, program.samples)]
    codes = np.unique(program.chromosome[drawn])
    codes = codes[smallest(draws.keys(Step.CHROM, codes), codes, len(codes))]
    return {"input_ids": sentence(program, tables, drawn, codes)[: program.length]}


def weighted_draws(weights: np.ndarray, draws: Draws, n: int) -> np.ndarray:
    """int64 (n,). Positions drawn with replacement, in proportion to `weights`."""
    sums = np.cumsum(np.rint(weights * FIXED).astype(np.uint64))
    places = mulhi(draws.keys(Step.WEIGHTED, np.arange(n)), int(sums[-1]))
    return np.searchsorted(sums, places, side="right")


def sentence(program: Weighted, tables: Tables, drawn: np.ndarray, codes: Iterable[int]) -> np.ndarray:
    """int64. Columns that were drawn, as tokens: chromosomes in the order of `codes`."""
    parts: list[np.ndarray] = [np.array([program.cls])]
    for code in codes:
        genes = drawn[program.chromosome[drawn] == code]
        genes = genes[np.argsort(program.place[genes], kind="stable")]
        parts += [np.array([program.offset + code]), tables.token[genes], np.array([program.close])]
    return np.concatenate(parts).astype(np.int64)


# -- State ---------------------------------------------------------------------------------------------


def ranked_row(program: Ranked, tables: Tables, row: Row, draws: Draws, shared: np.ndarray) -> Made:
    """One row of :class:`Ranked`; `shared`: ids of the batch's own genes to predict."""
    logs = (row.counts if program.logged else a.log1p(row.counts)).astype(np.float32)
    fixed = np.rint(logs.astype(np.float64) * FIXED)
    index = tables.index[row.columns]
    order = np.lexsort((index, draws.keys(Step.TIES, index), -logs))
    absent = np.setdiff1d(tables.known, row.columns)
    columns = np.concatenate([[program.cls_column], row.columns[order]])[: program.length]
    missing = program.length - len(columns)
    if missing:
        columns = np.concatenate([columns, _absent_genes(tables, row, absent, draws, missing)])
    level = np.zeros(len(tables.column), np.float32)
    level[row.columns] = logs
    total = float(fixed.sum()) / FIXED
    if total > 0:
        shares = 100.0 * (level[columns].astype(np.float64) / total)
    else:
        shares = np.full(len(columns), 100.0 / len(tables.known))
    task_ids, task_values = _tasks(program, tables, row, absent, level, draws, shared)
    return {
        "input_ids": tables.token[columns].astype(np.int64),
        "values": shares.astype(np.float32),
        "task_ids": task_ids,
        "task_values": task_values,
        "totals": np.float32(np.rint(task_values.astype(np.float64) * FIXED).sum() / FIXED),
    }


def _absent_genes(tables: Tables, row: Row, absent: np.ndarray, draws: Draws, n: int) -> np.ndarray:
    """int64 (n,). Genes that are not expressed: at random, or with replacement where they are too few."""
    if len(absent) >= n:
        index = tables.index[absent]
        result: np.ndarray = absent[smallest(draws.keys(Step.ZEROS, index), index, n)]
        return result
    return _with_replacement(absent if len(absent) else row.columns, draws, Step.ZEROS, 1, n)


def _with_replacement(columns: np.ndarray, draws: Draws, step: Step, block: int, n: int) -> np.ndarray:
    keys = draws.keys(step, np.arange(n), block)
    return columns[mulhi(keys, len(columns)).astype(np.int64)]


def _tasks(
    program: Ranked,
    tables: Tables,
    row: Row,
    absent: np.ndarray,
    level: np.ndarray,
    draws: Draws,
    shared: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Genes to predict: expressed ones, unexpressed ones, and those of the batch."""
    n_expressed, n_absent, _ = program.tasks
    if program.count_one_absent:
        absent = np.union1d(absent, row.columns[level[row.columns] < 1])
    parts = []
    for step, half, block, columns, n in (
        (Step.PICK, 0, 1, row.columns, n_expressed),
        # The first half of each draw decides which genes fill the row up.
        (Step.ZEROS, 1, 3, absent, n_absent),
    ):
        if len(columns) >= n:
            index = tables.index[columns]
            parts.append(columns[smallest(draws.keys(step, index, half=half), index, n)])
        else:
            some = columns if len(columns) else tables.known
            parts.append(_with_replacement(some, draws, step, block, n))
    columns = np.concatenate(parts).astype(np.int64)
    by_id = {int(tables.token[c]): level[c] for c in row.columns.tolist()}
    ids = np.concatenate([tables.token[columns], shared]).astype(np.int64)
    values = np.concatenate([level[columns], [by_id.get(i, np.float32(0)) for i in shared.tolist()]])
    return ids, values.astype(np.float32)


def shared_genes(program: Ranked, seed: int, epoch: int, batch: int) -> np.ndarray:
    """int64. Ids that all cells of a batch have to predict."""
    keys = Draws(seed, epoch, batch_cell(batch)).keys(Step.PICK, np.arange(program.tasks[2]))
    return mulhi(keys, program.n_ids).astype(np.int64)


# -- CellariumGPT --------------------------------------------------------------------------------------


def prompt_row(
    program: Prompt, tables: Tables, row: Row, draws: Draws, codes: np.ndarray, n_rows: int
) -> Made:
    """One row of :class:`Prompt`: `row` holds all known genes; `codes`: the cell's metadata."""
    m = len(program.metadata_masks)
    n = program.length - m
    depth = min(float(row.total), program.max_umis)
    if program.predict:
        genes = np.arange(n)
        depths = np.full(n, depth)
        share = np.full(n, depth / row.total if row.total else 0.0)
        counts = np.rint(row.counts[genes] * share)
        query = program.query[row.columns[genes]]
    else:
        index = tables.index[row.columns]
        genes = smallest(draws.keys(Step.PICK, index), index, n)
        index = index[genes]
        depths = np.full(n, depth)
        if program.thinned:
            words = draws.words(Step.RATIO, index)
            part = np.minimum(unit(words[0], words[1]) / program.thinned, 1.0)
            depths = program.min_umis + part * (depth - program.min_umis)
        share = np.clip(depths / max(row.total, 1), 0.0, 1.0)
        counts = thin(draws, index, row.counts[genes], share).astype(np.float64)
        prefix = program.prefix
        if len(program.prefix_sums):
            key = draws.keys(Step.RATIO, np.array([special_index(0)]))
            prefix = int(np.searchsorted(program.prefix_sums, key, side="right")[0])
            prefix = min(prefix, n - 1)
        query = np.arange(n) >= prefix
    shown, metadata = _metadata(program, draws, codes)
    tail = np.zeros(m)
    logs = a.log1p(counts)
    labels = np.minimum(counts, program.value_vocabulary - 1)
    weights = query / max(int(query.sum()), 1) / n_rows
    return {
        "input_ids": np.concatenate([tables.token[row.columns[genes]], tail]).astype(np.int64),
        "values": np.concatenate([logs * ~query, tail]).astype(np.float32),
        "query_mask": np.concatenate([query, tail]).astype(np.float32),
        "total_counts": np.concatenate([a.log1p(np.rint(depths)), tail]).astype(np.float32),
        "prompt_mask": np.concatenate([~query, shown]).astype(bool),
        "labels": np.concatenate([labels, tail]).astype(np.int64),
        "label_weights": np.concatenate([weights, tail]).astype(np.float32),
        "metadata_ids": metadata,
        "metadata_labels": np.maximum(codes, 0),
        "metadata_mask": shown,
    }


def _metadata(program: Prompt, draws: Draws, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which metadata is shown, and its codes with the others hidden."""
    m = len(program.metadata_masks)
    shown = program.shown
    if len(shown) != m:
        n = draws.below(Step.RATIO, m + 1, special_index(1))  # type: ignore[arg-type]
        index = np.asarray(special_index(2 + np.arange(m)))
        shown = np.zeros(m, bool)
        shown[smallest(draws.keys(Step.PICK, index), index, n)] = True
    shown = shown & (codes >= 0)
    hidden = np.where(codes < 0, 0, program.metadata_masks)  # 0: not known, which is not to be guessed
    return shown, np.where(shown, codes, hidden).astype(np.int64)
