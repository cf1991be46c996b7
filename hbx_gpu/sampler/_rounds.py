"""Batches cut into rounds, one batch for each rank: the last round evenly, and never into single cells."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

_MOST_ROUNDS_CUT_AGAIN = 3


@dataclass(frozen=True, slots=True)
class Even:
    """Sizes of batches that are all alike, but for a smaller one at the end.

    Attributes
    ----------
    n_full, size
        Number of full batches, and cells of each.
    rest
        Cells of the last batch; 0 if there is no smaller one.
    """

    n_full: int
    size: int
    rest: int = 0

    def __len__(self) -> int:
        return self.n_full + bool(self.rest)

    def listed(self, skip: int = 0) -> np.ndarray:
        """int64, the size of each batch but the first `skip`."""
        sizes = np.full(max(len(self) - skip, 0), self.size, np.int64)
        if self.rest and len(sizes):
            sizes[-1] = self.rest
        return sizes

    def times(self, factor: int) -> Even:
        """The same batches with so many times the cells."""
        return Even(self.n_full, factor * self.size, factor * self.rest)


Sizes: TypeAlias = np.ndarray | Even
"""Cells of each batch in the order of time."""


@dataclass(frozen=True, slots=True)
class Edges:
    """Where batches begin and end: at multiples of a size first, then as listed.

    Attributes
    ----------
    n_head, first, step
        The first `n_head` edges are ``first, first + step, ...``.
    tail
        int64, at least one. The edges after those.
    """

    n_head: int
    first: int
    step: int
    tail: np.ndarray

    def __len__(self) -> int:
        return self.n_head + len(self.tail)

    def __getitem__(self, i: int) -> int:
        i += len(self) if i < 0 else 0
        return self.first + i * self.step if i < self.n_head else int(self.tail[i - self.n_head])


def batch_sizes(n_cells: int, batch_size: int, *, drop_last: bool) -> Even:
    """Sizes of the batches that n_cells are cut into, the last one partial or dropped."""
    full, rest = divmod(n_cells, batch_size)
    return Even(full, batch_size, 0 if drop_last else rest)


def total(sizes: Sizes) -> int:
    """Cells of all batches."""
    return sizes.n_full * sizes.size + sizes.rest if isinstance(sizes, Even) else int(sizes.sum())


def n_smaller(sizes: Sizes, least: int) -> int:
    """Number of batches of less than `least` cells."""
    if isinstance(sizes, Even):
        return sizes.n_full * (sizes.size < least) + (0 < sizes.rest < least)
    return int(np.count_nonzero(sizes < least))


def least_per_rank(sizes: Sizes, world_size: int) -> int:
    """Smallest number of cells that a batch may have.

    Two if there are several ranks, so that no rank trains on one cell (where batch normalization fails)
    while the others do not; one if all batches hold one.
    """
    most = (sizes.size if sizes.n_full else sizes.rest) if isinstance(sizes, Even) else sizes.max(initial=0)
    return 1 if world_size == 1 or most <= 1 else 2


def cut(sizes: Sizes, *, start: int, world_size: int, drop_last: bool, inside: bool = False) -> Edges:
    """What :func:`cut_rounds` does, in memory that does not grow with the number of batches of one size."""
    if not isinstance(sizes, Even):
        edges = cut_rounds(sizes, start=start, world_size=world_size, drop_last=drop_last, inside=inside)
        return Edges(0, 0, 0, edges)
    begun, amid = divmod(start, sizes.size)
    # Only the last few rounds can be cut otherwise than the batches are.
    left = max(len(sizes) - begun, 0)
    n_head = 0 if amid else max(0, left // world_size - _MOST_ROUNDS_CUT_AGAIN - 2) * world_size
    # A full batch is listed before them where there is one, because limits follow from the largest batch.
    done = begun + n_head
    listed = max(done - 1, 0)
    tail = cut_rounds(
        sizes.listed(listed),
        start=(done - listed) * sizes.size + amid,
        world_size=world_size,
        drop_last=drop_last,
        inside=inside,
    )
    return Edges(n_head, start, sizes.size, tail + listed * sizes.size)


def cut_rounds(
    sizes: np.ndarray, *, start: int, world_size: int, drop_last: bool, inside: bool = False
) -> np.ndarray:
    """Cut what follows cell `start` into rounds of one batch for each rank.

    Batches stay as they are, except in the last round: if it is incomplete or its batches differ in size,
    its cells are shared out evenly, or dropped with `drop_last`. If that would leave a rank a single cell,
    one or two rounds before it are cut again too. Batches of one or two cells leave no room for that; the
    last ones then hold up to one cell more than a full batch.

    Parameters
    ----------
    sizes
        int64 (n_batches,), cells per batch in the order of time.
    start
        Cells of the epoch that are already done.
    inside
        Complete the last round by cutting single batches, so that none mixes the cells of two (label-pure
        batches), as far as each piece keeps two cells. On several ranks, batches of a single cell are joined
        to others.

    Returns
    -------
    numpy.ndarray
        int64 (rounds * world_size + 1,), positions in the epoch's cells; ``[start]`` if nothing can be dealt.
    """
    every = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)])
    edges = every
    if start:
        edges = np.concatenate([[start], every[np.searchsorted(every, start, side="right") :]])
    if drop_last:
        return edges[: (len(edges) - 1) // world_size * world_size + 1]
    if world_size == 1 or len(edges) == 1:
        return edges
    most, least = int(sizes.max()), least_per_rank(sizes, world_size)
    if inside:
        edges = _without_single_cells(edges, least)
        if (pure := _cut_last_batches(edges, world_size, least)) is not None:
            return pure
    # The saved run stopped between batches that it had cut anew: no batch of the epoch begins here.
    amid = start > 0 and start not in every
    full, rest = divmod(len(edges) - 1, world_size)
    if not amid and rest == 0:
        last = np.diff(edges[-world_size - 1 :])
        if np.ptp(last) <= 1 and last.min() >= least:
            return edges
    whole = 0 if amid and not inside else full - (rest == 0)
    for again in range(_MOST_ROUNDS_CUT_AGAIN):
        keep = max(0, whole - again) * world_size
        n_cells = int(edges[-1] - edges[keep])
        rounds = -(-n_cells // (world_size * most))
        if n_cells >= least * world_size * rounds or keep == 0:
            break
    rounds = min(rounds, n_cells // (least * world_size))
    if rounds == 0:  # only where nothing came before: fewer cells than the ranks need
        return edges[:1]
    n_pieces = rounds * world_size
    pieces = edges[keep] + n_cells * np.arange(n_pieces + 1) // n_pieces
    return np.concatenate([edges[:keep], pieces])


def _without_single_cells(edges: np.ndarray, least: int) -> np.ndarray:
    """Join batches of a single cell: two in a row to each other, a lone one to the batch before it.

    The first batch has none before it, and is joined to the next one.
    """
    single = np.diff(edges) < least
    if not single.any():
        return edges
    index = np.arange(len(single))
    place_in_run = index - np.maximum.accumulate(np.where(single, -1, index)) - 1
    next_is_single = np.append(single[1:], False)
    begins = ~single | ((place_in_run % 2 == 0) & next_is_single)
    if single[0] and not next_is_single[0] and len(single) > 1:
        begins[1] = False
    begins[0] = True
    result: np.ndarray = edges[np.append(begins, True)]
    return result


def _cut_last_batches(edges: np.ndarray, world_size: int, least: int) -> np.ndarray | None:
    """An incomplete last round, completed by cutting single batches into pieces of at least `least` cells.

    As few rounds as possible are cut with it. None if the batches are too small for that.
    """
    full, rest = divmod(len(edges) - 1, world_size)
    if rest == 0:
        return edges
    most_pieces = np.maximum(np.diff(edges) // least, 1)
    kept_rounds = np.arange(full + 1)
    possible = np.cumsum(most_pieces[::-1])[::-1][kept_rounds * world_size]
    enough = np.flatnonzero(possible >= (full + 1 - kept_rounds) * world_size)
    if not len(enough):
        return None
    keep = int(enough[-1]) * world_size
    pieces = _cut_each(edges[keep:], (full + 1) * world_size - keep, most_pieces[keep:])
    return np.concatenate([edges[:keep], pieces])


def _cut_each(edges: np.ndarray, n_pieces: int, most_pieces: np.ndarray) -> np.ndarray:
    """Refine `edges` to n_pieces intervals, always cutting on where the pieces are largest.

    No interval is cut into more than its number in `most_pieces`.
    """
    sizes, most = np.diff(edges).tolist(), most_pieces.tolist()
    parts = [1] * len(sizes)
    heap = [(-size, i) for i, size in enumerate(sizes) if most[i] > 1]
    heapq.heapify(heap)
    for _ in range(n_pieces - len(sizes)):
        _, i = heapq.heappop(heap)
        parts[i] += 1
        if parts[i] < most[i]:
            heapq.heappush(heap, (-sizes[i] / parts[i], i))
    cuts = [
        lo + size * np.arange(n) // n for lo, size, n in zip(edges[:-1].tolist(), sizes, parts, strict=True)
    ]
    return np.concatenate([*cuts, edges[-1:]])
