"""Random numbers of tokens: integers keyed on (seed, epoch, cell, step, gene), the same on every engine.

The counter of Philox4x32-10 is ``(cell low, cell high | block << 8, epoch, step | index << 8)``: `index` is
the global column of a gene wherever a draw belongs to a gene, so that panel, storage order, position and
batch never change a draw. With index and block 0 it is the counter of :func:`hbx_gpu._draws.uniform`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from hbx_gpu._draws import MAX_CELLS, philox, unit

MAX_INDEX = 2**24
"""Columns, and positions that stand for columns, lie below this."""
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


class Step(IntEnum):
    """What a draw is for. Numbers never change, so that a new step leaves the draws of the others alone."""

    PICK = 16
    ZEROS = 17
    BIN = 18
    MASK = 19
    KIND = 20
    WEIGHTED = 21
    CHROM = 22
    THIN = 23
    RATIO = 24
    TIES = 25


def special_index(position: np.ndarray | int) -> np.ndarray | int:
    """The index of a special token, which has no column: counted down from the end of the range."""
    return MAX_INDEX - 1 - position


def batch_cell(batch: int) -> int:
    """The cell that draws shared by a whole batch belong to."""
    return MAX_CELLS - 1 - batch


@dataclass(frozen=True, slots=True)
class Draws:
    """Everything that one cell draws in one epoch.

    Attributes
    ----------
    seed, epoch
        0 .. 2**64 - 1 and 0 .. 2**32 - 1.
    cell
        Row number of the dataset, below 2**40.
    """

    seed: int
    epoch: int
    cell: int

    def words(self, step: Step, index: np.ndarray, block: int | np.ndarray = 0) -> np.ndarray:
        """uint64 (4, n): four 32-bit words for each index, or for each block of one index."""
        index, block = np.broadcast_arrays(np.asarray(index, np.uint64), np.asarray(block, np.uint64))
        counter = np.empty((4, len(index)), np.uint64)
        counter[0] = self.cell & 0xFFFFFFFF
        counter[1] = np.uint64(self.cell >> 32) | block << np.uint64(8)
        counter[2], counter[3] = self.epoch, np.uint64(step) | index << np.uint64(8)
        return philox(counter, (self.seed & 0xFFFFFFFF, self.seed >> 32))

    def keys(self, step: Step, index: np.ndarray, block: int = 0, *, half: int = 0) -> np.ndarray:
        """uint64 (n,): 64-bit keys; the k smallest are a uniform choice of k, their order a shuffle.

        `half` 1 takes the other two words of the same draws.
        """
        words = self.words(step, index, block)
        result: np.ndarray = words[2 * half] << _HALF | words[2 * half + 1]
        return result

    def units(self, step: Step, index: np.ndarray) -> np.ndarray:
        """float64 (n,) in [0, 1)."""
        words = self.words(step, index)
        return unit(words[0], words[1])

    def below(self, step: Step, n: int, index: int = 0) -> int:
        """One number of 0 .. n - 1, n below 2**32."""
        return int(self.words(step, np.array([index]))[0, 0]) * n >> 32


def thin(draws: Draws, index: np.ndarray, counts: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """int64 (n,). Binomial(counts, shares): how many of `counts` words each lie below the share of 2**32."""
    below = np.floor(shares * 2.0**32).astype(np.uint64)
    kept = np.where(shares >= 1.0, counts, 0).astype(np.int64)
    for i in np.flatnonzero((counts > 0) & (shares < 1.0)).tolist():
        count = int(counts[i])
        words = draws.words(Step.THIN, index[i : i + 1], np.arange(-(-count // 4)))
        kept[i] = (words.T.reshape(-1)[:count] < below[i]).sum()  # the last block is not used up
    return kept


def scaled(words: np.ndarray, spans: np.ndarray | int) -> np.ndarray:
    """int64. Each 32-bit word as a number of 0 .. span - 1."""
    return ((words * np.asarray(spans, np.uint64)) >> _HALF).astype(np.int64)


def mulhi(keys: np.ndarray, span: int) -> np.ndarray:
    """uint64. The upper 64 bits of each key times `span`: each key as a number of 0 .. span - 1."""
    high, low = keys >> _HALF, keys & _LOW
    span_high, span_low = np.uint64(span >> 32), np.uint64(span & 0xFFFFFFFF)
    middle = high * span_low + (low * span_low >> _HALF)
    result: np.ndarray = high * span_high + (middle >> _HALF) + (low * span_high + (middle & _LOW) >> _HALF)
    return result


def smallest(keys: np.ndarray, columns: np.ndarray, k: int) -> np.ndarray:
    """int64 (k,). Positions of the k smallest (key, column), in that order."""
    return np.lexsort((columns, keys))[:k]
