"""Regions in which fragments are counted: fixed-width bins or peaks on the chromosomes of a dataset."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hbx_gpu.chromatin._bed import region_table
from hbx_gpu.chromatin._chromosomes import check_unique, read_sizes
from hbx_gpu.chromatin._search import PeakSearch, no_peaks, peak_search
from hbx_gpu.errors import InvalidDataError

COUNTS = ("fragments", "insertions", "paired", "binary")
"""Accepted values of `count`; see :class:`Bins`."""

OBSERVED = "observed"
"""``Bins(chromosome_sizes=OBSERVED)``: as far as the dataset's fragments reach."""

_MAX_COLUMNS = np.iinfo(np.int32).max


@dataclass(frozen=True)
class Regions:
    """Regions laid over the chromosomes of one dataset: what counting looks up.

    Made by :meth:`Bins.over` and :meth:`Peaks.over`.

    Attributes
    ----------
    names
        object, (n_chromosomes,). Names of the dataset's chromosomes by number; None where one is left out.
    chromosomes
        object. Names of the chromosomes that columns lie on, whether the dataset has them or not.
    count
        One of `COUNTS`.
    width
        Bases of a bin; 0: peaks.
    bases
        int64, (len(chromosomes),). Sizes of the chromosomes that have bins; empty for peaks.
    chromosome, start, end
        int32, int64, int64, (n_features,). Peaks in column order: index into `chromosomes`, and half-open
        interval. Empty for bins, which are a matter of arithmetic.
    search
        How counting finds columns.
    """

    names: np.ndarray
    chromosomes: np.ndarray
    count: str
    width: int
    bases: np.ndarray
    chromosome: np.ndarray
    start: np.ndarray
    end: np.ndarray
    search: PeakSearch

    @property
    def n_chromosomes(self) -> int:
        """Chromosomes of the dataset."""
        return len(self.names)

    @property
    def n_features(self) -> int:
        """Number of regions."""
        return int((-(-self.bases // self.width)).sum()) if self.width else len(self.start)

    def column_numbers(self) -> np.ndarray:
        """int64, (n_features,). The dataset's number of every column's chromosome; -1 where it has none."""
        number = {name: c for c, name in enumerate(self.names) if name is not None}
        numbers = np.array([number.get(name, -1) for name in self.chromosomes], np.int64)
        result: np.ndarray = numbers[self.table()[0]]
        return result

    def table(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Every column's chromosome (index into `chromosomes`), start and end, bins written out."""
        if not self.width:
            return self.chromosome, self.start, self.end
        number = -(-self.bases // self.width)
        chromosome = np.repeat(np.arange(len(self.bases), dtype=np.int32), number)
        within = np.arange(len(chromosome)) - np.repeat(np.cumsum(number) - number, number)
        start = within * self.width
        return chromosome, start, np.minimum(start + self.width, self.bases[chromosome])

    def lookup(self) -> tuple[tuple[object, ...], tuple[np.ndarray, ...]]:
        """Return the arguments `where` and `peaks` of :func:`hbx_gpu.chromatin._kernels.count_rows`."""
        found = self.search
        inverse = 1.0 / self.width if self.width else 0.0
        return (self.width, inverse, found.shift, found.first, found.size, found.stop), found.arrays

    @cached_property
    def feature_uids(self) -> np.ndarray:
        """object, (n_features,). ``chr1:0-5000``: 0-based, the end not included, as in BED."""
        chromosome, start, end = self.table()
        names = self.chromosomes[chromosome]
        texts = [f"{c}:{a}-{b}" for c, a, b in zip(names, start.tolist(), end.tolist(), strict=True)]
        return np.array(texts, dtype=object) if texts else np.empty(0, dtype=object)

    def __getstate__(self) -> dict[str, object]:
        # Millions of names are made again faster than they travel to a worker, and few workers ask.
        return {name: value for name, value in self.__dict__.items() if name != "feature_uids"}

    def __repr__(self) -> str:
        kind = f"bins of {self.width:,} bases" if self.width else "peaks"
        return f"Regions({self.n_features:,} {kind}, {self.count})"


@dataclass(frozen=True)
class Bins:
    """Fixed-width bins over whole chromosomes.

    Base ``b`` lies in bin ``b // width`` of its chromosome; the last bin ends with the chromosome. The order
    of chromosomes is that of their sizes as given, so that a column means the same in every query and, with
    sizes from one file, in every atlas.

    Parameters
    ----------
    width
        Bases of a bin.
    chromosome_sizes
        Name -> bases, or the path of a ``.chrom.sizes`` or ``.fai`` file: bins lie on those chromosomes in
        that order, and fragments elsewhere are left out. None: as registered in the atlas. ``"observed"``:
        as far as the fragments of the dataset's rows reach, which reads all of them once.
    count
        ``"fragments"``: fragments that overlap the region, however little; one fragment counts in each region
        that it overlaps. ``"insertions"``: transposase cuts, of which every fragment has two, at its first
        and at its last base. ``"paired"``: fragments with at least one cut in the region. ``"binary"``: 1
        where there is any cut.

    Raises
    ------
    InvalidDataError
        Width or sizes are not positive.
    ValueError
        An unknown `count`.
    """

    width: int
    chromosome_sizes: Mapping[str, int] | str | os.PathLike[str] | None = None
    count: str = "fragments"

    def __post_init__(self) -> None:
        if isinstance(self.width, bool) or int(self.width) != self.width or self.width <= 0:
            raise InvalidDataError(f"bins must be a positive number of bases wide, got {self.width!r}")
        _check_count(self.count)

    @property
    def observed(self) -> bool:
        """Whether sizes are to be taken from the fragments."""
        return isinstance(self.chromosome_sizes, str) and self.chromosome_sizes == OBSERVED

    def over(
        self, names: Sequence[str | None] | np.ndarray, sizes: Mapping[str, int] | None = None
    ) -> Regions:
        """Bins over the chromosomes of a dataset.

        Parameters
        ----------
        names
            Name of every chromosome number; None for one to leave out.
        sizes
            Registered or observed sizes, used if `chromosome_sizes` is neither a mapping nor a path.

        Raises
        ------
        InvalidDataError
            No sizes, none of these chromosomes among them, or more bins than an int32 counts.
        """
        names = _names(names)
        if self.chromosome_sizes is None or self.observed:
            sizes = sizes or {}
            lengths = {name: int(sizes[name]) for name in names if name is not None and name in sizes}
            if not lengths:
                raise InvalidDataError(
                    f"bins need to know how long chromosomes are, and the registry does not say for "
                    f"{_some(names)}; pass chromosome_sizes={{name: bases}}, the path of a .chrom.sizes or "
                    f'.fai file, or "{OBSERVED}" to go as far as the fragments do'
                )
        else:
            lengths = read_sizes(self.chromosome_sizes)
            _check_shared(names, lengths, "chromosome_sizes")
        bases = np.fromiter(lengths.values(), np.int64, len(lengths))
        number = -(-bases // self.width)
        if number.sum() > _MAX_COLUMNS:
            raise InvalidDataError(
                f"bins of {self.width} bases over {bases.sum():,} make {number.sum():,} columns, more than "
                f"{_MAX_COLUMNS:,}; take wider bins or fewer chromosomes"
            )
        place = {name: i for i, name in enumerate(lengths)}
        at = np.array([-1 if name is None else place.get(name, -1) for name in names], np.int64)
        before = np.append(np.cumsum(number) - number, 0)
        return Regions(
            names=_objects(names),
            chromosomes=_objects(lengths),
            count=self.count,
            width=int(self.width),
            bases=bases,
            chromosome=np.empty(0, np.int32),
            start=np.empty(0, np.int64),
            end=np.empty(0, np.int64),
            search=no_peaks(before[at], np.append(bases, 0)[at]),
        )


class Peaks:
    """Intervals of any width, one column each, in the order given.

    Peaks may overlap; a fragment counts in each one that it meets. Those on chromosomes that the dataset
    does not have stay columns of zeros, so that the columns are those of the list.

    Parameters
    ----------
    table
        Path of a BED file (plain or ``.gz``; its first three columns count), a frame or table with columns
        ``chrom``, ``start`` and ``end``, or (chrom, start, end) triples. 0-based, the end not included.
    count
        As for :class:`Bins`.

    Raises
    ------
    InvalidDataError
        An interval is empty, negative or listed twice, a column is missing, or a line is not an interval.
    ValueError
        An unknown `count`.
    """

    def __init__(self, table: object, *, count: str = "fragments") -> None:
        self.chrom, self.start, self.end = region_table(table)
        self.count = _check_count(count)

    def __len__(self) -> int:
        return len(self.start)

    def __repr__(self) -> str:
        return f"Peaks({len(self):,} regions, count={self.count!r})"

    def over(
        self,
        names: Sequence[str | None] | np.ndarray,
        sizes: Mapping[str, int] | None = None,  # noqa: ARG002 - as Bins
    ) -> Regions:
        """These peaks over the chromosomes of a dataset.

        Parameters
        ----------
        names
            Name of every chromosome number; None for one to leave out.
        sizes
            Not needed.

        Raises
        ------
        InvalidDataError
            The dataset has none of the chromosomes of the peaks.
        """
        names = _names(names)
        chromosomes = dict.fromkeys(self.chrom.tolist())
        if chromosomes:
            _check_shared(names, chromosomes, "the peaks")
        place = {name: i for i, name in enumerate(chromosomes)}
        chromosome = np.array([place[name] for name in self.chrom], np.int32)
        number = {name: c for c, name in enumerate(names) if name is not None}
        home = np.array([number.get(name, -1) for name in chromosomes], np.int64)
        return Regions(
            names=_objects(names),
            chromosomes=_objects(chromosomes),
            count=self.count,
            width=0,
            bases=np.empty(0, np.int64),
            chromosome=chromosome,
            start=self.start,
            end=self.end,
            search=peak_search(home[chromosome], self.start, self.end, len(names)),
        )


def _names(names: Sequence[str | None] | np.ndarray) -> list[str | None]:
    found = [None if name is None else str(name) for name in names]
    check_unique(found)
    return found


def _objects(names: Collection[object]) -> np.ndarray:
    out = np.empty(len(names), dtype=object)
    out[:] = list(names)
    return out


def _check_count(count: str) -> str:
    if count not in COUNTS:
        raise ValueError(f"count must be one of {', '.join(map(repr, COUNTS))}, got {count!r}")
    return count


def _check_shared(names: list[str | None], others: Collection[str], what: str) -> None:
    """Raise an error if no chromosome is shared; other spellings would silently give a matrix of zeros."""
    if not set(names) & set(others):
        raise InvalidDataError(
            f"{what} and the dataset have no chromosome in common: {_some(others)} against {_some(names)}; "
            "rename one of them"
        )


def _some(names: Collection[str | None]) -> str:
    known = [name for name in names if name is not None]
    return f"{known[:5]}{' ...' if len(known) > 5 else ''}"
