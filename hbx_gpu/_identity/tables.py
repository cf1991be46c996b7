"""Columns that may identify features, whatever file they come from."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

INDEX = "index"
"""The names of the features, which are the index of var."""
UNIQUE_NAMES = "unique_names"
"""The names with repeats numbered, unless a column is called so: where the user or the atlas asks for it."""

USUAL = (
    "feature_id",
    "var_feature_id",
    "gene_ids",
    "gene_id",
    "ensembl_id",
    "ensembl_ids",
    "ensembl",
    "feature_ids",
    "id",
)
"""Columns that usually hold the durable ids, the best first."""
SYMBOLS = ("feature_name", "gene_symbols", "gene_symbol", "gene_name", "gene_names", "symbol", "symbols")
"""Columns that usually hold the names."""

# Ids of genes, transcripts, exons and proteins as their databases document them: Ensembl (any species,
# with or without version), FlyBase, WormBase, HGNC, MGI, RGD, ZFIN, TAIR, the yeast genome database.
_STABLE = re.compile(
    r"ENS[A-Z]{0,10}[GTPER]\d{9,11}(\.\d+)?(_PAR_Y)?|LRG_\d+|FBgn\d{7}|WBGene\d{8}|HGNC:\d+|MGI:\d+|RGD:\d+|"
    r"ZDB-[A-Z]+-\d{6}-\d+|AT[1-5CM]G\d{5}(\.\d+)?|Y[A-P][LR]\d{3}[CW](-[A-Z])?"
)
_VERSION = re.compile(r"(ENS[A-Z]{0,10}[GTPER]\d{9,11})\.\d+(_PAR_Y)?")


class FeatureTable:
    """The features of one matrix: columns of texts that may identify them.

    Parameters
    ----------
    where
        File and table, used in error messages.
    readers
        Column -> a function that gives its values; :data:`INDEX` stands for the names.
    """

    def __init__(self, where: str, readers: Mapping[str, Callable[[], Iterable[object]]]) -> None:
        self.where = where
        self._readers = dict(readers)
        self._texts: dict[str, list[str] | None] = {}
        self._identifies: dict[str, bool] = {}
        self._is_stable: dict[str, bool] = {}

    @classmethod
    def of_frame(cls, var: pd.DataFrame, where: str) -> FeatureTable:
        """The features of an AnnData: the index of `var` and its columns, each name once."""
        names = [str(name) for name in var.columns]
        readers: dict[str, Callable[[], Iterable[object]]] = {INDEX: lambda: var.index}
        for i, name in enumerate(names):
            if names.count(name) == 1 and name != INDEX:
                readers[name] = functools.partial(var.iloc.__getitem__, (slice(None), i))
        return cls(where, readers)

    def alone(self) -> FeatureTable:
        """The same table without the frame or file that it was read from; it can be pickled."""
        found: dict[str, list[str] | list[None]] = {name: self.texts(name) or [None] for name in self.columns}
        return FeatureTable(
            self.where, {name: functools.partial(list, texts) for name, texts in found.items()}
        )

    @property
    def columns(self) -> list[str]:
        """Names of the columns, :data:`INDEX` first where the features have names."""
        return list(self._readers)

    def texts(self, column: str) -> list[str] | None:
        """Values of a column if all are texts that are not empty, else None."""
        if column not in self._texts:
            if column == UNIQUE_NAMES and column not in self._readers:
                names = self.texts(INDEX)
                self._texts[column] = None if names is None else numbered(names)
                return self._texts[column]
            found = list(self._readers[column]()) if column in self._readers else [None]
            good = all(issubclass(kind, str) for kind in set(map(type, found))) and all(found)
            self._texts[column] = [str(value) for value in found] if good else None
        return self._texts[column]

    def has(self, column: str) -> bool:
        """Whether there is such a column, :data:`UNIQUE_NAMES` included where the features have names."""
        return column in self._readers or (column == UNIQUE_NAMES and INDEX in self._readers)

    def identifies(self, column: str) -> bool:
        """Whether a column has a text of its own for every feature."""
        if column not in self._identifies:
            texts = self.texts(column)
            self._identifies[column] = texts is not None and len(set(texts)) == len(texts)
        return self._identifies[column]

    def is_stable(self, column: str) -> bool:
        """Whether a column identifies the features by ids of a database."""
        if column not in self._is_stable:
            texts = self.texts(column) if self.identifies(column) else None
            self._is_stable[column] = texts is not None and mostly_stable(texts)
        return self._is_stable[column]

    def names_positions(self, column: str) -> bool:
        """Whether a column holds nothing but whole numbers, such as the positions 0, 1, 2, ..."""
        texts = self.texts(column)
        return texts is not None and all(text.isdigit() for text in texts)

    def candidates(self) -> list[str]:
        """Columns that identify the features, the likeliest first; positions come last."""
        good = [name for name in self.columns if self.identifies(name)]
        return sorted(good, key=self._rank)  # stable: the rest stay in the order of the file

    def _rank(self, column: str) -> tuple[bool, bool, int]:
        usual = (INDEX, *USUAL, *SYMBOLS)
        place = usual.index(column) if column in usual else len(usual)
        return self.names_positions(column), not self.is_stable(column), place


def mostly_stable(ids: Sequence[str]) -> bool:
    """Whether at least half of some ids look like those of a database of genes."""
    wanted, head = (len(ids) + 1) // 2, len(ids) // 2 + 1
    alike = _n_stable(ids[:head])
    # Mostly all are ids or none is, and then these decide.
    if alike < wanted <= alike + len(ids) - head:
        alike += _n_stable(ids[head:])
    return alike >= wanted > 0


def _n_stable(ids: Sequence[str]) -> int:
    return sum(map(bool, map(_STABLE.fullmatch, ids)))


def without_versions(ids: Iterable[str]) -> list[str]:
    """Ids with the versions of Ensembl ids dropped: ENSG00000000003.15 becomes ENSG00000000003."""
    return [
        _VERSION.sub(lambda m: m[1] + (m[2] or ""), uid) if _VERSION.fullmatch(uid) else uid for uid in ids
    ]


def numbered(names: Sequence[str]) -> list[str]:
    """Names without repeats: a, a, a become a, a-1, a-2, as ``AnnData.var_names_make_unique`` makes them."""
    taken, counts = set(names), Counter[str]()
    seen: set[str] = set()
    out = []
    for name in names:
        unique = name
        while name in seen and unique in taken:
            counts[name] += 1
            unique = f"{name}-{counts[name]}"
        seen.add(name)
        taken.add(unique)
        out.append(unique)
    return out
